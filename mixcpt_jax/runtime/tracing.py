"""Traces of training steps for XProf, which TensorBoard opens.

`train.profile="10:13"` traces steps 10 to 13; SIGUSR1 traces the next three steps of a run
that is under way. Each host writes its own file below `PHASE/tensorboard/plugins/profile`.
"""

import signal
import tempfile
from typing import Any

import jax
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.runtime import terminal

_STEPS_BY_SIGNAL = 3
_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none


class Tracer:
    """Starts and ends traces around the steps of a loop; a context manager."""

    def __init__(self, folder: epath.Path, steps: str, port: int = 0):
        """
        Args:
          folder: of the phase.
          steps: "FIRST:LAST"; empty: none.
          port: of a server from which XProf can capture a trace; 0: none.
        """
        self._folder = folder / "tensorboard"
        self._first, self._last = map(int, (steps or "0:-1").split(":"))
        self._is_asked = False
        self._port = port
        self._running: str | None = None

    def __enter__(self) -> "Tracer":
        if _SIGNAL is not None:
            self._before = signal.signal(_SIGNAL, self._ask)
        if self._port:
            jax.profiler.start_server(self._port)
        return self

    def __exit__(self, *exception) -> None:
        if self._running is not None:
            self._stop()
        if self._port:
            jax.profiler.stop_server()
        if _SIGNAL is not None:
            signal.signal(_SIGNAL, self._before)

    def before(self, step: int) -> None:
        """Call it before a step is dispatched."""
        if self._is_asked:
            self._is_asked = False
            self._first, self._last = step, step + _STEPS_BY_SIGNAL - 1
        # A resumed run may begin within the steps.
        if self._running is None and self._first <= step <= self._last:
            self._running = tempfile.mkdtemp(prefix="mixcpt-trace-")
            jax.profiler.start_trace(self._running)

    def after(self, step: int, outputs: Any) -> None:
        """Call it after a step is dispatched, with its outputs."""
        if self._running is not None and step >= self._last:
            jax.block_until_ready(outputs)
            self._stop()

    def _ask(self, *_) -> None:
        self._is_asked = True

    def _stop(self) -> None:
        folder, self._running = epath.Path(self._running), None
        jax.profiler.stop_trace()
        for file in folder.glob("plugins/profile/*/*"):
            target = self._folder / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            paths.copy_file(file, target)
        folder.rmtree()
        terminal.say(f"trace: written to {self._folder}; TensorBoard's XProf opens it")
