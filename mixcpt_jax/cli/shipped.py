"""The configs of the package, found from any folder."""

import importlib.util
import pathlib
import sys
import types

import mixcpt_jax
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError

# Files in the folder that configs import, but that are not configs.
_HELPERS = ("__init__", "docstrings", "presets")


def find(name: str) -> str:
    """The config file that `--config` names: an existing file, else one of the package.

    Args:
      name: "configs/mixcpt.py", "mixcpt" or a file, each with or without ":VARIANT".

    Returns:
      The same name, with the path of the file.

    Raises:
      InputError: there is no such file.
    """
    given, colon, variant = name.partition(":")
    file = pathlib.Path(given).expanduser()
    if file.is_file():
        return f"{file}{colon}{variant}"
    is_ours = str(file.parent) in (".", "configs") and file.suffix in ("", ".py")
    ours = _folder() / f"{file.stem}.py"
    if is_ours and ours.is_file():
        return f"{ours}{colon}{variant}"
    near = text_lib.nearest(file.stem, _names()) if is_ours else ""
    raise InputError(
        f"--config={name}: no such file below {pathlib.Path.cwd()}; "
        f"{near or f'name {known()}'}"
    )


def known() -> str:
    """The possible values of `--config`, as text."""
    return f"a file, or a config of the package: {', '.join(_names())}"


def _names() -> list[str]:
    files = sorted(_folder().glob("*.py"))
    return [file.stem for file in files if file.stem not in _HELPERS]


def make_importable() -> None:
    """Makes the package `configs` importable, for these configs and copies of them."""
    if _is_found("configs.mixcpt"):
        return
    package = types.ModuleType("configs")
    package.__path__ = [str(_folder())]
    if _is_found("configs"):  # a folder of this name where the command runs
        package.__path__ += list(importlib.import_module("configs").__path__)
    sys.modules["configs"] = package


def _folder() -> pathlib.Path:
    package = pathlib.Path(mixcpt_jax.__file__).parent
    # In the installed package, or beside the package in a clone.
    inside = package / "configs"
    return inside if inside.exists() else package.parent / "configs"


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
