"""Several hosts as one run: how they find each other, and how they end together.

Every host runs the same program on its own devices. A collective operation ends only if all
hosts reach it. So a host that fails must not wait, and the others must notice the failure
by a broken connection or by missing heartbeats.
"""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import lease, terminal


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Waits for the other hosts; jax then sees the devices of all of them.

    Call it before any other use of jax. On TPU slices, on Kubernetes (GKE), and under Slurm
    and Open MPI, jax discovers arguments that are None.

    Args:
      coordinator: HOST:PORT of process 0, a free port there that all hosts can reach.
      num_processes: how many processes there are.
      process_id: the number of this one.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as dead
        and the other processes end.

    Raises:
      InputError: an argument is neither given nor discovered, or is out of range.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
    except (ValueError, IndexError) as error:
        flag = "--distributed" if coordinator is None else "--coordinator"
        raise InputError(
            f"{flag}: could not discover the hosts ({error}); on a TPU slice, "
            "Kubernetes, Slurm and Open MPI jax finds them with --distributed alone, "
            "elsewhere set --coordinator=HOST:PORT --num_processes=N --process_id=0 "
            "(to N - 1)"
        ) from error


def require_same(settings: str) -> None:
    """Checks that all hosts have the same settings.

    Raises:
      InputError: they differ, so a collective operation would hang or compute nonsense.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.blake2b(settings.encode(), digest_size=16).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    for host in range(1, len(digests)):
        if (digests[host] != digests[0]).any():
            raise InputError(
                f"--config: the settings of host {host} differ from those of host 0; "
                "start all hosts with the same file and flags"
            )


def is_first() -> bool:
    """Whether this is the host that writes the files of the run."""
    return jax.process_index() == 0


@contextlib.contextmanager
def owning(folder: epath.Path) -> Iterator[None]:
    """The hosts own a folder together, by a lease that the first host holds.

    Raises:
      InputError: see `lease.hold`; on every host.
    """
    with contextlib.ExitStack() as held:
        problem = ""
        if is_first():
            try:
                held.enter_context(lease.hold(folder))
            except InputError as error:
                problem = str(error)
        if problem := text_of_first(problem):
            raise InputError(problem)
        yield


def of_first(value: int | bool | list[bool] | np.ndarray) -> np.ndarray:
    """The first host's value on every host; others may see a change of a folder later."""
    if jax.process_count() == 1:
        return np.asarray(value)
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def text_of_first(text: str) -> str:
    """The first host's text on every host."""
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(of_first(len(content)))
    return of_first(np.resize(content, size)).tobytes().decode()


def wait_for_all(place: str) -> None:
    """Returns when every host has reached `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A host that fails inside exits at once, and ends the run.

    At a normal exit of Python, jax would wait for the other hosts, which wait for it.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, SystemExit):
            if not error.code:
                raise
        else:
            terminal.say("".join(traceback.format_exception(error)).rstrip("\n"))
            terminal.say(
                f"host {jax.process_index()} ends, and with it the run. If the "
                "error above is about a connection, another host has ended before: see "
                "its output. The same command on all hosts resumes from the last "
                "checkpoint",
                "ERROR",
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
