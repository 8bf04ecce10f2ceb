"""The configs that come with the package, found from any folder."""

import importlib.util
import pathlib
import sys
import types

import mixcpt_jax
from mixcpt_jax.core.errors import InputError


def find(name: str) -> str:
    """The config that `--config` names: a file as it stands, else one of ours.

    Args:
      name: "configs/mixcpt.py", "mixcpt" or a file, each with ":VARIANT" behind it or not.

    Returns:
      The same with the path of the file.

    Raises:
      InputError: it is neither.
    """
    given, colon, variant = name.partition(":")
    file = pathlib.Path(given).expanduser()
    if file.is_file():
        return f"{file}{colon}{variant}"
    is_ours = str(file.parent) in (".", "configs") and file.suffix in ("", ".py")
    ours = _folder() / f"{file.stem}.py"
    if is_ours and ours.is_file():
        return f"{ours}{colon}{variant}"
    raise InputError(
        f"--config={name}: no such file below {pathlib.Path.cwd()}; name {known()}"
    )


def known() -> str:
    """What `--config` may name, in words."""
    files = sorted(_folder().glob("*.py"))
    names = (file.stem for file in files if file.stem not in ("__init__", "presets"))
    return f"a file, or a config of the package: {', '.join(names)}"


def make_importable() -> None:
    """Lets our configs, and copies of them elsewhere, import each other as `configs`."""
    if _is_found("configs.mixcpt"):
        return
    package = types.ModuleType("configs")
    package.__path__ = [str(_folder())]
    if _is_found("configs"):  # a folder of this name where the command runs
        package.__path__ += list(importlib.import_module("configs").__path__)
    sys.modules["configs"] = package


def _folder() -> pathlib.Path:
    package = pathlib.Path(mixcpt_jax.__file__).parent
    # Installed they lie in the package, in a clone beside it.
    inside = package / "configs"
    return inside if inside.exists() else package.parent / "configs"


def _is_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
