"""The teacher cache: outputs of the frozen teacher on packed rows; see `token_cache`.

It has two forms. One holds hidden states in bfloat16, from which the teacher's unembedding
computes the logits, exact up to that rounding. The other holds the input of
`streamed.CompactTeacher`: the most likely tokens and the gold token, with their
log-probabilities in float16.

A record holds one row: the values of each array of the form at the row's tokens, without
padding, one array after the other.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import token_cache


@dataclasses.dataclass(frozen=True)
class Form:
    """What the cache holds at each token.

    Attributes:
      arrays: name in the batch -> (size, numpy dtype); size 0: one number per token.
    """

    arrays: Mapping[str, tuple[int, str]]

    @classmethod
    def of_hidden_states(cls, hidden_size: int) -> "Form":
        # NumPy has no bfloat16, so its bits are stored.
        return cls({"teacher_hidden": (hidden_size, "<u2")})

    @classmethod
    def compact(cls, top_k: int, vocab_size: int) -> "Form":
        ids = "<u2" if vocab_size <= 2**16 else "<i4"
        return cls(
            {
                "teacher_ids": (top_k + 1, ids),
                "teacher_logps": (top_k + 1, "<f2"),
                "teacher_tail": (0, "<f4"),
            }
        )

    @property
    def bytes_per_token(self) -> int:
        return sum(max(n, 1) * np.dtype(d).itemsize for n, d in self.arrays.values())

    def empty(self, row_length: int) -> dict[str, np.ndarray]:
        """The arrays of a row of padding, [row_length, size]."""
        return {
            name: np.zeros((row_length, size) if size else row_length, dtype)
            for name, (size, dtype) in self.arrays.items()
        }

    def is_broken(self, arrays: Mapping[str, np.ndarray], num_tokens: int) -> bool:
        """Whether the arrays have a NaN or an infinity at a row's tokens.

        A probability may be 0, so a log-probability may be minus infinity.
        """
        for name, values in arrays.items():
            values = np.asarray(values[:num_tokens])
            if name == "teacher_hidden":
                # All bits of the bfloat16's exponent are set.
                is_broken = values & 0x7F80 == 0x7F80
            else:
                is_broken = ~(values < np.inf)
            if is_broken.any():
                return True
        return False

    def encode(self, arrays: Mapping[str, np.ndarray], num_tokens: int) -> bytes:
        """The record of a row, from arrays [row_length, size]."""
        return b"".join(
            np.ascontiguousarray(arrays[name][:num_tokens], dtype).tobytes()
            for name, (_, dtype) in self.arrays.items()
        )

    def decode(self, record: bytes, row_length: int) -> dict[str, np.ndarray]:
        """The arrays of a row, padded."""
        arrays = self.empty(row_length)
        num_tokens = len(record) // self.bytes_per_token
        offset = 0
        for name, (size, dtype) in self.arrays.items():
            count = num_tokens * max(size, 1)
            flat = np.frombuffer(record, dtype, count, offset)
            arrays[name][:num_tokens] = flat.reshape(num_tokens, *[size][: bool(size)])
            offset += flat.nbytes
        return arrays


@dataclasses.dataclass(frozen=True)
class TeacherRows:
    """The teacher outputs of the rows of one source.

    Attributes:
      form: which arrays they are.
      records: by row; None for a source without a loss that needs the teacher.
    """

    form: Form
    records: token_cache.Records | None = None

    def read(self, row: int, row_length: int) -> dict[str, np.ndarray]:
        """The arrays of a row, [row_length, size] each.

        Raises:
          InputError: a shard is damaged.
        """
        if self.records is None:
            return self.form.empty(row_length)
        return self.form.decode(self.records[row], row_length)


def folder_of(root: str, source: str, top_k: int) -> epath.Path:
    """The folder of a source's teacher outputs; each form has its own folder."""
    name = f"teacher-top{top_k}" if top_k else "teacher"
    return token_cache.folder_of(root, source) / name


def shard_facts(key: dict[str, Any], first_row: int, num_rows: int) -> dict[str, Any]:
    """What identifies a shard: the teacher and the rows."""
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=8)
    return {"input": digest.hexdigest(), "first_row": first_row, "rows": num_rows}


def open_rows(folder: epath.Path, form: Form, key: dict[str, Any]) -> TeacherRows:
    """Opens the teacher outputs of a source.

    Args:
      folder: see `folder_of`.
      form: of the outputs.
      key: identifies the rows and the teacher.

    Raises:
      InputError: they are missing, damaged, or for other rows or another teacher.
    """
    remedy = (
        "run `python -m mixcpt_jax prepare --teacher` with this config, or set "
        "objective.teacher='step'"
    )
    manifest = token_cache.read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder}: holds no complete teacher cache; {remedy}")
    part = token_cache.difference(manifest, key)
    if part is not None:
        raise InputError(
            f"{folder}: the teacher cache has {part}={manifest['key'].get(part)!r}, this "
            f"run {key[part]!r}; {remedy}"
        )
    return TeacherRows(form, token_cache.Records(folder, manifest["shards"]))
