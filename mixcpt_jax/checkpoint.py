"""Checkpoints with Orbax: what resumes a phase exactly, and hands over to the next.

A checkpoint at step n holds everything the steps after n depend on: the items `params`
and `optimizer` (step count and moments), and as metadata the config, a hash of each
source, and the provenance: what the phase started from and which files it read. The data
iterator's position is the number of rows taken, since the stream is a function of sources,
seed and row; the hashes tell whether the sources are still the same. The next phase reads
`params` alone. The frozen model is in no checkpoint: it is reloaded from where it came
from, and the provenance tells whether that is still the same.

Saves are asynchronous and atomic: a checkpoint appears under its number when it is
whole, so a kill leaves the last whole one in place.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp

from mixcpt_jax import paths
from mixcpt_jax.errors import InputError
from mixcpt_jax.steps import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one phase; use it as a context manager."""

    def __init__(self, workdir: epath.Path, keep_last: int = 1, keep_best: int = 0):
        """Opens `workdir/checkpoints`, made if need be.

        Args:
          workdir: the phase's folder.
          keep_last: how many of the newest checkpoints stay.
          keep_best: how many stay for the lowest `loss` given to `save`.
        """
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)]
        if keep_best:
            keep.append(
                policies.BestN(
                    n=keep_best,
                    get_metric_fn=lambda metrics: metrics["loss"],
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._folder = workdir / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._checkpointer.close()

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def latest_rows(self) -> int:
        """How many rows of the stream the newest checkpoint has seen; 0 without one.

        Raises:
          InputError: an older version wrote it, which did not say.
        """
        if self.latest_step() is None:
            return 0
        metadata = self._checkpointer.checkpointables_metadata().custom_metadata
        if "rows" not in metadata:
            raise InputError(
                f"{self._folder}: written by a version that read the mixture in another "
                "order, so the run cannot go on exactly; start a new --workdir with "
                "--config.init_from set to this one"
            )
        return metadata["rows"]

    def save(
        self,
        state: TrainState,
        step: int,
        rows: int,
        config: dict[str, Any],
        sources: dict[str, str],
        provenance: dict[str, Any],
        loss: float | None = None,
    ) -> None:
        """Starts a save and returns once the device's arrays are copied.

        Args:
          state: the state after `step` steps.
          step: the checkpoint's number.
          rows: of the stream, taken by then.
          config: written beside the arrays.
          sources: source name -> hash of its tokens, checked by `restore`.
          provenance: `start`, also checked, and whatever else there is to know.
          loss: what `keep_best` compares.
        """
        self._checkpointer.save_checkpointables_async(
            step,
            {
                "params": state.params,
                "optimizer": {"step": state.step, "moments": state.opt_state},
            },
            force=True,
            metrics=None if loss is None else {"loss": loss},
            custom_metadata={
                "id": uuid.uuid4().hex,
                "rows": rows,
                "config": json.dumps(config),
                "sources": sources,
                "provenance": json.dumps(provenance),
            },
        )

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._checkpointer.wait()

    def restore(
        self,
        abstract_state: TrainState,
        sources: dict[str, str],
        provenance: dict[str, Any],
    ) -> TrainState:
        """Loads the newest checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings wanted.
          sources: as given to `save`.
          provenance: as given to `save`.

        Raises:
          InputError: the parameters have other shapes or dtypes, a source no longer
            holds what the run was trained on, or `init_from` is no longer what it
            started from.
        """
        checkpoint = self._checkpointer.checkpointables_metadata()
        # Orbax would cast and say nothing.
        for name, found, wanted in _differences(
            checkpoint.metadata["params"],
            abstract_state.params,
            lambda leaf: (tuple(leaf.shape), str(leaf.dtype)),
        ):
            raise InputError(
                f"{self._folder}: parameter {name} is {found} there and {wanted} now; "
                "start a new --workdir"
            )
        metadata = checkpoint.custom_metadata
        start = json.loads(metadata["provenance"])["start"]
        if start != provenance["start"]:
            raise InputError(
                f"init_from: {self._folder} was trained from {start}, which is now "
                f"{provenance['start']}; put that back, or start a new --workdir"
            )
        stored = metadata["sources"]
        for name in sorted(stored.keys() | sources.keys()):
            if stored.get(name) != sources.get(name):
                raise InputError(
                    f"sources.{name}: holds other text than when {self._folder} was "
                    "written, so the run cannot go on exactly; put the files back, or "
                    "start a new --workdir with --config.init_from set to this one"
                )
        loaded = self._checkpointer.load_checkpointables(
            None,
            {
                "params": abstract_state.params,
                "optimizer": {
                    "step": abstract_state.step,
                    "moments": abstract_state.opt_state,
                },
            },
        )
        optimizer = loaded["optimizer"]
        return TrainState(optimizer["step"], loaded["params"], optimizer["moments"])


def phase_folder(folder: str) -> epath.Path:
    """The phase's folder, of itself or of its `checkpoints`."""
    path = paths.absolute(folder)
    return path.parent if path.name == FOLDER else path


def identity(folder: str) -> dict[str, Any]:
    """`step` and `id` of a folder's newest checkpoint; no two saves have one id."""
    with _newest(folder) as checkpointer:
        metadata = checkpointer.checkpointables_metadata(None).custom_metadata
        return {"step": checkpointer.latest.step, "id": metadata["id"]}


def exists(folder: str) -> bool:
    """Whether a phase's folder has checkpoints."""
    return (phase_folder(folder) / FOLDER).exists()


def read_provenance(folder: str) -> dict[str, Any]:
    """What the newest checkpoint's phase started from, and the files it read."""
    with _newest(folder) as checkpointer:
        metadata = checkpointer.checkpointables_metadata(None).custom_metadata
        return json.loads(metadata["provenance"])


def read_config(folder: str) -> dict[str, Any]:
    """The config that a folder's newest checkpoint was trained with."""
    with _newest(folder) as checkpointer:
        metadata = checkpointer.checkpointables_metadata(None).custom_metadata
        return json.loads(metadata["config"])


def load_params(folder: str, abstract_params: Any) -> Any:
    """Reads only the trained parameters of a folder's newest checkpoint.

    Args:
      folder: a phase's folder, or its `checkpoints`.
      abstract_params: shapes, shardings and the dtypes to cast to.

    Raises:
      InputError: no checkpoint there, or of another model.
    """
    with _newest(folder) as checkpointer:
        stored = checkpointer.checkpointables_metadata(None).metadata["params"]
        _check_same_model(stored, abstract_params, folder)
        loaded = checkpointer.load_checkpointables(None, {"params": abstract_params})
    return loaded["params"]


@contextlib.contextmanager
def _newest(folder: str) -> Iterator[ocp.training.Checkpointer]:
    """Opens a folder that has a checkpoint, to read.

    Raises:
      InputError: it has none.
    """
    path = phase_folder(folder) / FOLDER
    if not path.exists():
        raise InputError(f"init_from={folder}: has no folder {path}")
    with ocp.training.Checkpointer(path) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"init_from={folder}: no whole checkpoint in {path}")
        yield checkpointer


def _check_same_model(stored: Any, wanted: Any, folder: str) -> None:
    for name, found, expected in _differences(stored, wanted, lambda x: tuple(x.shape)):
        raise InputError(
            f"init_from={folder}: parameter {name} is {found} there and {expected} in "
            "model.path; give the checkpoint's own model"
        )


def _differences(
    stored: Any, wanted: Any, describe: Callable[[Any], Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Leaves of two trees that are described otherwise: `(name, stored, wanted)`."""
    found, expected = (
        {
            jax.tree_util.keystr(path): describe(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (stored, wanted)
    )
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            yield name, found.get(name, "absent"), expected.get(name, "absent")
