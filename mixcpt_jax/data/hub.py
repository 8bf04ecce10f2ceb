"""Models and data sets of the Hugging Face Hub, by name.

`hf://ORG/NAME` is a model, `hf://datasets/ORG/NAME` a data set. A revision (`@main`, a tag
or a commit) and a path in the repository may follow. Where a model is expected, `ORG/NAME`
is enough, unless a local file or folder has this name.

The library `huggingface_hub` downloads each file once into its cache, under locks that
processes share, and reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. A process
resolves a revision to a commit once; a run records its commits and keeps them.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import io
import logging
import pathlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from mixcpt_jax import __version__
from mixcpt_jax.core import paths, system
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

SCHEME = "hf://"
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
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[^@\s]+)?", re.ASCII)
_LOCAL_FILES = (".gguf", ".json", ".model")
# One of an address in a list of paths.
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
    address = _Address.parse(SCHEME + path if is_model_id(path) else path, path)
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
    return _map_addresses(
        config, lambda address: str(address.at(commits[address.root]))
    )


def _map_addresses(config, change) -> ml_collections.ConfigDict:
    """A config with `change(address)` in place of each address."""

    def mapped(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {k: mapped(entry, (*keys, k)) for k, entry in value.items()}
        if not isinstance(value, str):
            return value
        if keys in _OF_MODELS and is_model_id(value):
            return change(_Address.parse(SCHEME + value, value))
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

    @property
    def root(self) -> str:
        """The address of the whole repository."""
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{kind}{self.repository}{revision}"

    def __str__(self) -> str:
        return f"{self.root}/{self.path}".rstrip("/")

    def at(self, commit: str) -> "_Address":
        return dataclasses.replace(self, revision=commit)

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
            if problem := self._problem(error):
                raise InputError(f"{self.place}: {problem}") from error
            raise

    def _problem(self, error: Exception) -> str | None:
        """An error of the library, and its remedy; None for one that is not expected."""
        library = _library()
        errors, constants = library.errors, library.constants
        what = "data set" if self.kind == "dataset" else "model"
        page = (
            f"{constants.ENDPOINT}/{self.root.partition('@')[0].removeprefix(SCHEME)}"
        )
        is_bare = not self.place.startswith(SCHEME)
        absent = "there is no such file or folder, and " if is_bare else ""
        unread = (
            errors.RevisionResolutionError,
            errors.LocalEntryNotFoundError,
            errors.CachedRepoTreeNotFoundError,
            errors.OfflineModeIsEnabled,
        )
        match error:
            case errors.GatedRepoError():
                return (
                    f"access to this {what} is restricted; accept its terms at {page} and "
                    "set HF_TOKEN to a token of your account"
                )
            case errors.RepositoryNotFoundError():
                return (
                    f"{absent}the Hub shows no such {what} (looked for {page}); check the "
                    "name, or set HF_TOKEN if it is private"
                )
            case errors.RevisionNotFoundError():
                return (
                    f"the {what} has no revision {self.revision!r}; name a branch, a tag "
                    f"or a commit of {page}"
                )
            case _ if constants.HF_HUB_OFFLINE and isinstance(error, unread):
                return (
                    f"{absent}the cache of the Hub {constants.HF_HUB_CACHE} does not hold "
                    "all of its files, and HF_HUB_OFFLINE is set; unset it to download them"
                )
            case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
                return (
                    f"the Hub refuses access to {page}; set HF_TOKEN to a valid token"
                )
            case errors.HfHubHTTPError():
                return (
                    f"{constants.ENDPOINT} answers with HTTP status "
                    f"{error.response.status_code}; run the same command again later"
                )
            case _ if isinstance(error, unread) or _is_of_network(error):
                return (
                    f"{absent}the Hub cannot be reached at {constants.ENDPOINT} "
                    f"({_first_line(error)}); check the network and HF_ENDPOINT, then run "
                    "the same command again, which keeps all files that are complete"
                )
        return system.problem(error)


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"[:200]


@functools.cache
def _library() -> Any:
    """The package huggingface_hub, which writes its log as other packages do."""
    import huggingface_hub  # takes a fifth of a second; few runs need it

    logger = logging.getLogger("huggingface_hub")
    logger.handlers.clear()
    logger.propagate = True
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
        _api().snapshot_download(
            repository,
            **place,
            allow_patterns=["README.md", ".gitattributes"],
            tqdm_class=_progress(),
        )
        found = library.get_cached_repo_tree(repository, **place)
    return {file.path: file for file in found}


@functools.cache
def _progress() -> type:
    """A progress bar that says now and then how far a download is."""
    from tqdm.std import tqdm

    class Progress(tqdm):
        monitor_interval = 0  # starts no thread
        reported = time.monotonic()

        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"file": io.StringIO()})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            now = time.monotonic()
            is_due = now - Progress.reported > _SECONDS_BETWEEN_REPORTS
            if is_due and self.unit == "B" and self.total:
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
