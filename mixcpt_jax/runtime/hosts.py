"""Several hosts as one run: how they find each other, and how they end together.

Every host runs the same program on its own devices. What they compute together ends only
if all of them come to it, so one that fails must not wait, and the others must learn of
it: from a connection that breaks, or from heartbeats that stop.
"""

import contextlib
import hashlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixcpt_jax.core.errors import InputError


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = 100,
) -> None:
    """Waits for the other hosts; from now on all their devices are one.

    To be called before anything else of jax. What is None is found by jax itself on TPU
    slices, on Kubernetes (GKE), and under Slurm and Open MPI.

    Args:
      coordinator: HOST:PORT of the process 0, free there and reached by all.
      num_processes: how many there are.
      process_id: which one this is.
      heartbeat_timeout: seconds after which a process that says nothing is taken for
        dead, and the others end.

    Raises:
      InputError: something is neither given nor found, or out of range.
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
            f"{flag}: the hosts cannot be told ({error}); on a TPU slice, "
            "Kubernetes, Slurm and Open MPI jax finds them with --distributed alone, "
            "elsewhere give --coordinator=HOST:PORT --num_processes=N --process_id=0 "
            "(to N - 1)"
        ) from error


def require_same(settings: str) -> None:
    """Checks that all hosts were given the same.

    Raises:
      InputError: they were not; what they would compute together would not end, or would
        mean nothing.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.blake2b(settings.encode(), digest_size=16).digest()
    digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    for host in range(1, len(digests)):
        if (digests[host] != digests[0]).any():
            raise InputError(
                f"--config: host {host} was given other settings than host 0; give all "
                "hosts the same file and flags"
            )


def is_first() -> bool:
    """Whether this is the host that writes what one alone can write."""
    return jax.process_index() == 0


def wait_for_all(place: str) -> None:
    """Returns when every host has come to `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A host that fails inside ends at once, and with it the run.

    Python's way out would have it wait for the others, which wait for it.
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
            traceback.print_exception(error)
            print(
                f"error: host {jax.process_index()} ends, and with it the run. If what "
                "is above tells of a connection, another host has ended before: see what "
                "that one says. The same command on all hosts goes on from the last "
                "checkpoint",
                file=sys.stderr,
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
