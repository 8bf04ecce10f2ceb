"""Opens GGUF files: memory-mapped, with their header parsed and checked."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import headers
from mixcpt_jax.models.headers import Header


def open_gguf(path: epath.Path) -> gguf.GGUFReader:
    """Memory-maps a GGUF file and parses its header.

    Parsing takes seconds, mostly for the vocabulary, and config, weights and tokenizer
    each need it, so the last result is cached until its file changes.

    Raises:
      InputError: the file is not a whole GGUF file, or not of a whole model.
    """
    small_files.require_regular(path, headers.AGAIN)
    return _parse_gguf(path, paths.stamp(path))


class _Reader(gguf.GGUFReader):
    """The library's reader, which does not check where a file ends."""

    def _get(self, offset, dtype, count=1, override_order=None):
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if not 0 <= int(offset) <= end <= len(self.data):
            raise EOFError(f"the file ends at byte {len(self.data):,}, before {end:,}")
        return super()._get(offset, dtype, count, override_order)


@functools.lru_cache(maxsize=1)
def _parse_gguf(path: epath.Path, stamp: tuple[int, ...]) -> gguf.GGUFReader:
    try:
        with paths.on_local_disk(path) as local:
            reader = _Reader(local)
    except Exception as error:  # A damaged file can raise anything.
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a whole GGUF file ({reason}); download it again"
        ) from error
    header = gguf_header(reader, path)
    kind = header.text("general.type", "model")
    if kind != "model":
        raise InputError(
            f"{path}: general.type is {kind!r}, which is not a whole model; "
            f"{_NO_MODEL.get(kind, 'name the file of the model')}"
        )
    num_parts = header.integer("split.count", 1, least=0)
    if num_parts > 1:
        raise InputError(
            f"{path}: is one of {num_parts} parts (split.count); join them by "
            "`llama-gguf-split --merge FIRST_PART OUT.gguf` and name that file"
        )
    return reader


# The remedy for a GGUF file of another type.
_NO_MODEL = {
    "adapter": "merge it into its base by `llama-export-lora` and name the new file",
    "imatrix": "it was measured to quantize a model; name the file of the model",
    "mmproj": "it projects images into a model; name the file of the text model",
}


def gguf_header(reader: gguf.GGUFReader, file: epath.Path) -> Header:
    """The metadata of a GGUF file; values are decoded when they are read."""
    return Header(file, _GgufValues(reader, file))


class _GgufValues(Mapping):
    def __init__(self, reader: gguf.GGUFReader, file: epath.Path):
        self._fields, self._file = reader.fields, file

    def __getitem__(self, key: str) -> Any:
        field = self._fields[key]
        try:
            return field.contents()
        except Exception as error:  # Such as of text that is not UTF-8.
            raise InputError(
                f"{self._file}: {key} cannot be read ({error}); download it again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)
