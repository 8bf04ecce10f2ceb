"""Records to examples: the tokens of a text and which of them are learnt.

Continual pre-training reads everything as plain text: no chat template, no role
names, a loss on every token. Chat formats belong to format alignment, later.
"""

import dataclasses
import functools
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mixcpt_jax.data.sources import Record
from mixcpt_jax.errors import InputError

FIELDS = {
    "document": ("text",),
    "instruction": ("instruction", "input", "output", "prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
}
PREFERENCE_SIDES = ("chosen", "rejected", "both")

# What stands between a question and its answer, as between two paragraphs.
_SEPARATOR = "\n\n"
_TEXTS_PER_BLOCK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Token sequences end to end in flat arrays.

    Attributes:
      tokens: int32 [total].
      loss_mask: bool [total]; whether `tokens[i]` is learnt when it is the target.
      offsets: int64 [examples + 1]; example `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    When pickled, the arrays go to a temporary file that lives as long as this object,
    and the copy maps it: worker processes share one corpus in memory.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def collect(
        cls, pairs: Iterable[tuple[Sequence[int], Sequence[bool]]]
    ) -> "Examples":
        """Gathers (tokens, loss mask) pairs, one pair an example."""
        tokens, masks, lengths = [], [], [0]
        for ids, mask in pairs:
            tokens.append(np.asarray(ids, np.int32))
            masks.append(np.asarray(mask, bool))
            lengths.append(len(ids))
        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *tokens]),
            loss_mask=np.concatenate([np.empty(0, bool), *masks]),
            offsets=np.cumsum(lengths, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    @functools.cached_property
    def num_learnt(self) -> int:
        """Targets that are learnt: masked-in tokens, save the first of each example."""
        first = self.offsets[:-1][self.lengths > 0]
        return int(self.loss_mask.sum()) - int(self.loss_mask[first].sum())

    @functools.cached_property
    def _folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="mixcpt-tokens-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for field in dataclasses.fields(self):
            np.save(f"{folder}/{field.name}.npy", getattr(self, field.name))
        return folder

    def __reduce__(self):
        return _open_examples, (self._folder,)


def _open_examples(folder: str) -> Examples:
    return Examples(
        **{
            field.name: np.load(f"{folder}/{field.name}.npy", mmap_mode="r")
            for field in dataclasses.fields(Examples)
        }
    )


def encode(
    records: Iterable[Record],
    format: str,
    tokenizer,
    fields: Mapping[str, str] | None = None,
    preference_side: str = "chosen",
) -> Examples:
    """Turns records into examples: [BOS if the tokenizer adds it] + text + [end].

    Args:
      records: see `sources.read`; they are read once and not kept.
      format: what a record is written as:
        'document': its `text`;
        'instruction': `instruction`, `input` if there is one, and `output`, or
        `prompt` and `response`, with a blank line between;
        'preference': `prompt` and the answer of `preference_side`, likewise.
      tokenizer: has `encode_batch`, `add_bos`, `bos_id` and `end_of_document_id`.
      fields: our field name -> the source's name for it, where they differ.
      preference_side: 'chosen', 'rejected', or 'both' for two examples a record.

    Raises:
      InputError: an unknown format, side or field name; a record that lacks a field,
        or whose field is not a string or is blank (`input` may be).
    """
    fields = dict(fields or {})
    _check_settings(format, fields, preference_side)
    texts = (
        text
        for record in records
        for text in _texts(record, format, fields, preference_side)
    )
    return Examples.collect(_tokenize(texts, tokenizer))


def _tokenize(texts: Iterator[str], tokenizer) -> Iterator[tuple[list, np.ndarray]]:
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    end = [tokenizer.end_of_document_id]
    while block := list(itertools.islice(texts, _TEXTS_PER_BLOCK)):
        for ids in tokenizer.encode_batch(block):
            mask = np.ones(len(start) + len(ids) + len(end), bool)
            mask[: len(start)] = False
            yield start + ids + end, mask


def _texts(record: Record, format: str, fields: dict, side: str) -> list[str]:
    def read(name: str) -> str:
        return _read_field(record, fields.get(name, name))

    if format == "document":
        return [read("text")]
    if format == "preference":
        sides = ("chosen", "rejected") if side == "both" else (side,)
        prompt = read("prompt")
        return [_SEPARATOR.join([prompt, read(answer)]) for answer in sides]
    if _has(record, fields, "prompt") and not _has(record, fields, "instruction"):
        return [_SEPARATOR.join([read("prompt"), read("response")])]
    parts = [read("instruction")]
    # Many instruction sets have the field in every record and leave it blank.
    if record.fields.get(fields.get("input", "input")):
        parts.append(read("input"))
    return [_SEPARATOR.join([*parts, read("output")])]


def _has(record: Record, fields: dict, name: str) -> bool:
    return fields.get(name, name) in record.fields


def _read_field(record: Record, name: str) -> str:
    if name not in record.fields:
        found = ", ".join(sorted(record.fields)) or "none"
        raise InputError(
            f"{record.place}: no field {name!r} (found: {found}); map it with the "
            "source's `fields`"
        )
    value = record.fields[name]
    if not isinstance(value, str):
        raise InputError(
            f"{record.place}: field {name!r} is of type {type(value).__name__}, "
            "a string is wanted"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{record.place}: field {name!r} has half of a surrogate pair, which is no "
            "text; drop the record"
        ) from None
    if not value.strip():
        raise InputError(f"{record.place}: field {name!r} is blank; drop the record")
    return value


def _check_settings(format: str, fields: dict, preference_side: str) -> None:
    if format not in FIELDS:
        raise InputError(f"format {format!r} is unknown; use one of {sorted(FIELDS)}")
    if unknown := sorted(set(fields) - set(FIELDS[format])):
        raise InputError(
            f"fields: {unknown[0]!r} is not a field of format {format!r}; "
            f"use some of {list(FIELDS[format])}"
        )
    if preference_side not in PREFERENCE_SIDES:
        raise InputError(
            f"preference_side {preference_side!r} is unknown; "
            f"use one of {list(PREFERENCE_SIDES)}"
        )
