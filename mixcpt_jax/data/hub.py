"""Models and data sets of the Hugging Face Hub, by name.

`hf://ORG/NAME` is a model, `hf://datasets/ORG/NAME` a data set. A revision (`@main`, a tag
or a commit) and a path in the repository may follow. Where a model is expected, `ORG/NAME`
is enough, unless a local file or folder has this name.

The library `huggingface_hub` downloads each file once into its cache, under locks that
processes share, and reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. A process
resolves a revision to a commit once; a run records its commits and keeps them.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import functools
import glob
import io
import logging
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import ml_collections
from etils import epath
from etils.epath import gpath, stat_utils

from mixcpt_jax import __version__
from mixcpt_jax.core import paths, system
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

SCHEME = "hf://"
# Stands for the files of all splits.
ALL = "all"
# The keys of a config whose values may be `ORG/NAME`.
_OF_MODELS = tuple(
    (section, key) for section in ("model", "teacher") for key in ("path", "tokenizer")
)
# What is read of a model besides its weights.
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "licen[cs]e*",
    "notice*",
    "copying*",
    "use_policy*",
)
# Not in the folders `models`, `datasets` or `spaces`: the Hub's addresses begin so.
_ID = re.compile(
    r"(?!(?:models|datasets|spaces)/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?",
    re.ASCII,
)
_LOCAL_FILES = (".gguf", ".json", ".jinja", ".model")
# An address on the Hub, alone or in a list of paths.
_ADDRESS = re.compile(rf"(?:^|(?<=,)|(?<=, )){SCHEME}[^,]+")
_MOST_NAMES = 8
_SECONDS_BETWEEN_REPORTS = 10


def is_model_id(path: str) -> bool:
    """Whether the path of a model is `ORG/NAME[@REVISION]`, and no local file or folder."""
    return (
        _ID.fullmatch(path) is not None
        and not path.endswith(_LOCAL_FILES)
        and not paths.exists(path)
    )


def local_model(path: str, *names: str) -> str:
    """The local path of a model; downloads what is missing there.

    Args:
      path: of a model, as a user writes it.
      names: files of the model's folder that are needed besides its config and tokenizer,
        such as its weights.

    Returns:
      A file or folder in the library's cache; a path that is not on the Hub, unchanged.

    Raises:
      InputError: the Hub has no such repository, revision or file, refuses access, or
        cannot be reached and the cache does not hold the files.
    """
    address = _Address.of_model(path)
    if address is None:
        return path
    files = address.files()
    folder = address.path
    if folder in files:
        folder, _, name = folder.rpartition("/")
        names = (*names, name)
    prefix = f"{folder}/" if folder else ""
    here = {name.removeprefix(prefix) for name in files if name.startswith(prefix)}
    if missing := set(names) - here or (not here and {folder}):
        raise InputError(
            f"{path}: the repository has no {', '.join(sorted(missing))} (it has "
            f"{_shown(here or files)}); name another one, or another revision"
        )
    read = [
        name
        for name in here
        if name in names or any(fnmatch.fnmatch(name.lower(), p) for p in _MODEL_FILES)
    ]
    return str(address.download([prefix + name for name in read]))


def card_of_model(path: str) -> dict[str, Any]:
    """The header of a model's card on the Hub; empty if it has none."""
    address = _Address.of_model(path)
    return _card(dataclasses.replace(address, path="")) if address else {}


def name_of_model(path: str) -> str:
    """The ORG/NAME of a model on the Hub; empty for any other path."""
    address = _Address.of_model(path)
    return address.repository if address else ""


def push(folder: epath.Path, name: str, private: bool) -> str:
    """Pushes a folder as one commit of a model, which is made if there is none.

    Args:
      folder: on a local disk or in a bucket; without folders in it.
      name: ORG/NAME.
      private: whether a new model is shown to its owner alone.

    Returns:
      The address of the model, at the new commit.

    Raises:
      InputError: the Hub refuses it or cannot be reached.
    """
    address = _Address("model", name, None, "", f"export.hub_id={name}")
    with tempfile.TemporaryDirectory(prefix="mixcpt-push-") as local:
        if paths.is_remote(folder):
            for file in folder.iterdir():
                paths.copy_file(file, epath.Path(local) / file.name)
        else:
            local = str(folder)
        terminal.say(f"{folder}: is pushed to {name}")
        with address._explained():
            _api().create_repo(name, private=private, exist_ok=True)
            done = _api().upload_folder(
                repo_id=name, folder_path=local, commit_message="Export of mixcpt_jax"
            )
    return str(address.at(done.oid))


def commits(
    config: ml_collections.ConfigDict, recorded: Mapping[str, str]
) -> dict[str, str]:
    """The repositories that a config names, such as `hf://ORG/NAME@main` -> commit.

    Args:
      config: any.
      recorded: commits that are kept; all others are those of the Hub now.

    Raises:
      InputError: see `local_model`.
    """
    found = {}

    def note(address: _Address) -> str:
        found[address.root] = recorded.get(address.root) or address.commit
        return ""

    _map_addresses(config, note)
    return found


def pin(
    config: ml_collections.ConfigDict, commits: Mapping[str, str]
) -> ml_collections.ConfigDict:
    """The config with the commit in each address on the Hub.

    Args:
      config: any.
      commits: see `commits`.
    """
    pinned = _map_addresses(config, lambda found: str(found.at(commits[found.root])))
    measured = pinned.get("eval", {})  # a stored config may be of another version
    sections = {"sources": pinned.get("sources", {})}
    sections |= {f"eval.{k}": measured.get(k, {}) for k in ("texts", "pairs")}
    for section, entries in sections.items():
        for name, entry in entries.items():
            _choose_files(entry, f"{section}.{name}")
    return pinned


def pin_now(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """`pin`, with the commits of the Hub now.

    Raises:
      InputError: see `local_model`.
    """
    return pin(config, commits(config, {}))


def resolve(path: str) -> epath.Path:
    """Turns a path of a source into a path object, see `paths.resolve`.

    Raises:
      InputError: see `local_model` and `paths.resolve`.
    """
    address = _Address.parse(path)
    if address is None:
        return paths.resolve(path)
    return HubPath(str(address.at(address.commit)))


class HubPath(gpath.PosixGPath):
    """A file or folder of a repository on the Hub, at a commit.

    Its names come from the list of the repository's files. A file is downloaded when it is
    opened, so a source is read while its later files are still on the Hub.
    """

    @property
    def _address(self) -> "_Address":
        return _Address.parse(str(self))

    @property
    def _file(self) -> Any:
        return self._address.files().get(self._address.path)

    @property
    def digest(self) -> str:
        """16 hex digits that identify a file's content, as the Hub gives them."""
        return self._file.blob_id[:16]

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self._file is not None

    def is_dir(self) -> bool:
        return self._address.path in self._address.folders()

    def _below(self) -> Iterator[str]:
        """The names of all files below, relative to this folder."""
        address = self._address
        prefix = f"{address.path}/" if address.path else ""
        for name in address.files():
            if name.startswith(prefix):
                yield name.removeprefix(prefix)

    def iterdir(self) -> Iterator["HubPath"]:
        """The files and folders in a folder, without hidden ones."""
        for name in self._address.folders()[self._address.path]:
            if not name.startswith("."):
                yield self / name

    def glob(self, pattern: str) -> Iterator["HubPath"]:
        """The files below that match a pattern, in which ** is any number of folders."""
        for name in self._below():
            if _is_match(name.split("/"), pattern.split("/")):
                yield self / name

    def stat(self) -> stat_utils.StatResult:
        size = self._file.size if self.is_file() else 0
        return stat_utils.StatResult(not self.is_file(), size, mtime=0)

    def open(self, mode: str = "r", **options: Any) -> IO[Any]:
        return open(self._address.download([self._address.path]), mode, **options)


def _is_match(names: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_is_match(names[i:], patterns[1:]) for i in range(len(names) + 1))
    is_first = bool(names) and fnmatch.fnmatchcase(names[0], patterns[0])
    return is_first and _is_match(names[1:], patterns[1:])


def _choose_files(entry: ml_collections.ConfigDict, place: str) -> None:
    """Puts the files of a source's subset and split into its path.

    `data_files` names them; without it, the card of the data set does, or a folder that has
    the name of the subset. Otherwise the names of files tell the split, see `files.find`.
    """
    address = None if "," in entry.path else _Address.parse(entry.path)
    if address is None:
        return
    # Stored configs may be older than these two keys.
    subset, globs = entry.get("subset", ""), entry.get("data_files", "").split(",")
    subsets = {} if address.path or globs != [""] else _subsets(address)
    if subsets:
        splits = _choose(subsets, subset, "default", f"{place}.subset")
        whole = [glob for globs in splits.values() for glob in globs]
        globs = _choose(splits, entry.split, "train", f"{place}.split", {ALL: whole})
        entry.split = ""
    elif subset and globs == [""]:
        globs = [subset]
        if not HubPath(str(address.below(subset))).exists():
            raise InputError(
                f"{place}.subset={subset!r}: {address} has no such subset or folder, only "
                f"{_shown(f.name for f in HubPath(str(address)).iterdir())}; leave it "
                f"empty, or name files by {place}.data_files"
            )
    entry.path = ",".join(str(address.below(glob.strip())) for glob in globs)
    entry.subset = entry.data_files = ""


def _choose(
    options: dict[str, Any], wanted: str, usual: str, place: str, more: Any = None
) -> Any:
    """The option of that name; without a name, the usual one or the only one."""
    name = wanted or (usual if usual in options else "")
    if not name and len(options) == 1:
        (name,) = options
    options = options | (more or {})
    if name not in options:
        raise InputError(f"{place}={wanted!r}: must be one of {_shown(options)}")
    return options[name]


def _subsets(address: "_Address") -> dict[str, dict[str, list[str]]]:
    """Subset -> split -> globs, as the card of a data set says; empty: it says nothing."""
    try:
        configs = _card(address)["configs"]
        return {str(c["config_name"]): _splits(c["data_files"]) for c in configs}
    except (KeyError, TypeError, ValueError):  # a card may hold anything
        return {}


def _card(address: "_Address") -> dict[str, Any]:
    """The header of a repository's card; empty if it has none."""
    if "README.md" not in address.files():
        return {}
    file = address.below("README.md").download(["README.md"])
    try:
        return dict(_library().metadata_load(file) or {})
    except Exception:  # a card may hold anything
        return {}


def _splits(data_files: Any) -> dict[str, list[str]]:
    """Split -> globs, from the forms that cards have."""
    match data_files:
        case [{"split": _}, *_]:
            pairs = [(entry["split"], entry["path"]) for entry in data_files]
        case dict():
            pairs = data_files.items()
        case _:
            pairs = [("train", data_files)]
    return {
        str(split): [globs] if isinstance(globs, str) else list(map(str, globs))
        for split, globs in pairs
    }


def _map_addresses(config, change) -> ml_collections.ConfigDict:
    """A config with `change(address)` in place of each address."""

    def mapped(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {k: mapped(entry, (*keys, k)) for k, entry in value.items()}
        if not isinstance(value, str):
            return value
        if keys in _OF_MODELS and is_model_id(value):
            return change(_Address.of_model(value))
        return _ADDRESS.sub(lambda found: change(_Address.parse(found[0])), value)

    return ml_collections.ConfigDict(mapped(config.to_dict(), ()))


@dataclasses.dataclass(frozen=True)
class _Address:
    """A file or folder on the Hub.

    Attributes:
      kind: "model" or "dataset".
      repository: `ORG/NAME`.
      revision: a branch, a tag or a commit; None: the main branch.
      path: in the repository; empty: all of it.
      place: the address as the user wrote it; error messages begin with it.
    """

    kind: str
    repository: str
    revision: str | None
    path: str
    place: str

    @classmethod
    def parse(cls, path: str, place: str = "") -> "_Address | None":
        """The address that a path is; None if it does not begin with the scheme."""
        if not path.startswith(SCHEME):
            return None
        library = _library()
        try:
            uri = library.parse_hf_uri(path)
            problem = (
                "" if uri.type in ("model", "dataset") else f"it names a {uri.type}"
            )
        except library.errors.HfUriError as error:
            problem = " ".join(error.msg.split()).rstrip(".")
        if problem:
            raise InputError(
                f"{place or path}: names no model or data set on the Hub ({problem}); "
                "write hf://ORG/NAME or hf://datasets/ORG/NAME, then @REVISION or /PATH"
            )
        return cls(uri.type, uri.id, uri.revision, uri.path_in_repo, place or path)

    @classmethod
    def of_model(cls, path: str) -> "_Address | None":
        """The address that the path of a model is, which may be `ORG/NAME`, or None."""
        return cls.parse(SCHEME + path if is_model_id(path) else path, path)

    @property
    def root(self) -> str:
        """The address of the whole repository."""
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{kind}{self.repository}{revision}"

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    def at(self, commit: str) -> "_Address":
        """The same place at a commit."""
        return dataclasses.replace(self, revision=commit)

    def below(self, name: str) -> "_Address":
        """A file or folder in this folder."""
        path = f"{self.path}/{name}".strip("/")
        return dataclasses.replace(self, path=path)

    @property
    def commit(self) -> str:
        """The commit of the revision, resolved once per process."""
        with self._explained():
            return _commit(self.kind, self.repository, self.revision)

    def files(self) -> Mapping[str, Any]:
        """The files of the whole repository by name, with their sizes."""
        commit = self.commit
        with self._explained():
            return _files(self.kind, self.repository, commit)

    def folders(self) -> Mapping[str, set[str]]:
        """The folders of the whole repository by name, with the names of what they hold."""
        self.files()  # explains errors
        return _folders(self.kind, self.repository, self.commit)

    def download(self, names: Sequence[str]) -> pathlib.Path:
        """The local path; the files with these names in the repository lie below it."""
        library, files, commit = _library(), self.files(), self.commit
        place = {"repo_type": self.kind, "revision": commit}
        missing = [
            name
            for name in names
            if not isinstance(
                library.try_to_load_from_cache(self.repository, name, **place), str
            )
        ]
        if missing:
            size = sum(files[name].size for name in missing)
            terminal.say(
                f"{self.place}: downloads {len(missing)} file{'s' * (len(missing) > 1)} of "
                f"commit {commit[:12]}, {size / 2**20:,.1f} MiB"
            )
        with self._explained():
            folder = _api().snapshot_download(
                self.repository,
                **place,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=_progress(),
            )
        return pathlib.Path(folder) / self.path

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what the library raises into one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            # An upload wraps its errors.
            for found in (error, error.__cause__):
                if isinstance(found, Exception) and (told := self._error(found)):
                    raise told from error
            raise

    def _error(self, error: Exception) -> InputError | None:
        """What the library raised, as a user error; None if it is none."""
        library = _library()
        errors, constants = library.errors, library.constants
        name = self.root.partition("@")[0].removeprefix(SCHEME)
        page = f"{constants.ENDPOINT}/{name}"
        is_bare = _ID.fullmatch(self.place) is not None
        absent = " there is no such file or folder, and" if is_bare else ""
        unread = (
            errors.RevisionResolutionError,
            errors.LocalEntryNotFoundError,
            errors.CachedRepoTreeNotFoundError,
            errors.OfflineModeIsEnabled,
        )
        match error:
            case errors.GatedRepoError():
                return InputError(
                    f"{self.place}: access is restricted; accept the terms at {page} and "
                    "set HF_TOKEN to a token of your account"
                )
            case errors.RepositoryNotFoundError():
                return InputError(
                    f"{self.place}:{absent} the Hub shows no such {self._what} (looked for "
                    f"{page}); check the name, or set HF_TOKEN if it is private"
                )
            case errors.RevisionNotFoundError():
                return InputError(
                    f"{self.place}: the {self._what} has no revision {self.revision!r}; "
                    f"name a branch, a tag or a commit of {page}"
                )
            case _ if constants.HF_HUB_OFFLINE and isinstance(error, unread):
                return InputError(
                    f"{self.place}:{absent} HF_HUB_OFFLINE is set and the cache of the "
                    f"Hub, {constants.HF_HUB_CACHE}, does not hold all of its files; unset "
                    "it to download them"
                )
            case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
                return InputError(
                    f"{self.place}:{absent} the Hub refuses access to {page}; set HF_TOKEN "
                    "to a token that may have it"
                )
            case errors.HfHubHTTPError():
                return InputError(
                    f"{self.place}:{absent} {constants.ENDPOINT} answers with HTTP status "
                    f"{error.response.status_code}; run the same command again later"
                )
            case _ if isinstance(error, unread) or _is_of_network(error):
                return InputError(
                    f"{self.place}:{absent} the Hub cannot be reached at "
                    f"{constants.ENDPOINT} ({_first_line(error)}); check the network and "
                    "HF_ENDPOINT, then run the same command again, which keeps all files "
                    "that are complete"
                )
        problem = system.problem(error)
        return InputError(f"{self.place}: {problem}") if problem else None

    @property
    def _what(self) -> str:
        return "data set" if self.kind == "dataset" else "model"


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"[:200]


@functools.cache
def _library() -> Any:
    """The package huggingface_hub, set to log as other packages do."""
    # This takes a fifth of a second, and few runs need it.
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils

    logger = logging.getLogger("huggingface_hub")
    logger.handlers.clear()
    logger.propagate = True
    huggingface_hub.utils.disable_progress_bars()  # `_progress` shows ours
    return huggingface_hub


def _api() -> Any:
    return _library().HfApi(library_name="mixcpt_jax", library_version=__version__)


@functools.cache
def _commit(kind: str, repository: str, revision: str | None) -> str:
    return (
        _api().resolve_revision(repository, repo_type=kind, revision=revision).resolved
    )


@functools.cache
def _files(kind: str, repository: str, commit: str) -> Mapping[str, Any]:
    library = _library()
    place = {"repo_type": kind, "revision": commit}
    try:
        found = library.get_cached_repo_tree(repository, **place)
    except library.errors.CachedRepoTreeNotFoundError:
        # This writes the list to the cache. Every repository has one of these files.
        folder = _api().snapshot_download(
            repository,
            **place,
            allow_patterns=["README.md", ".gitattributes"],
            tqdm_class=_progress(),
        )
        try:
            found = library.get_cached_repo_tree(repository, **place)
        except library.errors.CachedRepoTreeNotFoundError:
            # Without a connection there is only what another program has downloaded.
            files = (f for f in pathlib.Path(folder).rglob("*") if f.is_file())
            found = [
                _Cached(str(f.relative_to(folder)), f.stat().st_size, f.resolve().name)
                for f in files
            ]
    return {file.path: file for file in found}


@functools.cache
def _folders(kind: str, repository: str, commit: str) -> Mapping[str, set[str]]:
    folders = collections.defaultdict(set)
    for name in _files(kind, repository, commit):
        while name:
            folder, _, last = name.rpartition("/")
            folders[folder].add(last)
            name = folder
    return dict(folders)


class _Cached(NamedTuple):
    """A file in the cache, as the library describes one in a list of files."""

    path: str
    size: int
    blob_id: str


@functools.cache
def _progress() -> type:
    """A progress bar that reports the progress of a download now and then."""
    from tqdm.std import tqdm

    class Progress(tqdm):
        monitor_interval = 0  # starts no thread
        reported = time.monotonic()

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"file": io.StringIO()})

        def close(self) -> None:
            self.disable = True  # tqdm would display it once more

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            now = time.monotonic()
            is_due = now - Progress.reported >= _SECONDS_BETWEEN_REPORTS
            if is_due and self.unit == "B" and (self.total or 0) >= 2**20:
                Progress.reported = now
                terminal.say(
                    f"downloaded {self.n / 2**20:,.0f} of {self.total / 2**20:,.0f} MiB"
                )

    return Progress


def _shown(names: Iterable[str]) -> str:
    """The first names, as text."""
    names = sorted(names)
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
