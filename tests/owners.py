"""Processes that want one folder at the same time, over and over.

    PYTHONPATH=tests:. python tests/owners.py --rounds 100 [--bucket] [--seed 0]

A round starts processes at random moments on one folder; each appends the missing steps to
a record there, and some are killed. A last one finishes. Then the record has every step
once, no process wrote while another one owned the folder, and each refused process named
the owner in one line. `--bucket` uses a bucket on this machine.
"""

import argparse
import json
import os
import pathlib
import random
import sys
import tempfile
import time

import processes
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import lease

NUM_STEPS = 12
_RECORD = "record.json"
_LONGEST = 600.0  # seconds that a process may take on a busy machine


def work(folder: str, log: str, seed: int, environment: dict[str, str]) -> None:
    """What one process does; its exit status is 1 if another one owns the folder."""
    os.environ |= environment
    rng = random.Random(seed)
    path = epath.Path(folder)

    def note(event: str) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {event}\n")

    try:
        with lease.hold(path):
            note("begins")
            record = path / _RECORD
            steps = json.loads(record.read_text()) if record.exists() else []
            while len(steps) < NUM_STEPS:
                time.sleep(rng.uniform(0, 0.01))
                lease.check(path, must_ask=True)
                note("writes")
                steps.append(len(steps) + 1)
                paths.replace(record, json.dumps(steps))
            note("ends")
    except InputError as error:
        note(f"says {error}")
        sys.exit(1)


def check_round(
    folder: str,
    log: pathlib.Path,
    seed: int,
    environment: dict[str, str],
) -> list[str]:
    """One round; returns how its processes ended.

    Raises:
      AssertionError: two owned the folder at a time, or steps are missing.
    """
    rng = random.Random(seed)

    def start(number: int):
        settings = folder, str(log), 100 * seed + number, environment
        process = processes.context().Process(target=work, args=settings)
        process.start()
        return process

    log.touch()
    started = []
    for number in range(rng.choice((2, 2, 3))):
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.2))))
        started.append(start(number))
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, 0.2))
        killed = rng.choice(started)
        killed.kill()
    for process in started:
        process.join(_LONGEST)
    started.append(start(99))
    started[-1].join(_LONGEST)

    statuses = {process.pid: process.exitcode for process in started}
    assert set(statuses.values()) <= {0, 1, -9}, statuses
    assert statuses[started[-1].pid] == 0, log.read_text()
    owner, refused = None, 0
    for line in log.read_text().splitlines():
        pid, event, *said = line.split(maxsplit=2)
        if event == "begins":
            # A process that was killed owns nothing.
            assert owner is None or statuses[int(owner)] == -9, log.read_text()
            owner = pid
        elif event == "says":
            refused += 1
            assert statuses[int(pid)] == 1
            assert "has owned this folder since" in said[0], said[0]
            assert f"process {pid} " not in said[0]
        else:
            assert owner == pid, log.read_text()
        if event == "ends":
            owner = None
    assert refused == list(statuses.values()).count(1)
    path = epath.Path(folder)
    assert json.loads((path / _RECORD).read_text()) == [*range(1, NUM_STEPS + 1)]
    assert not list(path.glob("lease-*")), list(path.iterdir())
    names = {0: "ended", 1: "refused", -9: "killed"}
    return [names[status] for status in statuses.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bucket", action="store_true")
    given = parser.parse_args()
    import collections
    import contextlib

    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        environment, place = {}, root
        if given.bucket:
            import bucket

            port = stack.enter_context(bucket.serve())
            environment = bucket.environment(port)
            place = str(stack.enter_context(bucket.reached_by(port)))
        counts = collections.Counter()
        for seed in range(given.seed, given.seed + given.rounds):
            log = pathlib.Path(root) / f"{seed}.log"
            ends = check_round(f"{place}/run-{seed}", log, seed, environment)
            counts.update(ends)
            print(f"round {seed}: {', '.join(ends)}", flush=True)
        print(f"{given.rounds} rounds: {dict(counts)}")


if __name__ == "__main__":
    main()
