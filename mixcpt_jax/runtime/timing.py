"""Where the wall time of a phase goes, across interruptions.

`timing.jsonl` has a row at the start of each process, with each line of metrics, and at the
end: the step, the time, the seconds of each activity since the process began, and the speed
of the device. A resumed run appends to it and never shortens it, so time that a kill cost
stays visible. It is a file of its own because the other records have the same rows however
often a run was interrupted.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mixcpt_jax.runtime import goodput

# "starting": data and weights; "steps": the wait for the device too.
ACTIVITIES = (
    "starting",
    "restoring",
    "compilation",
    "data",
    "steps",
    "evaluation",
    "saving",
)
LOST = "lost to restarts"


class Timing:
    """The seconds of each activity of this process; always one of them is under way."""

    def __init__(self, recorder: goodput.Recorder | None = None):
        """
        Args:
          recorder: is reported each activity too.
        """
        self._recorder = recorder
        self._began = time.time()
        self._seconds = dict.fromkeys(ACTIVITIES, 0.0)
        self._activity, self._since = ACTIVITIES[0], time.monotonic()

    def enter(self, activity: str) -> str:
        """Begins an activity; returns the one that it ends."""
        now = time.monotonic()
        self._seconds[self._activity] += now - self._since
        before, self._activity, self._since = self._activity, activity, now
        if self._recorder:
            self._recorder.enter(before, activity)
        return before

    def begin_step(self, step: int) -> None:
        """Begins a step, with the wait for its batch."""
        if self._recorder:
            self._recorder.step(step)
        self.enter("data")

    def finish(self) -> None:
        """Ends the phase for the recorder."""
        if self._recorder:
            self._recorder.enter(self._activity, "")
            self._recorder.finish()

    @contextlib.contextmanager
    def of(self, activity: str) -> Iterator[None]:
        """Counts the time of the block as this activity, then returns to the one before."""
        before = self.enter(activity)
        try:
            yield
        finally:
            self.enter(before)

    def row(self, step: int, **speed: float) -> dict[str, Any]:
        """A row of `timing.jsonl`, without values that are not finite.

        Args:
          step: steps done.
          speed: of the device, see `utilization.Utilization`.
        """
        self.enter(self._activity)
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        finite = {key: value for key, value in speed.items() if math.isfinite(value)}
        times = {"began": self._began, "time": time.time()}
        return {"step": step, **times, "seconds": seconds, **finite}


def spent(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Activity -> its seconds over all processes of a phase; {} without rows.

    What a process did after the last row whose step the next process starts from is lost,
    and so is the time between the two: both are `LOST`. The values sum to the wall time
    from the first process's start to the last row.

    Args:
      rows: of `timing.jsonl`, in their order.
    """
    processes: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if not processes or processes[-1][0]["began"] != row["began"]:
            processes.append([])
        processes[-1].append(row)
    if not processes:
        return {}
    kept = []
    for number, process in enumerate(processes):
        resumed_at = math.inf
        if number + 1 < len(processes):
            resumed_at = processes[number + 1][0]["step"]
        kept += [row for row in process if row["step"] <= resumed_at][-1:]
    totals = dict.fromkeys(ACTIVITIES, 0.0)
    for row in kept:
        for name in ACTIVITIES:
            totals[name] += row["seconds"].get(name, 0.0)
    wall = processes[-1][-1]["time"] - processes[0][0]["began"]
    return totals | {LOST: max(wall - sum(totals.values()), 0.0)}


def describe(seconds: Mapping[str, float]) -> str:
    """Such as "81 % of 12 min in steps; evaluation 11 %, compilation 8 %"."""
    total = sum(seconds.values())
    if not total:
        return ""
    shares = {name: 100 * value / total for name, value in seconds.items()}
    rest = sorted(
        (name for name in shares if name != "steps" and shares[name] >= 0.5),
        key=lambda name: -shares[name],
    )
    others = ", ".join(f"{name} {shares[name]:.0f} %" for name in rest)
    goodput = f"{shares['steps']:.0f} % of {duration(total)} in steps"
    return f"{goodput}; {others}" if others else goodput


def duration(seconds: float) -> str:
    """Such as "45 s", "12 min" or "3.5 h"."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
