"""Checkpoints with Orbax: what resumes a phase exactly, and hands over to the next.

A checkpoint at step n holds everything the steps after n depend on: the items `params`
and `optimizer` (step count and moments), and as metadata the config, a hash of each
source, and the provenance: what the phase started from and which files it read. The data
iterator's position is the number of rows taken, since the stream is a function of sources,
seed and row; the hashes tell whether the sources are still the same. The next phase reads
`params` alone. The frozen model is in no checkpoint: it is reloaded from where it came
from, and the provenance tells whether that is still the same.

Saves are asynchronous and atomic: a checkpoint appears under its number when it is
whole, so a kill leaves the last whole one in place. What happens to it later shows when it
is read: the metadata holds a checksum of every array, as it was on the devices, and a
digest of itself. A damaged checkpoint is set aside, never deleted, and the one before it
is used; a phase that is handed over is not replaced by an earlier state of it.
"""

import contextlib
import gc
import hashlib
import json
import logging as std_logging
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint.experimental import v1 as ocp

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import finite, hosts
from mixcpt_jax.training.steps import TrainState

FOLDER = "checkpoints"
_ASIDE = "damaged"


class Checkpoints:
    """Where one phase saves; use it as a context manager."""

    def __init__(self, workdir: epath.Path, keep_last: int = 2):
        """Opens `workdir/checkpoints`, made if need be, after `restore` has read it.

        Args:
          workdir: the phase's folder.
          keep_last: how many of the newest checkpoints stay.
        """
        self._folder = workdir / FOLDER
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep_last),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        # For good: threads of a save that failed may log after the end.
        logging.get_absl_logger().addFilter(_is_not_raised_too)
        return self

    def __exit__(self, kind, *exception) -> None:
        # What has gone wrong first is told.
        untold = () if kind is None else (InputError,)
        with contextlib.suppress(*untold), self._writing():
            self._checkpointer.close()

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        state: TrainState,
        step: int,
        rows: int,
        config: dict[str, Any],
        sources: dict[str, str],
        provenance: dict[str, Any],
    ) -> None:
        """Starts a save and returns once the device's arrays are copied.

        Args:
          state: the state after `step` steps.
          step: the checkpoint's number.
          rows: of the stream, taken by then.
          config: written beside the arrays.
          sources: source name -> hash of its tokens, checked by `restore`.
          provenance: `start`, also checked, and whatever else there is to know.

        Raises:
          InputError: this one or the one before it cannot be written.
        """
        items = _items(state)
        record = {
            "id": uuid.uuid4().hex,
            "rows": rows,
            "config": json.dumps(config),
            "sources": sources,
            "provenance": json.dumps(provenance),
            "leaves": _describe(items),
        }
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                custom_metadata=record | {"digest": _digest(record)},
            )

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
          InputError: one cannot be written.
        """
        with self._writing():
            self._checkpointer.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._folder}: a checkpoint cannot be written ({_cause(error)}); make "
                "room or mend that, and the same command goes on from the one before"
            ) from error


def _is_not_raised_too(entry: std_logging.LogRecord) -> bool:
    """Of a save that fails, Orbax's threads log at length what it raises as well."""
    return not (entry.exc_info and "orbax" in entry.pathname)


def check_folder(workdir: epath.Path) -> None:
    """Writes a tiny checkpoint, reads it back and removes it; on every host.

    So a folder in which no checkpoint could be written, or none be read again, is found
    before hours of training and not after them. Folders that are made for it are removed
    too, so a run that is refused afterwards leaves nothing.

    Args:
      workdir: the phase's folder; it need not exist.

    Raises:
      InputError: what was read is not what was written, or an exception came of it.
    """
    folder = workdir / f"{FOLDER}.check"
    # On the devices of all hosts: with several, Orbax saves no array of one host alone.
    everywhere = jax.make_mesh((jax.device_count(),), ("devices",))
    replicated = jax.NamedSharding(everywhere, jax.P())
    values = np.arange(4.0, dtype=np.float32)
    tree = {
        "x": jax.make_array_from_callback(values.shape, replicated, values.__getitem__)
    }
    missing = []  # from the phase's folder upwards
    # For good, as in `Checkpoints`.
    logging.get_absl_logger().addFilter(_is_not_raised_too)
    try:
        if hosts.is_first():  # what the disk refuses, Orbax would tell at length
            if not paths.is_remote(workdir):  # a bucket has no folders
                above = (workdir, *workdir.parents)
                missing = [path for path in above if not path.exists()]
            workdir.mkdir(parents=True, exist_ok=True)
            paths.replace(workdir / f"{FOLDER}.test", "")
            (workdir / f"{FOLDER}.test").unlink()
        with _hushed():
            ocp.save(folder, tree, overwrite=True)
            is_same = np.array_equal(ocp.load(folder, tree)["x"], values)
        problem = "" if is_same else "it has other values"
    except Exception as error:  # Orbax and TensorStore raise of every kind.
        if other := next((e for e in _chain(error) if _is_no_damage(e)), None):
            raise other from None
        problem = _cause(error)
    if problem:
        raise InputError(
            f"{workdir}: a checkpoint cannot be written there and read back ({problem}); "
            "give another --workdir, or make room"
        )
    hosts.wait_for_all(f"check of {workdir}")
    if hosts.is_first():
        folder.rmtree()
        with contextlib.suppress(OSError):  # another run's files lie in one of them
            for path in missing:
                path.rmdir()


class Restored(NamedTuple):
    """The newest whole checkpoint: its step, the rows of the stream taken, the state."""

    step: int
    rows: int
    state: TrainState


def restore(
    workdir: epath.Path,
    abstract_state: TrainState,
    sources: dict[str, str],
    provenance: dict[str, Any],
) -> Restored | None:
    """Loads the newest whole checkpoint; None if none was ever saved.

    Damaged ones after it are renamed to `damaged-STEP` and warned about, so that their
    steps can be saved again.

    Args:
      workdir: the phase's folder.
      abstract_state: shapes, dtypes and shardings wanted.
      sources: as given to `save`.
      provenance: as given to `save`.

    Raises:
      InputError: the state has other shapes or dtypes, a source no longer holds what the
        run was trained on, `init_from` is no longer what it started from, or a parameter
        is not finite; or there are checkpoints, but none is whole, and then none is
        renamed.
    """
    folder = workdir / FOLDER
    damaged: dict[epath.Path, str] = {}
    restored = None
    for entry in _steps(folder):
        path = entry.path
        try:
            record = _read(_read_record, entry)
            # Of what lies before the newest whole one, Orbax reads no more than this.
            if restored is None:
                _check_resumable(folder, record, abstract_state, sources, provenance)
                items = _load(path, record, _items(abstract_state))
                restored = Restored(entry.step, record["rows"], _state(items))
        except _Damaged as damage:
            damaged[path] = str(damage)
    if restored is None:
        told = [f"{path.name} ({why})" for path, why in damaged.items()]
        told += [f"{path.name} (set aside before)" for path in _aside(folder)]
        if told:
            raise InputError(
                f"{folder}: no checkpoint is whole: {', '.join(told)}; put back a copy of "
                "one under its number and run the same command, or delete the folder to "
                "begin the phase anew"
            )
        return None
    _check_finite(f"{folder}/{restored.step}", restored.state.params)
    for path, why in damaged.items():
        aside = _set_aside(path)
        logging.warning(
            "%s is damaged: %s; it is now %s, and the run goes on from step %d",
            path,
            why,
            aside.name,
            restored.step,
        )
    return restored


def newest_step(workdir: epath.Path) -> int | None:
    """Of the checkpoints that lie there, damaged or not; None if there are none."""
    found = _steps(workdir / FOLDER)
    return found[0].step if found else None


def phase_folder(folder: str) -> epath.Path:
    """The phase's folder, of itself or of its `checkpoints`."""
    path = paths.absolute(folder)
    is_inner = path.name == FOLDER and not (path / FOLDER).exists()
    return path.parent if is_inner else path


def identity(folder: str) -> dict[str, Any]:
    """`step` and `id` of a folder's newest checkpoint; no two saves have one id."""
    newest = _newest(folder)
    return {"step": newest.step, "id": newest.record["id"]}


def exists(folder: str) -> bool:
    """Whether a phase's folder has checkpoints."""
    return (phase_folder(folder) / FOLDER).exists()


def read_provenance(folder: str) -> dict[str, Any]:
    """What the newest checkpoint's phase started from, and the files it read."""
    return json.loads(_newest(folder).record["provenance"])


def read_config(folder: str) -> dict[str, Any]:
    """The config that a folder's newest checkpoint was trained with."""
    return json.loads(_newest(folder).record["config"])


def load_params(folder: str, abstract_params: Any) -> Any:
    """Reads only the trained parameters of a folder's newest checkpoint.

    Args:
      folder: a phase's folder, or its `checkpoints`.
      abstract_params: shapes, shardings and the dtypes to cast to.

    Raises:
      InputError: no checkpoint there, of another model, damaged, or with a parameter
        that is not finite.
    """
    newest = _newest(folder)
    wanted = {"params": abstract_params}
    for name, found, expected in _differences(
        newest.record, wanted, lambda dtype, shape: tuple(shape)
    ):
        raise InputError(
            f"init_from={folder}: array {name} is {found} there and {expected} in "
            "model.path; give the checkpoint's own model"
        )
    # In the dtypes that were saved, which is what the checksums are of.
    stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            newest.record["leaves"][jax.tree_util.keystr(path)][0],
            sharding=leaf.sharding,
        ),
        wanted,
    )
    try:
        loaded = _load(newest.path, newest.record, stored)
    except _Damaged as damage:
        raise _damaged_start(folder, newest.path, damage) from damage
    _check_finite(newest.path, loaded["params"])
    return jax.tree.map(
        lambda leaf, wanted: leaf.astype(wanted.dtype),
        loaded["params"],
        abstract_params,
    )


def _check_finite(path: epath.Path | str, params: Any) -> None:
    if broken := finite.find_broken(params):
        raise InputError(
            f"{path}: its parameter {broken} holds values that are not finite numbers; "
            "its training has diverged: use another checkpoint or begin anew"
        )


class _Newest(NamedTuple):
    step: int
    path: epath.Path
    record: dict[str, Any]


def _newest(folder: str) -> _Newest:
    """The newest checkpoint of a folder, without its arrays.

    Raises:
      InputError: it has none, or its newest is damaged. Later phases belong to that one,
        so none before it is taken instead.
    """
    path = phase_folder(folder) / FOLDER
    if not path.exists():
        raise InputError(f"init_from={folder}: has no folder {path}")
    for entry in _steps(path):
        try:
            return _Newest(entry.step, entry.path, _read(_read_record, entry))
        except _Damaged as damage:
            raise _damaged_start(folder, entry.path, damage) from damage
    raise InputError(f"init_from={folder}: no whole checkpoint in {path}")


def _damaged_start(folder: str, path: epath.Path, damage: "_Damaged") -> InputError:
    return InputError(
        f"init_from={folder}: {path} is damaged: {damage}; put a copy of it back, or "
        "delete that phase's folder and run the phase again"
    )


def _items(state: TrainState) -> dict[str, Any]:
    """A state as what is saved under one name each."""
    optimizer = {"step": state.step, "moments": state.opt_state}
    return {"params": state.params, "optimizer": optimizer}


def _state(items: dict[str, Any]) -> TrainState:
    optimizer = items["optimizer"]
    return TrainState(optimizer["step"], items["params"], optimizer["moments"])


def _steps(folder: epath.Path) -> list[orbax_path.step.Metadata]:
    """The checkpoints whose save came to its end, newest first."""
    if not folder.exists():
        return []
    # Not v1's, which reads the metadata of all and raises where one's is damaged.
    found = orbax_path.step.standard_name_format().find_all(folder)
    return sorted(found, key=lambda entry: entry.step, reverse=True)


def _aside(folder: epath.Path) -> list[epath.Path]:
    return sorted(folder.glob(f"{_ASIDE}-*")) if folder.exists() else []


def _set_aside(path: epath.Path) -> epath.Path:
    """Gives a checkpoint a name under which Orbax takes no notice of it."""
    names = [f"{_ASIDE}-{path.name}"]
    while (path.parent / names[-1]).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    aside = path.parent / names[-1]
    hosts.wait_for_all(f"before {aside}")
    if hosts.is_first():
        path.rename(aside)
    hosts.wait_for_all(f"after {aside}")
    return aside


class _Damaged(Exception):
    """A checkpoint is not what was saved; the message says in what."""


def _read(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that reads a checkpoint.

    Raises:
      _Damaged: it raised anything but what tells of the device or of memory, here or on
        another host; all hosts raise it then.
    """
    result, damage = None, ""
    with _hushed():
        try:
            result = function(*args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except _Damaged as error:
            damage = str(error)
        except Exception as error:  # Orbax and TensorStore raise of every kind.
            # Orbax takes an interruption for a failure of the read. And what lies in a
            # bucket that cannot be reached may be whole.
            chain = (e for e in _chain(error) if _is_no_damage(e))
            if other := next(chain, None):
                raise other from None
            damage = f"cannot be read ({_cause(error)})"
        if damage:
            # What waits in the exception's frames has its say now, while none is heard.
            gc.collect()
    if jax.process_count() > 1:
        is_whole = multihost_utils.process_allgather(np.array(not damage))
        if not is_whole.all():
            damage = damage or "another host finds it damaged"
    if damage:
        raise _Damaged(damage)
    return result


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Silences what Orbax leaves behind where one of many reads fails.

    It waits for none of the others, which then say at length that nobody does.
    """
    hook, verbosity = sys.unraisablehook, logging.get_verbosity()
    tasks = std_logging.getLogger("asyncio")
    is_disabled = tasks.disabled
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        sys.unraisablehook, tasks.disabled = lambda _: None, True
        logging.set_verbosity(logging.FATAL)
        try:
            yield
        finally:
            sys.unraisablehook, tasks.disabled = hook, is_disabled
            logging.set_verbosity(verbosity)


def _read_record(entry: orbax_path.step.Metadata) -> dict[str, Any]:
    """What `Checkpoints.save` noted beside the arrays."""
    path = entry.path
    # Orbax reads this of all checkpoints when it opens the folder, and may raise.
    _ = entry.commit_timestamp
    # By its own reader it would go on without what it cannot read.
    stored = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    record = dict(stored["custom_metadata"])
    if record.keys() & {"digest", "leaves"}:
        if record.pop("digest", None) != _digest(record):
            raise _Damaged("its metadata is not what was saved")
        return record
    # A version that had no checksums wrote it.
    leaves = {"params": ocp.checkpointables_metadata(path).metadata["params"]}
    described = {name: [str(x.dtype), x.shape, None] for name, x in _named(leaves)}
    return record | {"leaves": described}


def _load(path: epath.Path, record: dict[str, Any], abstract_items: Any) -> Any:
    """Loads items.

    Raises:
      _Damaged: they cannot be read, or are not what their checksums are of.
    """
    items = _read(ocp.load_checkpointables, path, abstract_items)
    for name, found in _describe(items).items():
        if record["leaves"].get(name, found)[-1] not in (None, found[-1]):
            raise _Damaged(f"array {name} has other bits than were saved")
    return items


def _check_resumable(
    folder: epath.Path,
    record: dict[str, Any],
    abstract_state: TrainState,
    sources: dict[str, str],
    provenance: dict[str, Any],
) -> None:
    """Raises InputError if the run has become another one, see `restore`."""
    if "rows" not in record:
        raise InputError(
            f"{folder}: written by a version that read the mixture in another "
            "order, so the run cannot go on exactly; start a new --workdir with "
            "--config.init_from set to this one"
        )
    # Orbax would cast and say nothing.
    items = _items(abstract_state)
    for name, found, wanted in _differences(
        record, items, lambda dtype, shape: (tuple(shape), dtype)
    ):
        raise InputError(
            f"{folder}: array {name} is {found} there and {wanted} now; "
            "start a new --workdir"
        )
    before = json.loads(record["provenance"])
    start = before["start"]
    if not is_same_start(start, provenance["start"]):
        key = "init_from" if "init_from" in provenance["start"] else "model.path"
        raise InputError(
            f"{key}: {folder} was trained from {start}, which is now "
            f"{provenance['start']}; put that back, or start a new --workdir"
        )
    stored = record["sources"]
    for name in sorted(stored.keys() | sources.keys()):
        if stored.get(name) == sources.get(name):
            continue
        if before.get("split_version") != provenance.get("split_version"):
            raise InputError(
                f"sources.{name}: {folder} was written by a version that held out other "
                "records, so the run cannot go on exactly; go on with that version, or "
                "start a new --workdir with --config.init_from set to this one"
            )
        raise InputError(
            f"sources.{name}: holds other text than when {folder} was "
            "written, so the run cannot go on exactly; put the files back, or "
            "start a new --workdir with --config.init_from set to this one"
        )


def is_same_start(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a phase's `provenance["start"]` is what it was.

    Where weights lie does not count, what they are does. What an older version did not
    note is not compared.
    """
    noted = then.keys() & now.keys()

    def compared(start):
        facts = {k: v for k, v in start.items() if k in noted or k not in _NOTED_LATER}
        return facts | ({"weights": ""} if "weights" in facts else {})

    return compared(then) == compared(now)


_NOTED_LATER = ("identity", "architecture")


def checksum(x: jax.Array) -> jax.Array:
    """A uint32 of an array's bits that one changed bit always changes.

    The sum over elements of `bits * (2 i + 1)` mod 2^32, i being the flat index: the
    factor is odd, so no power of two times it vanishes. Sums mod 2^32 are exact in any
    order, so it does not depend on how the array is spread over devices, and it costs one
    pass over it. Elements of 8 bytes count as two of 4.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        # Mod 2^32 also where there are more elements.
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += along * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


@jax.jit
def _checksums(tree: Any) -> Any:
    return jax.tree.map(checksum, tree)


def _digest(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _describe(tree: Any) -> dict[str, list[Any]]:
    """Name of a leaf -> its dtype, shape and checksum, as JSON gives them back."""
    checksums = jax.tree.leaves(jax.device_get(_checksums(tree)))
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(value)]
        for (name, leaf), value in zip(_named(tree), checksums, strict=True)
    }


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _differences(
    record: dict[str, Any], wanted: dict[str, Any], describe: Callable[[str, Any], Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Arrays that are described otherwise: `(name, stored, wanted)`.

    Only of items that both have: an old record has none of the optimizer's.
    """
    stored = {name: describe(*leaf[:2]) for name, leaf in record["leaves"].items()}
    expected = {name: describe(str(x.dtype), x.shape) for name, x in _named(wanted)}
    items = {_item(name) for name in stored} & {_item(name) for name in expected}
    for name in sorted(stored.keys() | expected.keys()):
        if _item(name) in items and stored.get(name) != expected.get(name):
            yield name, stored.get(name, "absent"), expected.get(name, "absent")


def _item(name: str) -> str:
    """The item that an array is of: the first key of `['params']['embedding']`."""
    return name.split("'")[1]


def _is_no_damage(error: BaseException) -> bool:
    return not isinstance(error, Exception) or paths.is_bucket_error(error)


def _cause(error: BaseException) -> str:
    """What began it, in one line; TensorStore's errors end with pages of settings."""
    *_, first = _chain(error)
    text = str(first).partition(" [")[0].split("\n")[0]
    return f"{type(first).__name__}: {text}"[:400]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from or during, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
