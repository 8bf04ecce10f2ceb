"""Describes errors of the operating system in one line: path, problem, remedy."""

import errno
import os
import pathlib
import traceback

_AGAIN = "then run the same command again"
_REMEDIES = {
    errno.ENOSPC: f"make room on the disk, {_AGAIN}",
    errno.EDQUOT: f"make room within your quota, {_AGAIN}",
    errno.EFBIG: f"raise the limit on the size of files (`ulimit -f`), {_AGAIN}",
    errno.EACCES: "change its permissions or name another path",
    errno.EPERM: "change its permissions or name another path",
    errno.EROFS: "name a path on a disk that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file; name a path in a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "name another path",
    errno.ENOTEMPTY: "name another path",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its links lead in a circle; name the file itself",
    errno.ENXIO: "name a regular file",
    errno.ENODEV: "name a regular file",
    errno.EMFILE: f"raise the limit on open files (`ulimit -n 4096`), {_AGAIN}",
    errno.ENFILE: f"close other programs, {_AGAIN}",
    errno.ENOMEM: f"free memory or raise its limit (`ulimit -v`), {_AGAIN}",
    errno.EAGAIN: f"raise the limit on processes (`ulimit -u`), {_AGAIN}",
    errno.EIO: f"check the disk, {_AGAIN}",
    errno.ESTALE: f"mount the folder again, {_AGAIN}",
}
_MEMORY = (
    "this machine has no memory left; lower data.batch_size, data.row_length or "
    "data.num_workers, or use a machine with more"
)


def problem(error: BaseException) -> str | None:
    """The message to the user about an error that the system raised.

    Returns:
      One line, or None if the system did not raise the error.
    """
    match error:
        case MemoryError():
            return f"{error}: {_MEMORY}" if str(error) else _MEMORY
        case OSError():
            return _of_os(error)
        case RuntimeError() if "can't start new thread" in str(error):
            return f"{error}; {_REMEDIES[errno.EAGAIN]}"
        case RuntimeError() | AssertionError() if raised_in(error, "xla_bridge.py"):
            reason = str(error) or f"no device of {os.environ.get('JAX_PLATFORMS')!r}"
            return (
                f"jax finds no device to compute on ({reason}); name an installed backend "
                "in JAX_PLATFORMS, or unset it, and check that no other process holds the "
                "device"
            )
        case RuntimeError() if "home directory" in str(error).lower():
            return "no home folder is known; set HOME or give whole paths"
        case ValueError() if "embedded null" in str(error):
            return "a path has a NUL character; name another path"
    return None


def raised_in(error: BaseException, name: str) -> bool:
    """Whether a file of this name, or in a folder of this name, raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and name in pathlib.PurePath(frames[-1].filename).parts


def _of_os(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    remedy = _REMEDIES.get(error.errno, _AGAIN.removeprefix("then "))
    if "temporary directory" in reason:
        return f"{reason}; set TMPDIR to a folder that can be written to"
    if error.filename is None and error.errno == errno.ENOENT and not _has_folder():
        return "the current folder was deleted; change to another one"
    names = (error.filename, error.filename2)
    shown = " -> ".join(os.fsdecode(n) for n in names if isinstance(n, str | bytes))
    return f"{shown}: {reason}; {remedy}" if shown else f"{reason}; {remedy}"


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True
