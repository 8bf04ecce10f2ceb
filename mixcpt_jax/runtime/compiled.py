"""Where compiled programs are kept, so that a resumed run does not compile again."""

import os
import pathlib

import jax

from mixcpt_jax.core import paths


def keep(setting: str, workdir: str) -> None:
    """Turns on jax's persistent compilation cache.

    A folder that is already set, such as by `JAX_COMPILATION_CACHE_DIR`, stays.

    Args:
      setting: a folder; "off"; or "auto": on accelerators, a folder of the user's cache,
        or of the workdir if that is in a bucket. A CPU's programs are not kept by "auto":
        they are valid only for the same kind of CPU.
      workdir: of the run.
    """
    if jax.config.jax_compilation_cache_dir or setting == "off":
        return
    if setting == "auto":
        if jax.default_backend() == "cpu":
            return
        folder = paths.absolute(workdir) / "compiled"
        if not paths.is_remote(folder):
            folder = _user_cache() / "mixcpt_jax" / "compiled"
    else:
        folder = paths.absolute(setting)
    jax.config.update("jax_compilation_cache_dir", str(folder))


def _user_cache() -> pathlib.Path:
    home = os.environ.get("XDG_CACHE_HOME", "")
    return pathlib.Path(home or os.path.expanduser("~/.cache"))
