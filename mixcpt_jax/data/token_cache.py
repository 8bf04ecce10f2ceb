"""Prepared data on disk: ArrayRecord shards in folders, with a manifest each.

A folder holds shards, `00000.array_record` and so on, and `manifest.json`, which is written
last. The manifest holds a key of everything that the shards depend on, and the hash and
other facts of each shard. Each shard's manifest entry is also a separate file beside the
shard, from which an interrupted preparation resumes.

There are two kinds of folders: the tokens of a source (`PreparedExamples`), cut into
blocks, and teacher outputs on packed rows (`mixcpt_jax.data.teacher_cache`).
"""

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import MOST_BYTES_OF_ROWS, OBJECT
from mixcpt_jax.data import readers
from mixcpt_jax.data.formats import Examples

MANIFEST = "manifest.json"
INDEX = "lengths.npy"
REMEDY = "run `python -m mixcpt_jax prepare` again, which repairs it"
# A row reads a few pieces, each from one or two blocks; with long blocks, most of what is
# read would not be used.
BLOCK_TOKENS = 4096

_OPEN_READERS = 128

# The shapes of a shard's entry and of a manifest, as far as they are read again.
_SHARD = {
    "file": str,
    "hash": str,
    "records": int,
    "examples?": int,
    "tokens?": int,
    "loss_tokens?": int,
    "learnt_tokens?": int,
    "found?": {str: {str: int}},
}
_MANIFEST = {"key": OBJECT, "shards": [_SHARD], "index?": str}
_OF_EXAMPLES = {
    "fingerprint": str,
    "found": {str: {str: int}},
    "shards": [{"tokens": int}],
}

Entry = dict[str, Any]


def folder_of(root: str, source: str) -> epath.Path:
    """The folder of a source's tokens."""
    return paths.absolute(root) / source


def write_shard(
    folder: epath.Path, number: int, records: Iterable[bytes], facts: Entry
) -> Entry:
    """Writes a shard atomically, and returns its manifest entry.

    Raises:
      InputError: the write failed, for example because the disk is full.
    """
    file = folder / f"{number:05d}.array_record"
    temporary = file.with_suffix(".incomplete")
    try:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        num_records = 0
        for record in records:
            writer.write(record)
            num_records += 1
        writer.close()
        entry = {
            "file": file.name,
            "hash": paths.hash_of(temporary),
            "records": num_records,
        } | facts
        temporary.replace(file)
        paths.replace(file.with_suffix(".json"), json.dumps(entry))
    except InputError:
        raise
    except Exception as error:  # ArrayRecord has no exception class for a full disk
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(
            f"{file}: cannot be written ({type(error).__name__}: {error}); free some "
            "space and run the same command again, which resumes here"
        ) from error
    return entry


def finished_shard(folder: epath.Path, number: int, facts: Entry) -> Entry | None:
    """The entry of a shard, if it exists, is undamaged and has these facts."""
    file = folder / f"{number:05d}.array_record"
    try:
        entry = small_files.read_json(file.with_suffix(".json"), _SHARD)
    except InputError:
        return None
    is_same = facts.items() <= entry.items() and entry["file"] == file.name
    return entry if is_same and _has_hash(file, entry["hash"]) else None


def _has_hash(file: epath.Path, digest: str) -> bool:
    try:
        small_files.require_regular(file)
    except InputError:
        return False
    return paths.hash_of(file) == digest


def write_manifest(
    folder: epath.Path, key: Entry, shards: list[Entry], facts: Entry
) -> None:
    """Marks a folder as complete, and removes shards that an earlier preparation left."""
    for file in folder.glob("[0-9]*"):
        if int(file.name[:5]) >= len(shards):
            file.unlink()
    manifest = {"key": key} | facts | {"shards": shards}
    paths.replace(folder / MANIFEST, json.dumps(manifest, indent=1))


def read_manifest(folder: epath.Path) -> Entry | None:
    """The manifest, or None if the folder is missing or incomplete.

    Raises:
      InputError: it is damaged, or a shard is missing.
    """
    file = folder / MANIFEST
    if not file.exists():
        return None
    manifest = small_files.read_json(file, _MANIFEST, REMEDY, MOST_BYTES_OF_ROWS)
    for shard in manifest["shards"]:
        shard_file = paths.child(folder, shard["file"], str(file))
        small_files.require_regular(shard_file, REMEDY)
        counts = [count for count in shard.values() if isinstance(count, int)]
        if not all(0 <= count < 2**53 for count in counts):
            raise InputError(f"{file}: a shard counts {counts!s:.80}; {REMEDY}")
    return manifest


def is_undamaged(folder: epath.Path, manifest: Entry) -> bool:
    """Whether every file has the hash in the manifest; reads all of them."""
    files = {shard["file"]: shard["hash"] for shard in manifest["shards"]}
    files |= {INDEX: manifest["index"]} if "index" in manifest else {}
    return all(_has_hash(folder / name, digest) for name, digest in files.items())


def difference(manifest: Entry, key: Entry) -> str | None:
    """The first part of the key that differs from the manifest, or None."""
    then = manifest["key"]
    return next((name for name in key if then.get(name) != key[name]), None)


class Records:
    """The records of consecutive shards, by number; can be pickled.

    Attributes:
      starts: the number of each shard's first record, and the number of records.
    """

    def __init__(self, folder: epath.Path, shards: list[Entry]):
        self._folder, self._shards = folder, shards
        self.starts = np.cumsum([0, *(shard["records"] for shard in shards)])
        self._readers: dict[int, Any] = {}

    def __reduce__(self):
        return Records, (self._folder, self._shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> bytes:
        """
        Raises:
          InputError: the shard is damaged.
        """
        if not 0 <= number < len(self):
            raise InputError(
                f"{self._folder / MANIFEST}: names record {number} of {len(self)}; {REMEDY}"
            )
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        try:
            reader = self._reader(shard)
            record = reader.read([int(number - self.starts[shard])])[0]
        except (
            Exception
        ) as error:  # the library has no exception class for damaged files
            raise InputError(self._complaint(shard, str(error))) from error
        return record

    def _reader(self, shard: int):
        if shard not in self._readers:
            if len(self._readers) >= _OPEN_READERS:
                self._readers.pop(next(iter(self._readers)))
            file = self._folder / self._shards[shard]["file"]
            reader = readers.array_record_reader(file)
            if reader.num_records() != self._shards[shard]["records"]:
                raise EOFError(f"it has {reader.num_records()} records")
            self._readers[shard] = reader
        return self._readers[shard]

    def _complaint(self, shard: int, reason: str) -> str:
        file = self._folder / self._shards[shard]["file"]
        reason = " ".join(reason.split())[:200]
        return f"{file}: damaged ({reason}); {REMEDY}"


class PreparedExamples:
    """Like `formats.Examples`, but reads only what is needed from disk.

    Attributes:
      offsets, lengths, num_tokens, num_loss_tokens, fingerprint: as there.
    """

    def __init__(self, folder: epath.Path, manifest: Entry):
        """
        Args:
          folder: of a source, as `write_examples` and `finish_examples` made it.
          manifest: from `read_manifest`.

        Raises:
          InputError: the index is damaged.
        """
        small_files.check(manifest, _OF_EXAMPLES, str(folder / MANIFEST), REMEDY)
        self._folder, self._manifest = folder, manifest
        shards = manifest["shards"]
        self._records = Records(folder, shards)
        self._token_starts = np.cumsum([0, *(s["tokens"] for s in shards)])
        self.lengths = small_files.read_npy(folder / INDEX, "i", 1, REMEDY).astype(
            np.int64
        )
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        if self.offsets[-1] != self.num_tokens or (self.lengths < 0).any():
            raise InputError(
                f"{folder / INDEX}: has {self.offsets[-1]} tokens, the shards hold "
                f"{self.num_tokens}; {REMEDY}"
            )

    def __reduce__(self):
        return PreparedExamples, (self._folder, self._manifest)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def num_loss_tokens(self) -> int:
        return _num_loss_tokens(self._manifest["shards"])

    @property
    def fingerprint(self) -> str:
        return self._manifest["fingerprint"]

    @property
    def found(self) -> dict[str, dict[str, int]]:
        """The `tally.Tally.counts` of the source."""
        return self._manifest["found"]

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and loss mask of a range of all tokens.

        Raises:
          InputError: a shard is damaged.
        """
        tokens, masks, shards = [], [], self._manifest["shards"]
        while begin < end:
            shard = int(np.searchsorted(self._token_starts, begin, side="right")) - 1
            block, first = divmod(int(begin - self._token_starts[shard]), BLOCK_TOKENS)
            in_block = _decode(self._records[self._records.starts[shard] + block])
            last = min(first + int(end - begin), len(in_block[0]))
            if last <= first:
                raise InputError(
                    f"{self._folder / shards[shard]['file']}: block {block} has "
                    f"{len(in_block[0])} tokens, the manifest names more; {REMEDY}"
                )
            tokens.append(in_block[0][first:last])
            masks.append(in_block[1][first:last])
            begin += last - first
        if len(tokens) == 1:
            return tokens[0], masks[0]
        return (
            np.concatenate([np.empty(0, np.int32), *tokens]),
            np.concatenate([np.empty(0, bool), *masks]),
        )

    def load(self) -> Examples:
        """Loads all examples into memory."""
        tokens, mask = self.read(0, self.num_tokens)
        return Examples(tokens, mask, self.offsets)


def write_examples(
    folder: epath.Path, number: int, examples: Examples, facts: Entry
) -> Entry:
    """Writes a shard of examples, with their lengths as its last record."""
    starts = range(0, examples.num_tokens, BLOCK_TOKENS)
    blocks = (_encode(*examples.read(s, s + BLOCK_TOKENS)) for s in starts)
    lengths = examples.lengths.astype("<i4").tobytes()
    facts = facts | {
        "examples": len(examples),
        "tokens": examples.num_tokens,
        "loss_tokens": examples.num_loss_tokens,
    }
    return write_shard(folder, number, itertools.chain(blocks, [lengths]), facts)


def finish_examples(
    folder: epath.Path,
    key: Entry,
    shards: list[Entry],
    found: dict[str, dict[str, int]],
) -> PreparedExamples:
    """Writes the index and the manifest of a source whose shards are complete."""
    digest = hashlib.blake2b(digest_size=8)
    records = Records(folder, shards)
    lengths = [np.empty(0, np.int32)]
    for first, end in itertools.pairwise(records.starts.tolist()):
        for number in range(first, end - 1):
            digest.update(_decode(records[number])[0])
        lengths.append(np.frombuffer(records[end - 1], "<i4"))
    index = io.BytesIO()
    np.save(index, np.concatenate(lengths))
    paths.replace(folder / INDEX, index.getvalue())
    write_manifest(
        folder,
        key,
        shards,
        {
            "examples": sum(shard["examples"] for shard in shards),
            "tokens": sum(shard["tokens"] for shard in shards),
            "loss_tokens": _num_loss_tokens(shards),
            "found": found,
            "fingerprint": digest.hexdigest(),
            "index": paths.hash_of(folder / INDEX),
        },
    )
    return PreparedExamples(folder, read_manifest(folder))


def _num_loss_tokens(shards: list[Entry]) -> int:
    # Folders of earlier versions call them "learnt_tokens".
    return sum(s.get("loss_tokens", s.get("learnt_tokens", 0)) for s in shards)


def _encode(tokens: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """A block: its tokens, little-endian int32, then its mask, one bit per token."""
    return tokens.astype("<i4").tobytes() + np.packbits(loss_mask).tobytes()


def _decode(record: bytes) -> tuple[np.ndarray, np.ndarray]:
    # n tokens take 4 n + ceil(n / 8) bytes.
    size = len(record) * 8 // 33
    tokens = np.frombuffer(record, "<i4", size)
    bits = np.frombuffer(record, np.uint8, offset=4 * size)
    return tokens, np.unpackbits(bits, count=size).astype(bool)
