"""Checkpoints with Orbax: what resumes a phase exactly, and hands over to the next.

A checkpoint at step n holds everything the steps after n depend on: the items `params`
and `optimizer` (step count and moments), and as metadata the config and a hash of each
source. The data iterator's position is n itself, since the stream is a function of
sources, seed and batch number; the hashes tell whether the sources are still the same.
The next phase reads `params` alone. The frozen teacher is in no checkpoint: it is
reloaded from where it came from.

Saves are asynchronous and atomic: a checkpoint appears under its number when it is
whole, so a kill leaves the last whole one in place.
"""

import json
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

    def save(
        self,
        state: TrainState,
        step: int,
        config: dict[str, Any],
        sources: dict[str, str],
        loss: float | None = None,
    ) -> None:
        """Starts a save and returns once the device's arrays are copied.

        Args:
          state: the state after `step` steps.
          step: the checkpoint's number.
          config: written beside the arrays.
          sources: source name -> hash of its tokens, checked by `restore`.
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
            custom_metadata={"config": json.dumps(config), "sources": sources},
        )

    def restore(
        self, abstract_state: TrainState, sources: dict[str, str]
    ) -> TrainState:
        """Loads the newest checkpoint.

        Args:
          abstract_state: shapes, dtypes and shardings wanted.
          sources: as given to `save`.

        Raises:
          InputError: a source no longer holds what the run was trained on.
        """
        stored = self._checkpointer.checkpointables_metadata().custom_metadata[
            "sources"
        ]
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


def load_params(folder: str, abstract_params: Any) -> Any:
    """Reads only the parameters of a folder's newest checkpoint: the hand-over.

    Args:
      folder: a phase's folder, or its `checkpoints`.
      abstract_params: shapes, dtypes and shardings wanted.

    Raises:
      InputError: no checkpoint there, or of another model.
    """
    path = paths.absolute(folder)
    if (path / FOLDER).exists():
        path = path / FOLDER
    if not path.exists():
        raise InputError(f"init_from={folder}: no such folder")
    with ocp.training.Checkpointer(path) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"init_from={folder}: no whole checkpoint in {path}")
        stored = checkpointer.checkpointables_metadata(None).metadata["params"]
        _check_same_model(stored, abstract_params, folder)
        loaded = checkpointer.load_checkpointables(None, {"params": abstract_params})
    return loaded["params"]


def _check_same_model(stored: Any, wanted: Any, folder: str) -> None:
    shapes = [
        {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
        for leaves in (
            jax.tree_util.tree_leaves_with_path(stored),
            jax.tree_util.tree_leaves_with_path(wanted),
        )
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        found, expected = (s.get(name, "absent") for s in shapes)
        if found != expected:
            raise InputError(
                f"init_from={folder}: parameter {name} is {found} there and {expected} "
                "in model.path; give the checkpoint's own model"
            )
