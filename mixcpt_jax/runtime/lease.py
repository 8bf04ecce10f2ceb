"""One owner of a folder: a lease, held while a process writes there.

The owner's entry is the file `lease-N.json` in the folder. The only atomic operation is
creating the entry with the next number: disks and NFS refuse to create a file that exists
(`O_EXCL`), and buckets refuse to create an object that has a generation. After a process
has created an entry, it lists the folder. If it finds another entry whose owner is not
dead, it withdraws its own. So if two processes start at the same moment, at most one of
them gets the lease.

The owner rewrites its entry every few seconds and never creates it again. An owner on this
machine counts as dead as soon as its process has ended. Any other owner counts as dead if
its entry does not change for a minute on the observer's own clock; clocks of other machines
are not read. A new owner removes the entries of dead owners before it starts, and an owner
checks its own entry before it writes. So an owner that was suspended for too long, or whose
folder was renamed, stops at its next write.

A run also writes to folders inside its own, those of its phases. So a process that has
created its entry then looks at the folders above: if one has a living owner, it withdraws
its entry. And a run holds a lease on the folder of each phase while the phase runs.
"""

import contextlib
import datetime
import functools
import json
import math
import os
import pathlib
import random
import re
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from etils import epath
from fsspec.core import url_to_fs

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

SECONDS_BETWEEN_BEATS = 10.0
SECONDS_TO_DEATH = 60.0
_SECONDS_BETWEEN_LOOKS = 1.0
_NAME = re.compile(r"lease-([0-9]{1,18})\.json")
_ALL_BUCKETS = "gs://"
# Entries are rewritten in place, so all versions have the same size.
_BYTES = 1024

_FACTS = {"pid": int} | dict.fromkeys(("host", "place", "start", "since"), str)

_held: dict[str, "_Lease"] = {}


class _Entry(NamedTuple):
    """An entry in the folder.

    Attributes:
      number: of the entry; the highest is the owner's.
      version: changes with each rewrite: the content on a disk, the generation in a bucket.
    """

    number: int
    version: str


class _Disk:
    """Entries in a folder of a local disk or of NFS."""

    def __init__(self, folder: epath.Path):
        self._folder = os.fspath(folder)

    def list(self) -> list[_Entry]:
        """All entries, the lowest number first."""
        numbers = sorted(filter(None, map(_number, os.listdir(self._folder))))
        found = ((number, self.read(number)) for number in numbers)
        return [_Entry(number, text) for number, text in found if text is not None]

    def read(self, number: int) -> str | None:
        """Its content; None: there is none."""
        path = self._path(number)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise InputError(f"{path}: is no regular file; delete it")
            with open(path, "rb") as file:
                return file.read(_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return None

    def create(self, number: int, text: str) -> _Entry | None:
        """Creates an entry; None: it is there."""
        try:
            self._write(number, text, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            return None
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._path(number))
            raise
        return _Entry(number, text)

    def renew(self, entry: _Entry, text: str) -> _Entry:
        """Rewrites an entry that is there."""
        self._write(entry.number, text, 0)
        return entry._replace(version=text)

    def remove(self, entry: _Entry) -> None:
        """Does nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(entry.number))

    def _path(self, number: int) -> str:
        return os.path.join(self._folder, _name(number))

    def _write(self, number: int, text: str, flags: int) -> None:
        descriptor = os.open(self._path(number), os.O_WRONLY | flags, 0o666)
        try:
            content = text.encode()
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _Bucket:
    """Entries in a bucket; each write has a generation as its precondition."""

    def __init__(self, folder: epath.Path):
        self._system, path = url_to_fs(str(folder))
        self._bucket, _, self._prefix = path.partition("/")

    def list(self) -> list[_Entry]:
        """All entries, the lowest number first."""
        answer = self._system.call(
            "GET",
            "b/{}/o",
            self._bucket,
            prefix=self._key("lease-"),
            delimiter="/",
            json_out=True,
        )
        found = []
        for item in answer.get("items", ()):
            number = _number(item["name"].rpartition("/")[2])
            if number:
                found.append(_Entry(number, str(item["generation"])))
        return sorted(found)

    def read(self, number: int) -> str | None:
        """Its content; None: there is none."""
        try:
            path = f"{self._bucket}/{self._key(_name(number))}"
            return self._system.cat_file(path)[:_BYTES].decode(errors="replace")
        except FileNotFoundError:
            return None

    def create(self, number: int, text: str) -> _Entry | None:
        """Creates an entry; None: it is there."""
        try:
            return self._put(number, text, "0")
        except FileExistsError:
            # From a request whose response was lost and which was sent again.
            if self.read(number) != text:
                return None
            return next((e for e in self.list() if e.number == number), None)

    def renew(self, entry: _Entry, text: str) -> _Entry:
        """Rewrites an entry that is there."""
        try:
            return self._put(entry.number, text, entry.version)
        except FileExistsError as error:
            found = next((e for e in self.list() if e.number == entry.number), None)
            if found is None or self.read(entry.number) != text:
                raise FileNotFoundError(_name(entry.number)) from error
            return found

    def remove(self, entry: _Entry) -> None:
        """Does nothing if it is missing, or belongs to another process by now."""
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self._system.call(
                "DELETE",
                "b/{}/o/{}",
                self._bucket,
                self._key(_name(entry.number)),
                ifGenerationMatch=entry.version,
            )

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _put(self, number: int, text: str, generation: str) -> _Entry:
        """Raises FileExistsError if the object's generation differs from this one."""
        url = self._system.base.replace("/storage/v1/", "/upload/storage/v1/")
        answer = self._system.call(
            "POST",
            f"{url}b/{quote(self._bucket, safe='')}/o",
            uploadType="media",
            name=self._key(_name(number)),
            ifGenerationMatch=generation,
            headers={"Content-Type": "application/octet-stream"},
            data=text.encode(),
            json_out=True,
        )
        return _Entry(number, str(answer["generation"]))


class _Lease:
    """This process's lease on a folder."""

    def __init__(self, folder: epath.Path):
        """Takes it.

        Raises:
          InputError: another process has it, or nothing can be written there.
        """
        self._folder = folder
        self.process = os.getpid()
        self._place = _place(folder)
        self._facts = _facts()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._made = _make_folders(folder)
        try:
            self._entry = self._take()
        except BaseException:
            _remove_empty(self._made)
            raise
        self._confirmed = time.monotonic()
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        try:
            _check_above(folder)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Ends the lease, and removes the folders created for it if they are empty."""
        self._ended.set()
        with self._lock, contextlib.suppress(OSError):
            if self._is_mine(self._place.list()):
                self._place.remove(self._entry)
        _remove_empty(self._made)

    def check(self) -> None:
        """Checks that the lease is still held.

        Raises:
          InputError: the lease was lost: another process has taken it, the folder was
            renamed or the entry was deleted.
        """
        with self._lock:
            # A request to a bucket takes longer than a typical write.
            is_recent = time.monotonic() - self._confirmed < 2 * SECONDS_BETWEEN_BEATS
            if paths.is_remote(self._folder) and is_recent:
                return
            self._confirm()

    def confirm(self) -> None:
        """Like `check`, but always sends a request to a bucket."""
        with self._lock:
            self._confirm()

    def _confirm(self) -> None:
        confirmed, self._confirmed = time.monotonic(), -math.inf
        try:
            entries = self._place.list()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{self._folder}: was renamed or deleted while this run wrote to it, so "
                "the run stops; give the folder its name back, and the same command "
                "resumes"
            ) from error
        if self._is_mine(entries):
            self._confirmed = confirmed
            return
        last = entries[-1] if entries else None
        if last is None or last.number < self._entry.number:
            raise InputError(
                f"{self._folder}: its {_name(self._entry.number)} was deleted while this "
                "run wrote there, so the run no longer owns the folder and stops; the same "
                "command resumes"
            )
        raise InputError(
            f"{_file(self._folder, last)}: {_described(_facts_of(self._place, last))} has "
            "taken over this "
            f"folder, because this run gave no sign of life for {SECONDS_TO_DEATH:.0f} s, "
            "so this run stops; wait for the end of the other one"
        )

    def _is_mine(self, entries: list[_Entry]) -> bool:
        return bool(entries) and entries[-1] == self._entry

    def _beat(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_BEATS):
            with self._lock, contextlib.suppress(Exception):  # `check` raises it
                if not self._ended.is_set():
                    self._confirm()
                    self._entry = self._place.renew(self._entry, self._text())

    def _text(self) -> str:
        self._beats += 1
        facts = self._facts | {"beat": self._beats}
        return json.dumps(facts, indent=1).ljust(_BYTES - 1) + "\n"

    def _take(self) -> _Entry:
        while True:
            try:
                before = self._place.list()
                if before:
                    _wait_for_death(self._folder, self._place, before[-1])
                number = before[-1].number + 1 if before else 1
                entry = self._place.create(number, self._text())
            except FileNotFoundError as error:
                if paths.is_remote(self._folder):
                    raise InputError(
                        f"{self._folder}: there is no such bucket; create it, or name "
                        "another one"
                    ) from error
                # The process that made the folder has just removed it.
                self._made = _make_folders(self._folder)
                continue
            if entry is None:
                continue
            if paths.is_remote(self._folder):
                # A server that ignores preconditions keeps the entry written last.
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            now = self._place.list()
            if {e for e in now if e != entry} <= set(before) and entry in now:
                for dead in before:
                    self._place.remove(dead)
                return entry
            if entry in now:
                self._place.remove(entry)
            time.sleep(random.uniform(0, _SECONDS_BETWEEN_LOOKS))


@contextlib.contextmanager
def hold(folder: epath.Path) -> Iterator[None]:
    """Makes this process the owner of a folder, which need not exist, while the block runs.

    If the process already owns the folder, nothing changes.

    Raises:
      InputError: another process owns it; or nothing can be written there.
    """
    key = str(folder)
    if key in _held and _held[key].process == os.getpid():
        yield
        return
    _held[key] = lease = _Lease(folder)
    try:
        yield
    finally:
        del _held[key]
        lease.release()


def check(folder: epath.Path, must_ask: bool = False) -> None:
    """Checks the lease on a folder; call it before each write.

    The lease may be on the folder itself or on one above it. Only the first host holds a
    lease.

    Args:
      folder: where the write goes.
      must_ask: asks a bucket now; otherwise the answer may be a few seconds old.

    Raises:
      InputError: the lease was lost, see `_Lease.check`.
    """
    for key, lease in list(_held.items()):
        if f"{folder}/".startswith(f"{key}/") and lease.process == os.getpid():
            lease.confirm() if must_ask else lease.check()


def _place(folder: epath.Path) -> _Disk | _Bucket:
    return _Bucket(folder) if paths.is_remote(folder) else _Disk(folder)


def _check_above(folder: epath.Path) -> None:
    """Checks that no other process owns a folder above one.

    Raises:
      InputError: names the owner.
    """
    for above in folder.parents:
        lease = _held.get(str(above))
        if str(above) == _ALL_BUCKETS or (lease and lease.process == os.getpid()):
            return
        try:
            place = _place(above)
            for entry in place.list()[-1:]:
                if _facts_of(place, entry):
                    _wait_for_death(above, place, entry)
        except InputError as error:
            raise InputError(
                f"{folder}: lies in the folder of another run: {error}"
            ) from error
        except OSError:
            pass  # its names may not be listed


def _wait_for_death(folder: epath.Path, place: _Disk | _Bucket, entry: _Entry) -> None:
    """Returns once an entry's owner is dead, or the entry is gone.

    Raises:
      InputError: the owner is alive.
    """
    facts = _facts_of(place, entry)
    deadline = time.monotonic() + SECONDS_TO_DEATH
    is_told = False
    while not _is_gone(facts):
        if _is_alive(facts):
            raise _taken(folder, entry, facts)
        if time.monotonic() > deadline:
            return
        if facts and not is_told:
            is_told = True
            terminal.say(
                f"{_file(folder, entry)}: waits up to {SECONDS_TO_DEATH:.0f} s for a "
                f"sign of life of its owner, {_described(facts)}"
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        now = next((e for e in place.list() if e.number == entry.number), None)
        if now is None:
            return
        if now != entry and facts:
            raise _taken(folder, entry, facts)
        if now != entry:
            entry, facts = now, _facts_of(place, now)


def _taken(folder: epath.Path, entry: _Entry, facts: dict[str, Any]) -> InputError:
    return InputError(
        f"{_file(folder, entry)}: {_described(facts)} has owned this folder since "
        f"{facts['since']}; wait for its end, or stop it, and run the same command "
        "again; or give another folder"
    )


def _facts_of(place: _Disk | _Bucket, entry: _Entry) -> dict[str, Any]:
    """What an entry says about its owner; empty if the entry is damaged or gone."""
    text = place.read(entry.number) or ""
    with contextlib.suppress(InputError):
        return small_files.parse(text, _name(entry.number), _FACTS)
    return {}


def _file(folder: epath.Path, entry: _Entry) -> str:
    """The folder, with the entry that a message is about."""
    return f"{folder} ({_name(entry.number)})"


def _name(number: int) -> str:
    return f"lease-{number}.json"


def _number(name: str) -> int | None:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else None


def _described(facts: dict[str, Any]) -> str:
    if not facts:
        return "an unknown process"
    return f"process {facts['pid']} on {facts['host']}"


def _make_folders(folder: epath.Path) -> list[epath.Path]:
    """Creates a folder and its parents; returns those it created, innermost first."""
    if paths.is_remote(folder):
        return []  # a bucket has no folders
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[epath.Path]) -> None:
    with contextlib.suppress(OSError):  # a folder is not empty
        for folder in folders:
            os.rmdir(folder)


def _facts() -> dict[str, Any]:
    """What an entry says about this process."""
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "place": _where(),
        "start": _start_of(os.getpid()),
        # For people; clocks of different machines are not compared.
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def _where() -> str:
    """Equal for two processes only if a process id means the same to both."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _start_of(process: int) -> str:
    """When a process of this machine started, in ticks since boot; "" if unknown."""
    fields = _stat(process)
    return fields[19] if fields else ""


def _stat(process: int) -> list[str]:
    """The state of a process and the fields that follow it in /proc; empty if unknown."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _is_gone(facts: dict[str, Any]) -> bool:
    """Whether the process of an entry is known to have ended."""
    if not facts or facts["place"] != _where():
        return False
    try:
        os.kill(facts["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # another user's
    fields = _stat(facts["pid"])
    # A process that has ended but was not waited for is still listed.
    return bool(fields) and (fields[0] in "ZX" or fields[19] != facts["start"])


def _is_alive(facts: dict[str, Any]) -> bool:
    """Whether the process of an entry is known to be running."""
    return bool(facts) and facts["place"] == _where() and not _is_gone(facts)
