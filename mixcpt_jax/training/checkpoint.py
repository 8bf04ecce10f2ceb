"""Checkpoints with Orbax: exact resume of a phase, and hand-over to the next.

A checkpoint at step n holds everything that the steps after n depend on: the items
`params` and `optimizer` (step count and moments), and as metadata the config, a hash of
each source, and the provenance: what the phase started from and which files it read. The
data iterator's position is the number of rows read, because the stream is a function of
sources, seed and row; the hashes show whether the sources are unchanged. The next phase
reads only `params`. The frozen model is never saved: it is loaded again from where the
phase started, and the provenance shows whether that is unchanged.

Saves are asynchronous and atomic: a checkpoint appears under its number only when it is
complete, so a killed run leaves the last complete one in place. Later damage is detected
when the checkpoint is read. Its manifest lists the size of every file and a hash of every
small one, and is checked before Orbax parses them. The metadata holds a checksum of every
array, computed on the devices, and a digest of itself. A run that resumes renames a damaged
checkpoint, never deletes it, and uses the previous one. Hand-over to the next phase uses
only the newest checkpoint, and fails if it is damaged.
"""

import contextlib
import gc
import hashlib
import json
import logging as std_logging
import re
import sys
import time
import types
import uuid
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint.experimental import v1 as ocp

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import finite, hosts, lease
from mixcpt_jax.runtime import record as record_lib
from mixcpt_jax.training.steps import TrainState

FOLDER = "checkpoints"
CONFIG_FILE = "config.json"  # of the phase, beside that folder
_DAMAGED = "damaged"
_OVER_BUDGET = "over-budget"
RECORD_FOLDER = f"{FOLDER}.record"  # the copy of the phase's record
_MANIFEST = "manifest.json"
_METADATA = "_CHECKPOINT_METADATA"
_SECONDS_FOR_METADATA = 300.0
# In a bucket, Orbax writes files of this name last; only their existence matters.
_COMMITTED = "commit_success.txt"
# Files up to this size are hashed; most files of arrays are larger.
_MAX_HASHED_BYTES = 2**24
_RECORD = {
    "id": str,
    "step?": int,  # earlier versions had neither of these two
    "rows?": int,
    "config": str,
    "sources": {str: str},
    "provenance": str,
    "leaves": {str: [object]},
    # Lengths and hashes of the record's files; earlier versions had copies of the files.
    "record?": {str: [(int, str)]},
    "has_manifest?": bool,
    "files?": {str: str},
}
_MANIFEST_SHAPE = {
    "files": {str: [(int, str, None)]},
    "metadata": str,
    "digest": str,
}
_METADATA_SHAPE = {
    "custom_metadata": small_files.OBJECT,
    "commit_timestamp_nsecs?": (int, None),
}
# The name of an array; its first key is the item.
_LEAF = re.compile(r"\['(params|optimizer)'\].*", re.DOTALL)


def _steady_clock() -> types.SimpleNamespace:
    """Like the module `time`, but `time()` does not jump when the clock is set."""
    offset = time.time() - time.monotonic()
    return types.SimpleNamespace(
        **vars(time) | {"time": lambda: offset + time.monotonic()}
    )


# Orbax computes deadlines from `time.time()`, so setting the clock during a save would end
# the run.
_CLOCK = _steady_clock()
for _name, _module in list(sys.modules.items()):
    if _name.startswith("orbax.checkpoint.") and getattr(_module, "time", 0) is time:
        _module.time = _CLOCK


class _Preserved:
    """A preservation policy of Orbax: the newest checkpoints, and that of `also`."""

    def __init__(self, number: int):
        self._number, self.also = number, None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        newest = {entry.step for entry in checkpoints[-self._number :]}
        return [entry.step in newest | {self.also} for entry in checkpoints]


class Checkpoints:
    """Writes the checkpoints of one phase; a context manager."""

    def __init__(self, workdir: epath.Path, keep_last: int = 2):
        """Opens `workdir/checkpoints`, creating it if missing; call `restore` first.

        Args:
          workdir: the phase's folder.
          keep_last: the number of newest checkpoints to keep.
        """
        self._folder = workdir / FOLDER
        self._step, self._id = -1, ""  # of the save in progress
        self._copy = record_lib.Copy(workdir / RECORD_FOLDER)
        context = ocp.Context()
        # Orbax makes deep copies of its options, but not of a function.
        context.asynchronous.post_finalization_callback = lambda: self._write_manifest()
        self._policy = _Preserved(keep_last)
        self._checkpointer = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=self._policy,
            cleanup_tmp_directories=True,
            context=context,
        )

    def __enter__(self) -> "Checkpoints":
        # Never removed: threads of a failed save may log after the context ends.
        logging.get_absl_logger().addFilter(_is_not_raised_too)
        return self

    def __exit__(self, kind, *exception) -> None:
        # Report the first error, not one that follows from it.
        suppressed = () if kind is None else (InputError,)
        with contextlib.suppress(*suppressed), self._writing():
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
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Starts a save and returns once the device's arrays are copied.

        Args:
          state: the state after `step` steps.
          step: the checkpoint's number.
          rows: the number of rows of the stream read so far.
          config: written beside the arrays.
          sources: source name -> hash of its tokens, checked by `restore`.
          provenance: `start` and `teacher`, also checked, and other facts to record.
          files: the phase's record up to this step, for `read_files`.

        Raises:
          InputError: this checkpoint or the previous one cannot be written, or another
            process owns the folder.
        """
        lease.check(self._folder, must_ask=True)
        self.wait()  # which Orbax would do later
        with self._writing():
            steps = (entry.step for entry in _steps(self._folder))
            lengths = self._copy.add(step, files or {}, steps)
        items = _items(state)
        record = {
            "id": uuid.uuid4().hex,
            "step": step,
            "rows": rows,
            "config": paths.to_json(config),
            "sources": sources,
            "provenance": paths.to_json(provenance),
            "leaves": _describe(items),
            "record": lengths,
            "has_manifest": True,
        }
        self._step, self._id = step, record["id"]
        with self._writing():
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                custom_metadata=record | {"digest": _digest(record)},
            )

    def keep(self, step: int | None) -> None:
        """Keeps also the checkpoint of this step, however many newer ones there are."""
        self._policy.also = step

    def wait(self) -> None:
        """Returns when every save is on disk.

        Raises:
          InputError: a checkpoint cannot be written.
        """
        with self._writing():
            self._checkpointer.wait()

    def _write_manifest(self) -> None:
        """Writes the manifest of the checkpoint whose files Orbax has just completed.

        Orbax calls this on the first host. On a disk the checkpoint does not have its
        number yet.
        """
        unfinished = [*self._folder.glob(f"{self._step}.orbax-checkpoint-tmp*")]
        path = (unfinished or [self._folder / str(self._step)])[0]
        files = {
            name: [size, _hash_of(path / name) if size <= _MAX_HASHED_BYTES else None]
            for name, size in paths.sizes(path).items()
            if name != _METADATA and not name.endswith(_COMMITTED)
        }
        manifest = {"files": files, "metadata": _hash_of_metadata(self._metadata(path))}
        text = paths.to_json(manifest | {"digest": _hash(manifest)}, indent=1)
        paths.replace(path / _MANIFEST, text)

    def _metadata(self, path: epath.Path) -> dict[str, Any]:
        """The metadata of the save, which another thread of Orbax may not have written.

        Raises:
          OSError: that thread has not written it for minutes.
        """
        deadline = time.monotonic() + _SECONDS_FOR_METADATA
        while time.monotonic() < deadline:
            with contextlib.suppress(InputError, OSError):  # half of it is written
                metadata = _read_metadata(path)
                if metadata["custom_metadata"].get("id") == self._id:
                    return metadata
            time.sleep(0.01)
        raise OSError(f"{path / _METADATA}: was not written")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._folder}: a checkpoint cannot be written ({_cause(error)}); free "
                "space or fix that, and the same command resumes from the one before"
            ) from error


def _is_not_raised_too(entry: std_logging.LogRecord) -> bool:
    """False for logs of Orbax's threads about an exception that they also raise."""
    return not (entry.exc_info and "orbax" in entry.pathname)


def check_folder(workdir: epath.Path) -> None:
    """Writes a tiny checkpoint, reads it back and removes it; on every host.

    This detects a folder in which checkpoints cannot be written or read before hours of
    training, not after. Folders created for the check are also removed, so a run that is
    refused afterwards leaves nothing behind.

    Args:
      workdir: the phase's folder; it need not exist.

    Raises:
      InputError: writing or reading failed, or the values read differ.
    """
    folder = workdir / f"{FOLDER}.check"
    # Use the devices of all hosts: on several hosts, Orbax does not save arrays of a single
    # one.
    everywhere = jax.make_mesh((jax.device_count(),), ("devices",))
    replicated = jax.NamedSharding(everywhere, jax.P())
    values = np.arange(4.0, dtype=np.float32)
    tree = {
        "x": jax.make_array_from_callback(values.shape, replicated, values.__getitem__)
    }
    missing = []  # from the phase's folder upwards
    # Never removed, as in `Checkpoints`.
    logging.get_absl_logger().addFilter(_is_not_raised_too)
    try:
        if hosts.is_first():  # Orbax would log pages about a failed write
            if not paths.is_remote(workdir):  # a bucket has no folders
                above = (workdir, *workdir.parents)
                missing = [path for path in above if not path.exists()]
            workdir.mkdir(parents=True, exist_ok=True)
            paths.replace(workdir / f"{FOLDER}.test", "")
            (workdir / f"{FOLDER}.test").unlink()
        with _without_logs():
            ocp.save(folder, tree, overwrite=True)
            is_same = np.array_equal(ocp.load(folder, tree)["x"], values)
        problem = "" if is_same else "it has other values"
    except Exception as error:  # Orbax and TensorStore raise of every kind.
        if other := next((e for e in _chain(error) if _is_not_damage(e)), None):
            raise other from None
        problem = _cause(error)
    if problem:
        raise InputError(
            f"{workdir}: a checkpoint cannot be written there and read back ({problem}); "
            "give another --workdir, or free space"
        )
    hosts.wait_for_all(f"check of {workdir}")
    if hosts.is_first():
        folder.rmtree()
        with contextlib.suppress(OSError):  # a folder holds another run's files
            for path in missing:
                path.rmdir()


class Restored(NamedTuple):
    """The newest undamaged checkpoint: its step, the rows of the stream read, the state."""

    step: int
    rows: int
    state: TrainState


class Kept(NamedTuple):
    """What a checkpoint keeps of its phase: step, config, record's files, provenance."""

    step: int
    config: dict[str, Any]
    files: dict[str, str]
    provenance: dict[str, Any]


def restore(
    workdir: epath.Path,
    abstract_state: TrainState,
    sources: dict[str, str],
    provenance: dict[str, Any],
    config: ml_collections.ConfigDict | None = None,
) -> Restored | None:
    """Loads the newest undamaged checkpoint; None if none was ever saved.

    Newer, damaged checkpoints are renamed to `damaged-STEP`, with a warning, so that their
    steps can be saved again.

    Args:
      workdir: the phase's folder.
      abstract_state: the shapes, dtypes and shardings to load.
      sources: as given to `save`.
      provenance: as given to `save`.
      config: the phase's config, if the saved one must equal it.

    Raises:
      InputError: the state has other shapes or dtypes; a source, `init_from` or the
        config has changed since the run began; or a parameter is not finite; or all
        checkpoints are damaged (then none is renamed).
    """
    folder = workdir / FOLDER
    damaged: dict[epath.Path, str] = {}
    restored = None
    for entry in _steps(folder):
        path = entry.path
        try:
            record = _read(_read_record, entry)
            # For checkpoints before the newest undamaged one, Orbax reads only the
            # metadata.
            if restored is None:
                _check_config(path, record, config)
                _check_resumable(folder, record, abstract_state, sources, provenance)
                _read(_files, entry, record)
                items = _load(path, record, _items(abstract_state))
                state = _state(items)
                # Earlier versions did not record the step.
                if "step" not in record and int(state.step) != entry.step:
                    raise _Damaged(f"it is the state after step {int(state.step)}")
                restored = Restored(entry.step, record["rows"], state)
        except _Damaged as damage:
            damaged[path] = str(damage)
    if restored is None:
        found = [f"{path.name} ({why})" for path, why in damaged.items()]
        found += [f"{path.name} (renamed before)" for path in _renamed(folder)]
        if found:
            raise InputError(
                f"{folder}: no checkpoint is whole: {', '.join(found)}; restore a copy of "
                "one under its number and run the same command, or delete the folder to "
                "start the phase again"
            )
        return None
    _check_finite(f"{folder}/{restored.step}", restored.state.params)
    for path, why in damaged.items():
        logging.warning(
            "%s is damaged: %s; it is now %s, and the run resumes from step %d",
            path,
            why,
            _rename(path, _DAMAGED).name,
            restored.step,
        )
    return restored


def set_aside(workdir: epath.Path, step: int) -> None:
    """Renames the checkpoints after a step to `over-budget-STEP`, the newest first.

    The phase then ends with that step's checkpoint.
    """
    for entry in _steps(workdir / FOLDER):
        if entry.step > step:
            _rename(entry.path, _OVER_BUDGET)


def newest_step(workdir: epath.Path) -> int | None:
    """The step of the newest checkpoint, damaged or not; None if there are none."""
    found = _steps(workdir / FOLDER)
    return found[0].step if found else None


def phase_folder(folder: str) -> epath.Path:
    """The phase's folder, given that folder or its `checkpoints`."""
    path = paths.absolute(folder)
    is_inner = path.name == FOLDER and not (path / FOLDER).exists()
    return path.parent if is_inner else path


def identity(folder: str) -> dict[str, Any]:
    """`step` and `id` of a folder's newest checkpoint; each save has its own id."""
    newest = _newest(folder)
    return {"step": newest.step, "id": newest.record["id"]}


def exists(folder: str) -> bool:
    """Whether a phase's folder has checkpoints."""
    return (phase_folder(folder) / FOLDER).exists()


def read_provenance(folder: str) -> dict[str, Any]:
    """The provenance in the newest checkpoint: its phase's start and the files it read."""
    return json.loads(_newest(folder).record["provenance"])


def read_files(workdir: epath.Path, step: int) -> dict[str, str]:
    """The copy of the phase's record in a restored checkpoint.

    Returns:
      Name of a file -> its text; empty if the version that saved it kept no copies.
    """
    entry = next(e for e in _steps(workdir / FOLDER) if e.step == step)
    return _read(_files, entry, _read(_read_record, entry))


def newest_readable(workdir: epath.Path) -> Kept | None:
    """The content of the newest checkpoint with readable metadata; None if there is none.

    One host may call it alone; it reads no arrays.
    """
    for entry in _steps(workdir / FOLDER):
        try:
            with _without_logs():
                record = _read_record(entry)
                files = _files(entry, record)
        except Exception as error:  # Orbax raises of every kind.
            if _is_not_damage(error):
                raise
            continue
        config, provenance = map(json.loads, (record["config"], record["provenance"]))
        return Kept(entry.step, config, files, provenance)
    return None


def read_config(folder: str) -> dict[str, Any]:
    """The config that a folder's newest checkpoint was trained with."""
    return json.loads(_newest(folder).record["config"])


def load_params(folder: str, abstract_params: Any) -> Any:
    """Reads only the trained parameters of a folder's newest checkpoint.

    Args:
      folder: a phase's folder, or its `checkpoints`.
      abstract_params: shapes, shardings and the dtypes to cast to.

    Raises:
      InputError: there is no checkpoint, or it is of another model, damaged, or has a
        parameter that is not finite.
    """
    newest = _newest(folder)
    template = {"params": abstract_params}
    for name, found, expected in _differences(
        newest.record, template, lambda dtype, shape: tuple(shape)
    ):
        raise InputError(
            f"init_from={folder}: array {name} is {found} there and {expected} in "
            "model.path; give the checkpoint's own model"
        )
    # Load in the saved dtypes: the checksums were computed on these.
    stored = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            newest.record["leaves"][jax.tree_util.keystr(path)][0],
            sharding=leaf.sharding,
        ),
        template,
    )
    try:
        loaded = _load(newest.path, newest.record, stored)
    except _Damaged as damage:
        raise _damaged_start(folder, newest.path, damage) from damage
    _check_finite(newest.path, loaded["params"])
    return jax.tree.map(
        lambda leaf, abstract: leaf.astype(abstract.dtype),
        loaded["params"],
        abstract_params,
    )


def _check_finite(path: epath.Path | str, params: Any) -> None:
    if broken := finite.find_broken(params):
        raise InputError(
            f"{path}: its parameter {broken} holds values that are not finite numbers; "
            "its training has diverged: use another checkpoint or start again"
        )


class _Newest(NamedTuple):
    step: int
    path: epath.Path
    record: dict[str, Any]


def _newest(folder: str) -> _Newest:
    """The newest checkpoint of a folder, without its arrays.

    Raises:
      InputError: it has none, or its newest is damaged. No earlier one is used instead,
        because later phases must start from the newest.
    """
    path = phase_folder(folder) / FOLDER
    if not path.exists():
        raise InputError(f"init_from={folder}: has no folder {path}")
    for entry in _steps(path):
        try:
            record = _read(_read_record, entry)
        except _Damaged as damage:
            raise _damaged_start(folder, entry.path, damage) from damage
        _check_config(entry.path, record, _config_beside(path))
        return _Newest(entry.step, entry.path, record)
    raise InputError(f"init_from={folder}: no whole checkpoint in {path}")


def _config_beside(checkpoints: epath.Path) -> ml_collections.ConfigDict | None:
    """The config that the phase of these checkpoints started with, if it can be read."""
    try:
        stored = small_files.read_json(checkpoints.parent / CONFIG_FILE)
        return ml_collections.ConfigDict(stored)
    except (InputError, ValueError, TypeError):
        return None


def _damaged_start(folder: str, path: epath.Path, damage: "_Damaged") -> InputError:
    return InputError(
        f"init_from={folder}: {path} is damaged: {damage}; restore a copy of it, or "
        "delete that phase's folder and run the phase again"
    )


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint, from a state."""
    optimizer = {"step": state.step, "moments": state.opt_state}
    return {"params": state.params, "optimizer": optimizer}


def _state(items: dict[str, Any]) -> TrainState:
    optimizer = items["optimizer"]
    return TrainState(optimizer["step"], items["params"], optimizer["moments"])


def _steps(folder: epath.Path) -> list[orbax_path.step.Metadata]:
    """The checkpoints whose save was completed, newest first."""
    if not folder.exists():
        return []
    # Not v1's function, which reads the metadata of all and raises if one is damaged.
    found = orbax_path.step.standard_name_format().find_all(folder)
    return sorted(found, key=lambda entry: entry.step, reverse=True)


def _renamed(folder: epath.Path) -> list[epath.Path]:
    """The damaged checkpoints that earlier runs renamed."""
    return sorted(folder.glob(f"{_DAMAGED}-*")) if folder.exists() else []


def _rename(path: epath.Path, why: str) -> epath.Path:
    """Renames a checkpoint to `WHY-STEP`, so that Orbax ignores it."""
    names = [f"{why}-{path.name}"]
    while (path.parent / names[-1]).exists():
        names.append(f"{names[0]}-{len(names) + 1}")
    renamed = path.parent / names[-1]
    hosts.wait_for_all(f"before {renamed}")
    if hosts.is_first():
        path.rename(renamed)
    hosts.wait_for_all(f"after {renamed}")
    return renamed


class _Damaged(Exception):
    """A checkpoint is not what was saved; the message says how it differs."""


def _read(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that reads a checkpoint.

    Raises:
      _Damaged: it raised an exception, except one of the device or of memory, here or
        on another host; then all hosts raise it.
    """
    result, damage = None, ""
    with _without_logs():
        try:
            result = function(*args)
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except (_Damaged, InputError) as error:
            damage = str(error)
        except Exception as error:  # Orbax and TensorStore raise of every kind.
            # Orbax reports an interruption as a failed read. And a checkpoint in a bucket
            # that cannot be reached may be whole.
            chain = (e for e in _chain(error) if _is_not_damage(e))
            if other := next(chain, None):
                raise other from None
            damage = f"cannot be read ({_cause(error)})"
        if damage:
            # The exception's frames hold reads; these are finalized while logs are off.
            gc.collect()
    if jax.process_count() > 1:
        is_whole = multihost_utils.process_allgather(np.array(not damage))
        if not is_whole.all():
            damage = damage or "another host finds it damaged"
    if damage:
        raise _Damaged(damage)
    return result


@contextlib.contextmanager
def _without_logs() -> Iterator[None]:
    """Silences the logs of reads that Orbax abandons when one of them fails."""
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


def _read_metadata(path: epath.Path) -> dict[str, Any]:
    # Orbax's own reader skips what it cannot read.
    return small_files.read_json(
        path / _METADATA, _METADATA_SHAPE, most_bytes=small_files.MOST_BYTES_OF_ROWS
    )


def _hash_of_metadata(metadata: dict[str, Any]) -> str:
    # Orbax adds the time when it gives the checkpoint its number.
    return _hash(metadata | {"commit_timestamp_nsecs": None})


def _hash_of(file: epath.Path) -> str:
    return hashlib.sha256(small_files.read_bytes(file)).hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: epath.Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None for one of an earlier version.

    Raises:
      _Damaged: it is not the one that was saved.
      InputError: it cannot be read.
    """
    if not (path / _MANIFEST).exists():
        return None
    manifest = small_files.read_json(path / _MANIFEST, _MANIFEST_SHAPE)
    if manifest.pop("digest") != _hash(manifest):
        raise _Damaged(f"its {_MANIFEST} is not what was saved")
    return manifest


def _check_files(path: epath.Path, items: Container[str]) -> None:
    """Checks the files of items against the manifest, before Orbax reads them.

    Args:
      path: of the checkpoint.
      items: their names.

    Raises:
      _Damaged: names the first file that is missing or has another size or content.
      InputError: the manifest or a file cannot be read.
    """
    manifest = _read_manifest(path)
    if manifest is None or not hosts.is_first():
        return
    found = paths.sizes(path)
    for name, (size, saved) in manifest["files"].items():
        if name.partition("/")[0] not in items:
            continue
        if name not in found:
            raise _Damaged(f"its file {name} is missing")
        if found[name] != size:
            raise _Damaged(f"its file {name} has {found[name]:,} bytes, not {size:,}")
        if saved is not None and _hash_of(path / name) != saved:
            raise _Damaged(f"its file {name} is not what was saved")


def _read_record(entry: orbax_path.step.Metadata) -> dict[str, Any]:
    """The metadata that `Checkpoints.save` wrote beside the arrays."""
    path = entry.path
    stored, manifest = _read_metadata(path), _read_manifest(path)
    if manifest and manifest["metadata"] != _hash_of_metadata(stored):
        raise _Damaged("its metadata is not what was saved")
    # Orbax reads it from all checkpoints when it opens the folder, and may raise.
    _ = entry.commit_timestamp
    record = stored["custom_metadata"]
    if record.keys() & {"digest", "leaves"}:
        if record.pop("digest", None) != _digest(record):
            raise _Damaged("its metadata is not what was saved")
    else:  # written by a version without checksums
        leaves = {"params": ocp.checkpointables_metadata(path).metadata["params"]}
        described = {name: [str(x.dtype), x.shape, None] for name, x in _named(leaves)}
        record["leaves"] = described
    _check_record(record)
    if record.get("has_manifest") and manifest is None:
        raise _Damaged(f"its {_MANIFEST} is missing")
    if record.get("step", entry.step) != entry.step:
        raise _Damaged(f"it is the checkpoint of step {record['step']}")
    return record


def _check_record(record: dict[str, Any]) -> None:
    """Checks the shape of metadata, which a matching digest does not guarantee.

    Raises:
      InputError: names the first part of another shape.
      _Damaged: a copy of a file or the description of an array is malformed.
    """
    place = "its metadata"
    small_files.check(record, _RECORD, place)
    config = small_files.parse(record["config"], f"{place}: config", small_files.OBJECT)
    config_lib.check_stored(config)
    shape = {"start": small_files.OBJECT, "commits?": {str: str}}
    small_files.parse(record["provenance"], f"{place}: provenance", shape)
    for name, text in _old_files(record).items():
        if not record_lib.is_copy(name, text):
            raise _Damaged(f"its copy of {name} is not one")
    for name, leaf in record["leaves"].items():
        match leaf:
            case [str(dtype), [*shape], None | int()] if _LEAF.fullmatch(name):
                jnp.dtype(dtype)
                if all(type(size) is int and size >= 0 for size in shape):
                    continue
        raise _Damaged(f"its metadata has no valid description of array {name}")


def _files(entry: orbax_path.step.Metadata, record: dict[str, Any]) -> dict[str, str]:
    """The files of the phase's record as they were at a checkpoint.

    Raises:
      InputError: see `record.read_copy`.
    """
    if "record" not in record:
        return _old_files(record)
    workdir = entry.path.parent.parent
    return record_lib.read_copy(
        workdir, workdir / RECORD_FOLDER, entry.step, record["record"]
    )


def _old_files(record: dict[str, Any]) -> dict[str, str]:
    """The files that earlier versions stored in the metadata."""
    return {
        name: record_lib.unpack(text, f"its copy of {name}").decode()
        for name, text in record.get("files", {}).items()
    }


def _load(path: epath.Path, record: dict[str, Any], abstract_items: Any) -> Any:
    """Loads items.

    Raises:
      _Damaged: they cannot be read, or their checksums differ.
    """
    # All hosts learn of damage before they begin to read together.
    _read(_check_files, path, abstract_items)
    items = _read(ocp.load_checkpointables, path, abstract_items)
    for name, found in _describe(items).items():
        if record["leaves"].get(name, found)[-1] not in (None, found[-1]):
            raise _Damaged(f"array {name} has other bits than were saved")
    return items


def _check_config(
    path: epath.Path, record: dict[str, Any], config: ml_collections.ConfigDict | None
) -> None:
    """Raises InputError if a checkpoint is from a run with another config."""
    if config is None:
        return
    saved = json.loads(record["config"])
    try:
        difference = config_lib.first_difference(config, saved)
    except AttributeError:  # an earlier version wrote a config without such a key
        return
    if difference is not None:
        key, then, now = difference
        raise InputError(
            f"{path}: was saved by a run with {key}={then!r}, this one has {now!r}; move "
            "it away if it is of another run, else give the config that it was saved with"
        )


def _check_resumable(
    folder: epath.Path,
    record: dict[str, Any],
    abstract_state: TrainState,
    sources: dict[str, str],
    provenance: dict[str, Any],
) -> None:
    """Raises InputError if the run has changed since the checkpoint, see `restore`."""
    if "rows" not in record:
        raise InputError(
            f"{folder}: written by a version that read the mixture in another "
            "order, so the run cannot resume exactly; start a new --workdir with "
            "--config.init_from set to this one"
        )
    # Orbax would cast silently.
    items = _items(abstract_state)
    for name, found, expected in _differences(
        record, items, lambda dtype, shape: (tuple(shape), dtype)
    ):
        raise InputError(
            f"{folder}: array {name} is {found} there and {expected} now; "
            "start a new --workdir"
        )
    before = json.loads(record["provenance"])
    for part, section, verb in (
        ("start", "model", "trained from"),
        ("teacher", "teacher", "distilled from"),
    ):
        then, now = (facts.get(part, {}) for facts in (before, provenance))
        if not is_same_start(then, now):
            key = f"{section}.path"
            if "init_from" in now:
                key = "init_from" if part == "start" else "teacher.init_from"
            raise InputError(
                f"{key}: {folder} was {verb} {then or 'its start'}, which is now "
                f"{now or 'its start'}; restore it, or start a new --workdir"
            )
    stored = record["sources"]
    for name in sorted(stored.keys() | sources.keys()):
        if stored.get(name) == sources.get(name):
            continue
        if before.get("split_version") != provenance.get("split_version"):
            raise InputError(
                f"sources.{name}: {folder} was written by a version with another holdout, "
                "so the run cannot resume exactly; use that version, or start a new "
                "--workdir with --config.init_from set to this one"
            )
        raise InputError(
            f"sources.{name}: holds other text than when {folder} was "
            "written, so the run cannot resume exactly; restore the files, or "
            "start a new --workdir with --config.init_from set to this one"
        )


def is_same_start(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a phase's `provenance["start"]` is unchanged.

    The identity of the weights is compared, not their path. Facts that an older version did
    not record are not compared.
    """
    recorded = then.keys() & now.keys()

    def compared(start):
        facts = {
            k: v for k, v in start.items() if k in recorded or k not in _RECORDED_LATER
        }
        return facts | ({"weights": ""} if "weights" in facts else {})

    return compared(then) == compared(now)


_RECORDED_LATER = ("identity", "architecture")


def checksum(x: jax.Array) -> jax.Array:
    """A uint32 of an array's bits that changes with any single bit.

    The sum over elements of `bits * (2 i + 1)` mod 2^32, where i is the flat index. The
    factor is odd, so no power of two times it vanishes. Sums mod 2^32 are exact in any
    order, so the checksum does not depend on the sharding, and it costs one pass over the
    array. Elements of 8 bytes count as two of 4.
    """
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = min(x.dtype.itemsize, 4)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * width}").astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        # Indices wrap mod 2^32 for larger arrays.
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
    """Name of a leaf -> its dtype, shape and checksum, as read back from JSON."""
    checksums = jax.tree.leaves(jax.device_get(_checksums(tree)))
    return {
        name: [str(leaf.dtype), list(leaf.shape), int(value)]
        for (name, leaf), value in zip(_named(tree), checksums, strict=True)
    }


def _named(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _differences(
    record: dict[str, Any], items: dict[str, Any], describe: Callable[[str, Any], Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Arrays whose descriptions differ: `(name, stored, expected)`.

    Compares only items that both have: an old record lacks the optimizer's arrays.
    """
    stored = {name: describe(*leaf[:2]) for name, leaf in record["leaves"].items()}
    expected = {name: describe(str(x.dtype), x.shape) for name, x in _named(items)}
    shared = {_item(name) for name in stored} & {_item(name) for name in expected}
    for name in sorted(stored.keys() | expected.keys()):
        if _item(name) in shared and stored.get(name) != expected.get(name):
            yield name, stored.get(name, "absent"), expected.get(name, "absent")


def _item(name: str) -> str:
    """The item of an array: the first key of `['params']['embedding']`."""
    return name.split("'")[1]


def _is_not_damage(error: BaseException) -> bool:
    return not isinstance(error, Exception) or paths.is_bucket_error(error)


def _cause(error: BaseException) -> str:
    """The root cause, in one line; TensorStore's errors end with pages of settings."""
    *_, first = _chain(error)
    text = str(first).partition(" [")[0].split("\n")[0]
    return f"{type(first).__name__}: {text}"[:400]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, the one that it was raised from or during, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
