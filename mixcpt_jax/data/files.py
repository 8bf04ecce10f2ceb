"""Finds the files that the path of a source names, and the reader of each.

A path that exists literally is that file or folder, whatever its name; otherwise it is a
list or a glob. A folder is searched recursively, and the suffix of each file determines its
reader. Hidden files, dataset cards and splits other than the requested one are skipped. The
log names what is skipped.
"""

import collections
import dataclasses
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import hub, readers

READERS = (*readers.TEXTS, *readers.RECORDS)
ALL = hub.ALL

_WILDCARD = re.compile(r"[*?\[]")
# A word of a file or folder name, separated by these characters, can name its split, as on
# the Hugging Face Hub.
_BETWEEN_WORDS = re.compile(r"[-._ 0-9]")
_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
    "holdout": "test",
    "heldout": "test",
}
# In a dataset's `data` folder, shard names may name any split.
_SHARD_OF_SPLIT = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_CARD_KEYS = re.compile(
    r"^(?:annotations_creators|configs|dataset_info|language|license|pretty_name|"
    r"size_categories|source_datasets|task_categories|task_ids):",
    re.MULTILINE,
)
_CARD_BYTES = 1 << 16
# Text files that describe the others, in any language: README.md, README_zh.md,
# LICENSE.txt.
_ABOUT_OTHERS = re.compile(
    r"(readme|licen[cs]e|notice|copying|changelog|contributing|citation|authors|"
    r"code_of_conduct|security|requirements)([-_.][a-z]{2,7}([-_][a-z]{2,4})?)?\.\w+$",
    re.IGNORECASE,
)


# Kinds of files that hold no text, by their suffixes.
_OTHER_KINDS = {
    "archive": ("zip", "tar", "tgz", "gz", "bz2", "xz", "zst", "7z", "rar", "jar", "whl"),
    "media": (
        "png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "tif", "tiff", "ico", "mp3",
        "mp4", "wav", "ogg", "avi", "mov", "mkv", "ttf", "woff", "woff2",
    ),
    "office": ("doc", "xls", "xlsx", "ppt", "pptx", "odt", "ods", "odp", "rtf", "epub"),
    "program": ("exe", "dll", "so", "bin", "o", "a", "class", "pyc", "pkl", "pt", "npy"),
}  # fmt: skip


class Part(NamedTuple):
    """A file, or the folder of a TFDS dataset and its split."""

    path: epath.Path
    reader: str
    split: str = ""


# Messages about a path; each is followed by names.
_OTHER_SPLITS = "other splits are not read"
_SOLE_SPLIT = "there is only the split"
_NAMED_SPLITS = "files of several splits are read, as they are named"
_TWINS = "files with the name of another in another format are read too"
_CARDS = "dataset cards, licences and their like are not read"
_BESIDE = "text files of no split are not read"
_HIDDEN = "hidden files or folders are not read"
_AGAIN = "files or folders that are found twice are read once"
_MOST_NAMES = 8


@dataclasses.dataclass
class Found:
    """What a path names.

    Attributes:
      parts: what is read, in order.
      passed_over: files without a reader.
      notes: message -> what it is about.
    """

    parts: list[Part] = dataclasses.field(default_factory=list)
    passed_over: list[epath.Path] = dataclasses.field(default_factory=list)
    notes: dict[str, list[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(list)
    )

    def by_reader(self) -> dict[str, int]:
        """Reader -> number of files or data sets that it reads."""
        return dict(collections.Counter(part.reader for part in self.parts))

    def not_read(self) -> dict[str, list[str]]:
        """Reason -> the files below the path that are not read for it."""
        found = collections.defaultdict(list)
        for file in self.passed_over:
            ending = readers.suffix(file.name).rpartition(".")[2]
            kind = next((k for k, names in _OTHER_KINDS.items() if ending in names), "")
            found[kind or "no_reader"].append(str(file))
        for reason, note in (("hidden", _HIDDEN), ("about_the_data", _CARDS)):
            if names := self.notes.get(note):
                found[reason] += names
        return dict(found)

    def warn(self, path: str) -> None:
        """Logs the notes and the skipped files of the path."""
        if lines := self._lines():
            logging.warning("%s: %s", path, "; ".join(lines))

    def _lines(self) -> list[str]:
        lines = []
        if self.passed_over:
            lines.append(
                f"passed over {len(self.passed_over)} files that no reader goes with "
                f"({suffixes(self.passed_over)}), such as {self.passed_over[0]}"
            )
        for message, names in self.notes.items():
            if not names:
                continue
            names = list(dict.fromkeys(names))
            more = len(names) - _MOST_NAMES
            shown = ", ".join(names[:_MOST_NAMES]) + (f", {more} more" * (more > 0))
            lines.append(f"{message}: {shown}")
        return lines


def find(path: str, reader: str, split: str) -> Found:
    """Finds what a path setting names; see `sources.read` for the arguments.

    Raises:
      InputError: the reader or the split is unknown, nothing is found, or the path has
        several splits and `split` names none of them.
    """
    if reader and reader not in READERS:
        raise InputError(
            f"{path}: unknown reader {reader!r}; use one of {', '.join(READERS)}"
        )
    search = _Search(reader, split)
    for piece in _pieces(path):
        search.add(piece)
    if not search.found.parts:
        raise InputError("the path of a source is empty; name a file")
    if split and not any(part.split for part in search.found.parts):
        raise InputError(
            f"{path}: split={split!r}, but nothing there has splits; leave it empty"
        )
    if reader:  # other files of a folder are not requested
        search.found.passed_over.clear()
    return search.found


def suffixes(files: list[epath.Path]) -> str:
    """The number of files per suffix, as text."""
    counts = collections.Counter(readers.suffix(f.name) or "no suffix" for f in files)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(8))


def _pieces(path: str) -> Iterator[str]:
    """The paths in a list; a local name with commas is one path if it exists."""
    if hub.SCHEME in path:
        yield from filter(None, map(str.strip, path.split(",")))
        return
    if _exists(path):
        yield path
        return
    names = path.split(",")
    while names:
        joined = (",".join(names[:size]) for size in range(1, len(names) + 1))
        piece = next(filter(_exists, joined), names[0])
        names = names[piece.count(",") + 1 :]
        if piece.strip():
            yield piece if paths.resolve(piece).exists() else piece.strip()


def _exists(piece: str) -> bool:
    return any(text and paths.resolve(text).exists() for text in (piece, piece.strip()))


class _Entry(NamedTuple):
    """A file below a folder.

    Attributes:
      path: of the file.
      folders: names of the folders between.
      reader: of its suffix, '' if it has none.
    """

    path: epath.Path
    folders: tuple[str, ...]
    reader: str


class _Search:
    """One search; it finds every file and folder once."""

    def __init__(self, reader: str, split: str):
        self.found = Found()
        self._reader, self._split = reader, split
        self._seen: set[str] = set()

    def add(self, piece: str) -> None:
        """Adds what one path in the list names."""
        found = self.found
        first, num_hidden = len(found.passed_over), len(found.notes[_HIDDEN])
        is_read, named = False, []
        for path in _matches(piece):
            if path.is_dir():
                is_read |= not self._is_new(path) or self._add_folder(path)
            elif not _is_regular(path):
                raise InputError(f"{path}: is no regular file; copy it into one")
            elif known := self._reader or _reader_of(path) or _reader_if_named(path):
                self._add_part(Part(path, known))
                named.append(_Entry(path, (), known))
                is_read = True
            else:
                found.passed_over.append(path)
        counts = collections.Counter(filter(None, _splits(named).values()))
        if len(counts) > 1:
            found.notes[_NAMED_SPLITS] += _counted(counts)
        if not is_read:
            passed = found.passed_over[first:]
            raise InputError(_nothing(piece, self._reader, passed, found, num_hidden))

    def _is_new(self, path: epath.Path) -> bool:
        real = str(path) if paths.is_remote(path) else os.path.realpath(path)
        if real in self._seen:
            self.found.notes[_AGAIN].append(str(path))
            return False
        self._seen.add(real)
        return True

    def _add_part(self, part: Part) -> None:
        # The folder of a TFDS dataset was already found.
        if part.reader == "tfds" or self._is_new(part.path):
            self.found.parts.append(part)

    def _add_folder(self, root: epath.Path) -> bool:
        """Adds the parts of a folder; returns whether there are any."""
        entries = list(self._below(root, ()))
        below = [entry for entry in entries if isinstance(entry, _Entry)]
        kept = self._of_split(root, [e for e in below if not self._is_card(e, below)])
        self._find_twins(kept)
        parts = [
            Part(entry.path, entry.reader, kept[entry.path])
            if isinstance(entry, _Entry)
            else entry
            for entry in entries
            if isinstance(entry, Part) or entry.path in kept
        ]
        for part in parts:
            self._add_part(part)
        return bool(parts)

    def _below(
        self, folder: epath.Path, folders: tuple[str, ...]
    ) -> Iterator[_Entry | Part]:
        """The files below a folder and the parts of datasets in it, by name."""
        # `Path.walk` drops the `gs://` of its folders.
        try:
            children = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be listed ({error.strerror}); change its permissions, "
                "or name other folders"
            ) from error
        names = {child.name for child in children}
        reader = self._reader
        if reader in ("", "arrow") and "dataset_dict.json" in names:
            marker = folder / "dataset_dict.json"
            splits = _load(marker, {"splits": [str]})["splits"]
            split = self._choose(folder, splits)
            if split not in splits:
                raise InputError(
                    f"{folder}: split={split!r}; of these only one can be named"
                )
            yield from _shards(paths.child(folder, split, f"{marker}: splits"), split)
        elif reader in ("", "arrow") and {"state.json", "dataset_info.json"} <= names:
            yield from _shards(folder)
        elif reader in ("", "tfds") and {"features.json", "dataset_info.json"} <= names:
            yield Part(folder, "tfds", self._choose(folder, _tfds_splits(folder)))
        else:
            for child in children:
                if child.name.startswith((".", "__")):
                    self.found.notes[_HIDDEN].append(str(child))
                elif child.is_dir():
                    if self._is_new(child):
                        yield from self._below(child, (*folders, child.name))
                else:
                    known = _reader_of(child) if _is_regular(child) else ""
                    if not known or reader not in ("", known):
                        self.found.passed_over.append(child)
                        known = ""
                    yield _Entry(child, folders, known)

    def _is_card(self, entry: _Entry, files: list[_Entry]) -> bool:
        """Whether a text is a dataset card: by its header or the data beside it."""
        if entry.reader != "text" or not _ABOUT_OTHERS.match(entry.path.name):
            return False
        depth = len(entry.folders)
        is_card = any(
            other.folders[:depth] == entry.folders
            and readers.suffix(other.path.name) in readers.READER_OF_SUFFIX
            and readers.suffix(other.path.name) != ".md"
            and not _ABOUT_OTHERS.match(other.path.name)
            for other in files
        ) or _has_card_header(entry.path)
        if is_card:
            self.found.notes[_CARDS].append(str(entry.path))
        return is_card

    def _find_twins(self, files: Iterable[epath.Path]) -> None:
        seen = set()
        for file in files:
            stem = file.parent / file.name.removesuffix(readers.suffix(file.name))
            if stem in seen:
                self.found.notes[_TWINS].append(str(file))
            seen.add(stem)

    def _of_split(self, root: epath.Path, files: list[_Entry]) -> dict[epath.Path, str]:
        """Files of the requested split -> the split, '' if the files name none."""
        files = [entry for entry in files if entry.reader]
        split_of = _splits(files)
        counts = collections.Counter(filter(None, split_of.values()))
        if not counts:
            split = self._split if self._split in ("train", ALL) else ""
            return dict.fromkeys(split_of, split)
        if self._split == ALL:
            return {path: split or ALL for path, split in split_of.items()}
        unnamed = [entry for entry in files if not split_of[entry.path]]
        texts = readers.TEXTS
        if any(split_of[e.path] and e.reader not in texts for e in files):
            beside = [entry.path for entry in unnamed if entry.reader in texts]
            self._note(_BESIDE, beside)
            unnamed = [entry for entry in unnamed if entry.reader not in texts]
            for path in beside:
                del split_of[path]
        if set(counts) == {"train"} and not self._split:
            return dict.fromkeys(split_of, "")
        wanted = {_canonical(name) for name in self._split.split("+") if name}
        if not wanted and not unnamed and (len(counts) == 1 or "train" in counts):
            wanted = {"train"} if "train" in counts else set(counts)
            self._note(_SOLE_SPLIT, wanted - {"train"})
        if not wanted or not wanted <= counts.keys():
            raise InputError(_unclear(root, counts, unnamed, self._split))
        others = {name: n for name, n in counts.items() if name not in wanted}
        self._note(_OTHER_SPLITS, _counted(others))
        return {path: split for path, split in split_of.items() if split in wanted}

    def _note(self, message: str, names: Iterable[Any]) -> None:
        self.found.notes[message] += map(str, names)

    def _choose(self, folder: epath.Path, splits: list[str]) -> str:
        """The requested split of a dataset that declares its splits."""
        if not self._split and (len(splits) == 1 or "train" in splits):
            split = "train" if "train" in splits else splits[0]
            self._note(_OTHER_SPLITS, [other for other in splits if other != split])
            self._note(_SOLE_SPLIT, {split} - {"train"})
            return split
        # 'train[:50%]+test' names two.
        named = [part.partition("[")[0].strip() for part in self._split.split("+")]
        if not set(named) <= {*splits, ALL}:
            raise InputError(
                f"{folder}: has the splits {', '.join(splits)}; set the source's `split` "
                f"to one of them{f', not {self._split!r}' if self._split else ''}"
            )
        return self._split


def _counted(splits: Mapping[str, int]) -> list[str]:
    return [f"{name} ({n} files)" for name, n in sorted(splits.items())]


def _splits(files: list[_Entry]) -> dict[epath.Path, str]:
    """File -> the split that its name or a folder above it names, or ''."""
    shards = {
        entry.path: found[1]
        for entry in files
        if entry.folders[-1:] == ("data",)
        and (found := _SHARD_OF_SPLIT.match(entry.path.name))
    }
    if not any(map(_named, shards.values())):
        shards = {}
    by_name = {
        entry.path: ""
        if readers.suffix(entry.path.name) == ".md"
        else _named(entry.path.name)
        for entry in files
    }
    # A text file may be called "test" by chance; it is a split only beside one called
    # "train".
    texts = [entry.path for entry in files if entry.reader in readers.TEXTS]
    if not any(by_name[path] == "train" for path in texts):
        by_name |= dict.fromkeys(texts, "")
    return {
        path: _canonical(shards[path])
        if path in shards
        else next(filter(None, map(_named, folders)), by_name[path])
        for path, folders, _ in files
    }


def _named(name: str) -> str:
    """The split that the words of a name name; '' if none or several."""
    words = _BETWEEN_WORDS.split(name.casefold())
    found = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    return found.pop() if len(found) == 1 else ""


def _canonical(split: str) -> str:
    return _SPLIT_OF_WORD.get(split.strip().casefold(), split.strip())


def _unclear(
    root: epath.Path, counts: dict[str, int], unnamed: list[_Entry], split: str
) -> str:
    found = ", ".join(_counted(counts))
    others = ""
    if unnamed:
        others = f" and {len(unnamed)} files of none, such as {unnamed[0].path.name}"
    return (
        f"{root}: has the splits {found}{others}; set the source's `split` to one of "
        f"them, or to {ALL!r}{f', not {split!r}' if split else ''}"
    )


def _has_card_header(file: epath.Path) -> bool:
    try:
        with file.open("rb") as content:
            begin = content.read(_CARD_BYTES).decode("utf-8-sig", "replace")
    except OSError:  # reading it will say so
        return False
    if not re.match(r"---\r?\n", begin):
        return False
    header = re.split(r"^---\s*$", begin, maxsplit=2, flags=re.MULTILINE)[1]
    return bool(_CARD_KEYS.search(header))


def _matches(piece: str) -> Iterator[epath.Path]:
    """The file or folder of a path, or what a glob matches."""
    resolved = hub.resolve(piece)
    if resolved.exists():
        yield resolved
        return
    if not _WILDCARD.search(str(resolved)):
        return
    # The folder to look in: the longest prefix of the path that exists.
    root = resolved
    while not root.exists() and root != root.parent:
        root = root.parent
    pattern = str(resolved)[0 if str(root) == "." else len(str(root)) :].lstrip("/")
    if "**" in pattern and not isinstance(root, hub.HubPath):
        raise InputError(f"{piece}: ** is not supported; name the folder instead")
    yield from sorted(root.glob(pattern))


def _is_regular(path: epath.Path) -> bool:
    """Whether a file can be read twice; reading reports a dangling link."""
    if paths.is_remote(path):
        return True
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def _reader_if_named(file: epath.Path) -> str:
    """The reader of files that in a folder rather describe the data."""
    return "json" if readers.suffix(file.name) == ".json" else ""


def _reader_of(file: epath.Path) -> str:
    return readers.READER_OF_SUFFIX.get(readers.suffix(file.name), "")


def _nothing(
    piece: str,
    reader: str,
    passed_over: list[epath.Path],
    found: Found,
    num_hidden: int,
) -> str:
    is_folder = hub.resolve(piece).is_dir()
    if not passed_over and (
        found.notes[_CARDS] or len(found.notes[_HIDDEN]) > num_hidden
    ):
        return (
            f"{piece}: nothing is there but hidden files and dataset cards; put the "
            "texts there, or name such a file itself"
        )
    if not passed_over and is_folder:
        return f"{piece}: is an empty folder; put the texts there, or name another path"
    if not passed_over:
        remedy = "check the path"
        if hub.is_model_id(piece):
            remedy += f", or name a data set of the Hub, hf://datasets/{piece}"
        return f"{piece}: no file matches; {remedy}"
    known = [s for s, r in readers.READER_OF_SUFFIX.items() if reader in ("", r)]
    return (
        f"{piece}: {f'reader {reader!r}' if reader else 'no reader'} goes with what is "
        f"there ({suffixes(passed_over)}); known are {', '.join(known)} and the folders "
        "of TFDS and save_to_disk; name other files one by one and their `reader`"
    )


def _shards(folder: epath.Path, split: str = "") -> Iterator[Part]:
    file = folder / "state.json"
    for shard in _load(file, {"_data_files": [{"filename": str}]})["_data_files"]:
        place = f"{file}: filename"
        yield Part(paths.child(folder, shard["filename"], place), "arrow", split)


def _tfds_splits(folder: epath.Path) -> list[str]:
    file = folder / "dataset_info.json"
    content = _load(file, {"fileFormat?": str, "splits": [{"name": str}]})
    file_format = content.get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise InputError(
            f"{folder}: a TFDS dataset as {file_format}; build it with "
            "file_format='array_record', which is read without TensorFlow"
        )
    splits = [split["name"] for split in content["splits"]]
    for name in splits:
        paths.child(folder, name, f"{file}: name of a split")
    return splits


def _load(file: epath.Path, shape: small_files.Shape) -> Any:
    """A JSON file of a saved dataset."""
    return small_files.read_json(file, shape, "save the dataset again", is_ours=False)
