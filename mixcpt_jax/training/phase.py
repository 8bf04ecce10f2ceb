"""What every phase has: a folder, a config, a model, a mesh, and a start.

A phase starts from the end of another phase, `init_from`; without that, from the pretrained
weights in `model.path`, or from random weights if the config says so. The starting weights
are also the frozen model: the reference of DPO, the base of adapters and, unless the config
names another one, the teacher of continual pre-training.
"""

import dataclasses
import datetime
import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from etils import epath

from mixcpt_jax import __version__
from mixcpt_jax import config as config_lib
from mixcpt_jax.core import mesh_shape, paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import OBJECT
from mixcpt_jax.data import corpus, hub, pipeline
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.objectives import interface, streamed
from mixcpt_jax.runtime import hosts, lease, record, sharding, terminal
from mixcpt_jax.training import checkpoint, steps

CONFIG_FILE = checkpoint.CONFIG_FILE
RESULTS_FILE = "results.json"
PROVENANCE_FILE = "provenance.json"
_MEASURES = {str: float}
_MEASURED = {
    "before": (_MEASURES, None),
    "after": _MEASURES,
    "seconds?": float,
    "tokens_per_second?": (float, None),
}
# The shape of `results.json`, by job.
_RESULTS: dict[str, small_files.Shape] = {
    "train": _MEASURED,
    "evaluate": _MEASURED,
    "merge": _MEASURED | {"share": float, "curve": [_MEASURES]},
    "select": {"selection": {str: {str: object}}, "seconds?": float},
    "generate": {"generated": {str: int}, "folder": str, "seconds?": float},
    "export": {"folder": str, "dtype": str, "pushed?": str, "seconds?": float},
}
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# NFS caches the absence of a file for half a minute by default.
_SECONDS_UNTIL_SEEN = 60


class OtherTeacher(NamedTuple):
    """A teacher that is not the model that the phase starts from.

    Attributes:
      model_config: its architecture.
      num_tokens: of the vocabulary that it shares with the model; later rows of their
        embeddings are padding.
    """

    model_config: transformer.ModelConfig
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run, before anything is computed.

    Attributes:
      name: for the terminal.
      folder: where it writes.
      given: its config as written to the folder.
      config: the same with "phase:NAME" paths resolved, and commits in paths on the Hub.
      model_config: the architecture.
      tokenizer: the model's.
      mesh: over all devices of all hosts.
      started: when this process started the phase, on the monotonic clock.
      commits: repository and revision on the Hub -> the commit that the phase reads.
      other_teacher: None if the model that the phase starts from is the teacher, or if
        there is none.
    """

    name: str
    folder: epath.Path
    given: ml_collections.ConfigDict
    config: ml_collections.ConfigDict
    model_config: transformer.ModelConfig
    tokenizer: tokenizer.Tokenizer
    mesh: jax.sharding.Mesh
    started: float
    commits: dict[str, str] = dataclasses.field(default_factory=dict)
    other_teacher: OtherTeacher | None = None

    @property
    def lora(self) -> lora_lib.Lora | None:
        return _lora(self.config.lora)

    @property
    def head_options(self) -> dict[str, Any]:
        """The settings of `streamed.head_loss`."""
        head = self.config.head
        return {
            "chunk_size": head.chunk_size or None,
            "block_size": head.block_size or None,
            "vocab_tile": head.vocab_tile or None,
            "vocab_parallel": head.vocab_parallel,
        }

    @property
    def compiler_options(self) -> dict[str, str] | None:
        return compiler_options(self.mesh)

    def forward(self, remat: str = "none", lora: lora_lib.Lora | None = None):
        """The network, in the phase's compute dtype."""
        dtype = self.config.model.compute_dtype
        return transformer.make_forward(self.model_config, dtype, remat, lora)

    def starting_params(self, dtype: str) -> transformer.Params:
        """The full parameters that the phase starts from, sharded.

        Raises:
          InputError: they are missing, damaged or of another model.
        """
        return _start(self.config, self.model_config, self.mesh, dtype)

    def original_params(self, dtype: str) -> transformer.Params:
        """The weights of `model.path`, from which the first phase of a run starts."""
        config = ml_collections.ConfigDict(self.config.to_dict())
        config.init_from = ""
        return _start(config, self.model_config, self.mesh, dtype)

    @property
    def frozen_dtype(self) -> str:
        """The dtype of the frozen model.

        If the phase starts from a model with adapters, these are merged into it; rounding
        to a lower precision than they were trained with would lose them.
        """
        folder = self.config.init_from if self.lora else ""
        return _frozen_dtype(self.config.model, folder)

    @property
    def teacher_config(self) -> transformer.ModelConfig:
        """The teacher's architecture, with the model's number of rows per embedding."""
        if self.other_teacher is None:
            return self.model_config
        return dataclasses.replace(
            self.other_teacher.model_config, vocab_size=self.model_config.vocab_size
        )

    @property
    def teacher_dtype(self) -> str:
        if self.other_teacher is None:
            return self.frozen_dtype
        return _frozen_dtype(self.config.model, self.config.teacher.init_from)

    @property
    def num_tokens(self) -> int | None:
        """How many tokens have a probability in training; None: all rows."""
        return self.other_teacher and self.other_teacher.num_tokens

    @property
    def teacher_name(self) -> str:
        """The teacher's path, for the terminal."""
        has_other = self.other_teacher is not None
        return _name_of_start(
            _teacher_as_start(self.config) if has_other else self.config
        )

    def teacher_forward(self) -> transformer.Forward:
        """The teacher's network, in the phase's compute dtype."""
        return transformer.make_forward(
            self.teacher_config, self.config.model.compute_dtype
        )

    def teacher_params(self) -> transformer.Params:
        """The teacher's full parameters, sharded.

        The embeddings of another teacher get as many rows as the model's. The rows cut or
        added are padding, which has no probability.

        Raises:
          InputError: they are missing, damaged or of another model.
        """
        if self.other_teacher is None:
            return self.starting_params(self.frozen_dtype)
        params = _start(
            _teacher_as_start(self.config),
            self.other_teacher.model_config,
            self.mesh,
            self.teacher_dtype,
        )
        template = abstract_params(self.teacher_config, self.mesh, self.teacher_dtype)
        return jax.tree.map(_with_shape, params, template)

    def eval_step(self, lora: lora_lib.Lora | None = None) -> Callable[..., Any]:
        """The step of `make_eval_step`; the start's parameters have no adapters."""
        forward = self.forward(lora=lora)
        return make_eval_step(forward, self.mesh, self.forward(), **self.head_options)

    def put(self, batch: dict[str, np.ndarray]) -> interface.Batch:
        """Puts a global batch that every host has on the devices."""
        return put(batch, self.mesh)

    def load_data(
        self, complete: Callable[[pipeline.Data], pipeline.Data] = lambda data: data
    ) -> pipeline.Data:
        """Reads all data, then claims the folder.

        The claim comes last: if a path is wrong, the folder stays free for the corrected
        config.

        Args:
          complete: adds other data to it.
        """
        data = pipeline.load(
            self.config, self.tokenizer, self.model_config.max_positions
        )
        self._check_prompts(data.prompts)
        data = complete(data)
        self.claim(data.files)
        return data

    def _check_prompts(self, prompts: list[list[dict[str, str]]]) -> None:
        """Refuses prompts that cannot be answered, before hours of training."""
        room = self.model_config.max_positions - self.config.eval.max_new_tokens
        for number, messages in enumerate(prompts, 1):
            ids, _ = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
            if len(ids) > room:
                raise InputError(
                    f"{self.config.eval.prompts}: prompt {number} has {len(ids)} tokens, "
                    f"which with eval.max_new_tokens={self.config.eval.max_new_tokens} do "
                    f"not fit the model's context of {self.model_config.max_positions}; "
                    "shorten one of them"
                )

    def claim(self, files: dict[str, dict[str, str]] | None = None) -> None:
        """Writes the config and the provenance; the folder then belongs to this config.

        Raises:
          InputError: `init_from` has no checkpoint (then nothing is written), or the hosts
            do not share the folder.
        """
        # Runs on every host, because opening a checkpoint waits for the others.
        provenance = self.provenance(files or {})
        lease.check(self.folder, must_ask=True)
        if hosts.is_first():
            self.folder.mkdir(parents=True, exist_ok=True)
            if _read_object(self.folder / CONFIG_FILE, OBJECT) is None:
                kept = checkpoint.newest_readable(self.folder)
                config = kept.config if kept else self.given.to_dict()
                text = paths.to_json(config, indent=2)
                paths.replace(self.folder / CONFIG_FILE, text)
            text = paths.to_json(
                provenance | {"environment": self._environment()}, indent=2
            )
            paths.replace(self.folder / PROVENANCE_FILE, text)
        hosts.wait_for_all(f"begin of {self.name}")
        _check_is_shared(self.folder / CONFIG_FILE)

    @functools.cached_property
    def starts_from(self) -> dict[str, Any]:
        """Which checkpoint or weights the phase starts from; read once.

        Raises:
          InputError: `init_from` has no checkpoint.
        """
        return _start_identity(self.given, self.config, self.model_config)

    @property
    def start_key(self) -> dict[str, Any]:
        """The part of `starts_from` that caches check, without the path of the weights."""
        return _without_path(self.starts_from)

    @functools.cached_property
    def teacher_is_from(self) -> dict[str, Any] | None:
        """Which checkpoint or weights another teacher is from; read once."""
        if self.other_teacher is None:
            return None
        return _start_identity(
            *map(_teacher_as_start, (self.given, self.config)),
            self.other_teacher.model_config,
        )

    @property
    def teacher_key(self) -> dict[str, Any]:
        """What caches of the teacher's outputs check."""
        if self.teacher_is_from is None:
            return {"start": self.start_key}
        return {"teacher": _without_path(self.teacher_is_from)}

    @property
    def teacher_hash(self) -> str:
        """See `model_hash`."""
        (key,) = self.teacher_key.values()
        return model_hash(key)

    def provenance(self, files: dict[str, dict[str, str]]) -> dict[str, Any]:
        """What the phase starts from, its teacher and which files it reads."""
        facts = {
            "start": self.starts_from,
            "files": files,
            "commits": self.commits,
            "split_version": corpus.SPLIT_VERSION,
        }
        if self.teacher_is_from is not None:
            facts["teacher"] = self.teacher_is_from
        return facts

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.model_config)

    @property
    def devices(self) -> str:
        """Such as "8 x TPU v5e, mesh data=1 fsdp=8 tensor=1"."""
        kind = self.mesh.devices.flat[0].device_kind
        sizes = sharding.sizes_of(self.mesh)
        shape = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        return f"{self.mesh.size} x {kind}, mesh {shape}"

    def announce(self, work: str, resumed: str = "") -> None:
        """Prints the devices, the work and the start, before anything is read.

        Args:
          work: what the phase will do.
          resumed: where the phase resumes; empty if it does not.
        """
        weights, teacher = _name_of_start(self.config), ""
        if self.other_teacher is not None:
            size = num_parameters(self.other_teacher.model_config) / 1e6
            teacher = f"; the teacher is {self.teacher_name}, {size:,.1f} M parameters"
        self.say(
            f"{self.devices}, {self.num_parameters / 1e6:,.1f} M parameters, {work}; "
            f"{resumed or f'starts from {weights}'}{teacher}"
        )

    @property
    def shows_progress(self) -> bool:
        """Whether this host prints progress."""
        return shows_progress(self.config)

    def say(self, text: str) -> None:
        """Prints a line about the phase, if the config asks for progress."""
        if self.shows_progress:
            terminal.say(f"{self.name}: {text}")

    def _environment(self) -> dict[str, Any]:
        """The environment of the last process that worked on the phase."""
        return {
            "started": datetime.datetime.now(datetime.UTC).isoformat(
                timespec="seconds"
            ),
            "devices": self.devices,
            "hosts": jax.process_count(),
            "parameters": self.num_parameters,
            "versions": {"python": platform.python_version(), "mixcpt_jax": __version__}
            | {name: metadata.version(name) for name in _VERSIONS},
        }

    def finish(self, results: dict[str, Any]) -> dict[str, Any]:
        """Writes the results, which mark the phase as finished, and returns them.

        Adds `seconds`, the wall time of the process that finished. Every host calls this
        and waits until the first has written.
        """
        results = results | {"seconds": time.monotonic() - self.started}
        lease.check(self.folder, must_ask=True)
        if hosts.is_first():
            text = paths.to_json(results, indent=2)
            paths.replace(self.folder / RESULTS_FILE, text)
        hosts.wait_for_all(f"end of {self.name}")
        return results


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """The compiler options for programs on the mesh's devices."""
    return steps.COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)


def put(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> interface.Batch:
    """Puts a global batch that every host has on the mesh's devices."""
    where = sharding.batch_sharding(mesh)
    return {
        key: jax.make_array_from_callback(value.shape, where, value.__getitem__)
        for key, value in batch.items()
    }


def make_eval_step(
    forward: transformer.Forward,
    mesh: jax.sharding.Mesh,
    start_forward: transformer.Forward | None = None,
    **head_options: Any,
) -> Callable[..., Any]:
    """`steps.make_eval_step`, jitted, with its batch and its result on the host."""
    step = jax.jit(
        steps.make_eval_step(
            forward,
            functools.partial(streamed.head_loss, **head_options),
            start_forward,
        ),
        out_shardings=sharding.replicated(mesh),
        compiler_options=compiler_options(mesh),
    )

    def run(params, batch, start_params=None):
        return jax.device_get(step(params, put(batch, mesh), start_params))

    return run


def start(config: ml_collections.ConfigDict, workdir: str, name: str) -> Phase:
    """Checks a phase's config against its folder and its model.

    Args:
      config: a validated config without phases.
      workdir: the phase's folder; those of other phases are beside it.
      name: of the phase, for the terminal.

    Raises:
      InputError: the folder, the model or the tokenizer is wrong.
    """
    started = time.monotonic()
    folder = paths.absolute(workdir)
    check_workdir(folder, config)
    given = config
    config, commits = resolve(config, folder)
    model_config = pretrained.read_model_config(config.model.path)
    check_model(config, model_config)
    source = config.model.tokenizer or config.model.path
    vocabulary = tokenizer.load(source, config.model.chat_template)
    tokenizer.check_vocabulary(vocabulary, model_config.vocab_size, source)
    teacher = other_teacher(config, model_config, vocabulary)
    mesh = sharding.make_mesh(config.mesh)
    return Phase(
        name,
        folder,
        given,
        config,
        model_config,
        vocabulary,
        mesh,
        started,
        commits,
        teacher,
    )


def resolve(
    config: ml_collections.ConfigDict, folder: epath.Path
) -> tuple[ml_collections.ConfigDict, dict[str, str]]:
    """The config of a phase with all paths resolved, and the commits in them.

    A phase keeps the commits that it recorded, or else those of the phase that it starts
    from; others are the commits of the Hub now, the same on all hosts.

    Args:
      config: of the phase, as it was given.
      folder: of the phase.

    Raises:
      InputError: the Hub has no such repository or revision, or cannot be reached.
    """
    config = config_lib.resolve_phases(config, str(folder.parent))
    commits = {}
    if hosts.is_first():
        start = config.init_from
        recorded = _recorded_commits(checkpoint.phase_folder(start)) if start else {}
        commits = hub.commits(config, recorded | _recorded_commits(folder))
    commits = json.loads(hosts.text_of_first(json.dumps(commits)))
    return hub.pin(config, commits), commits


def _recorded_commits(folder: epath.Path) -> dict[str, str]:
    shape = {"commits?": {str: str}}
    provenance = _read_object(folder / PROVENANCE_FILE, shape)
    if provenance is None and (kept := checkpoint.newest_readable(folder)):
        provenance = kept.provenance
    return (provenance or {}).get("commits", {})


def check_teacher(config: ml_collections.ConfigDict) -> None:
    """Checks another teacher before any phase runs; reads no weights.

    Args:
      config: of a phase. Models that earlier phases write are not checked.

    Raises:
      InputError: the teacher does not fit the model.
    """
    if not config_lib.has_other_teacher(config):
        return
    models = config.model, _teacher_as_start(config).model
    used = [path for model in models for path in (model.path, model.tokenizer)]
    if not any(path.startswith("phase:") for path in used):
        model_config = pretrained.read_model_config(config.model.path)
        source = config.model.tokenizer or config.model.path
        other_teacher(config, model_config, tokenizer.load(source))


def other_teacher(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    vocabulary: tokenizer.Tokenizer | None,
    num_devices: int | None = None,
) -> OtherTeacher | None:
    """Reads the architecture and the tokenizer of another teacher, and no weights.

    Args:
      config: of the phase, with its paths resolved.
      model_config: the model's architecture.
      vocabulary: the model's; None: the teacher's is not compared with it.
      num_devices: as for `check_model`.

    Raises:
      InputError: the teacher does not fit the model; names the setting and the remedy.
    """
    found = other_teacher_config(config)
    if found is None:
        return None
    as_start = _teacher_as_start(config)
    path = as_start.model.path
    _check_mesh(config, found, num_devices, "teacher")
    if config.data.row_length > found.max_positions:
        raise InputError(
            f"data.row_length={config.data.row_length}: longer than the teacher's context "
            f"of {found.max_positions}; use at most that"
        )
    if found.final_soft_cap != model_config.final_soft_cap:
        raise InputError(
            f"{path}: the teacher's logits are capped at {found.final_soft_cap}, the "
            f"model's at {model_config.final_soft_cap}; use a teacher of the same family"
        )
    rows = min(found.vocab_size, model_config.vocab_size)
    if vocabulary is None:
        return OtherTeacher(found, rows)
    place = as_start.model.tokenizer or path
    own = config.model.tokenizer or config.model.path
    theirs = vocabulary if place == own else tokenizer.load(place)
    num_tokens = tokenizer.shared_size(vocabulary, theirs, own, place)
    tokenizer.check_vocabulary(theirs, found.vocab_size, place)
    return OtherTeacher(found, min(rows, num_tokens))


def other_teacher_config(
    config: ml_collections.ConfigDict,
) -> transformer.ModelConfig | None:
    """The architecture of another teacher, as its files have it; None if there is none."""
    if not config_lib.has_other_teacher(config):
        return None
    model = config.model
    path = config.teacher.path or model.path or model.architecture
    return pretrained.read_model_config(path)


def _teacher_as_start(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config of a phase that would start from the teacher."""
    teacher, config = config.teacher, ml_collections.ConfigDict(config.to_dict())
    config.init_from = teacher.init_from
    config.model.weights = "pretrained"
    if teacher.path or teacher.tokenizer:
        config.model.tokenizer = teacher.tokenizer
    config.model.path = teacher.path or config.model.path
    return config


def job(work: Callable[[Phase], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Turns a phase's work into a function that `main` runs; skips finished phases.

    Args:
      work: runs the phase to its end, or resumes it; returns the content of
        `results.json`.

    Returns:
      `(config, workdir, name) -> results`, with the arguments of `start`.
    """

    @functools.wraps(work)
    def run(config, workdir, name):
        results = finished(config, workdir)
        if results is None:
            return work(start(config, workdir, name))
        if shows_progress(config):
            terminal.say(f"{name}: finished before, in {workdir}")
        return results

    return run


def finished(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any] | None:
    """The results of a finished phase, or None.

    None too if a file of the phase is damaged. The phase is then finished again, from its
    last checkpoint if it trains.

    Raises:
      InputError: the folder belongs to another config; or the checkpoint or weights that
        the phase started from have changed since; or a file of a training phase is damaged
        and no checkpoint is left.
    """
    folder = paths.absolute(workdir)
    check_workdir(folder, config)
    path = folder / RESULTS_FILE
    if not path.exists():
        return None
    results = _read_object(path, _RESULTS[config.job])
    provenance = _read_object(
        folder / PROVENANCE_FILE, {"start": OBJECT, "teacher?": OBJECT}
    )
    kept = checkpoint.newest_readable(folder)
    if damage := _damage(folder, results, provenance, kept):
        if config.job == "train" and kept is None:
            raise InputError(
                f"{damage}, and the phase has no checkpoint to finish it from; restore "
                f"the file, or delete {folder} to train again"
            )
        logging.warning("%s; the phase is finished again", damage)
        return None
    # What the phase has read may be gone from the Hub by now.
    start = {k: v for k, v in config.to_dict().items() if k not in ("sources", "eval")}
    resolved, _ = resolve(ml_collections.ConfigDict(start), folder)
    now = {"start": _identity_now(config, resolved), "teacher": {}}
    if config_lib.has_other_teacher(config):
        now["teacher"] = _identity_now(*map(_teacher_as_start, (config, resolved)))
    for part, facts in now.items():
        if facts is not None:
            _check_start(folder, provenance.get(part, {}), facts)
    return results


def _damage(
    folder: epath.Path,
    results: dict[str, Any] | None,
    provenance: dict[str, Any] | None,
    kept: checkpoint.Kept | None,
) -> str:
    """The damaged file of a finished phase and its damage; empty if there is none."""
    if kept and _read_object(folder / CONFIG_FILE, OBJECT) is None:
        return f"{folder / CONFIG_FILE}: is damaged or gone"
    if results is None:
        return f"{folder / RESULTS_FILE}: is not what a phase writes"
    if provenance is None:
        return f"{folder / PROVENANCE_FILE}: is not what a phase writes, or is gone"
    if "after" in results and not (folder / record.METRICS).exists():
        return f"{folder / record.METRICS}: is gone"
    if not record.is_whole(folder, kept.files if kept else {}):
        return (
            f"{folder / record.METRICS}: it, {record.ITEMS} or {record.SAMPLES} does not "
            "hold the rows that were written"
        )
    return ""


def _read_object(path: epath.Path, shape: small_files.Shape) -> dict[str, Any] | None:
    """A JSON object; None if it is damaged or missing."""
    try:
        return small_files.read_json(path, shape)
    except InputError:
        return None


def shows_progress(config: ml_collections.ConfigDict) -> bool:
    """Whether this host prints progress."""
    return config.metrics.progress and hosts.is_first()


def _check_is_shared(file: epath.Path) -> None:
    """Waits until this host sees a file of the first host; network disks take a while."""
    deadline = time.monotonic() + _SECONDS_UNTIL_SEEN
    while not file.exists():
        if time.monotonic() > deadline:
            raise InputError(
                f"{file}: written by the first host, not seen by host "
                f"{jax.process_index()}; give a --workdir that all hosts share, on a "
                "network disk or gs://"
            )
        time.sleep(1)


def _start_identity(
    given: ml_collections.ConfigDict,
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig | None,
) -> dict[str, Any]:
    """Facts that identify what a phase starts from."""
    if config.init_from:
        start = {"init_from": given.init_from} | checkpoint.identity(config.init_from)
    elif _is_random(config):
        start = {"random": config.seed}
    else:
        path = config.model.path
        start = {"weights": path, "identity": pretrained.identity(path)}
    if model_config is None:
        return start
    return start | {"architecture": model_config.fingerprint}


def _identity_now(
    given: ml_collections.ConfigDict, config: ml_collections.ConfigDict
) -> dict[str, Any] | None:
    """`_start_identity`; None if the start of a finished phase has been deleted."""
    model_path, start = config.model.path, config.init_from
    has_model = pretrained.exists(model_path)
    if not (checkpoint.exists(start) if start else has_model):
        return None
    architecture = pretrained.read_model_config(model_path) if has_model else None
    return _start_identity(given, config, architecture)


def model_hash(key: dict[str, Any]) -> str:
    """A hash, 16 hex digits, of a model's weights, given a `start_key`."""
    # A folder may be named in several ways; `step` and `id` identify its checkpoint.
    facts = {name: value for name, value in key.items() if name != "init_from"}
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _without_path(start: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in start.items() if key != "weights"}


def _check_start(folder: epath.Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if not checkpoint.is_same_start(then, now):
        raise InputError(
            f"{folder}: was made from {then}, which is now {now}; restore it, or delete "
            f"{folder} to run its phase again"
        )


def check_workdir(workdir: epath.Path, config: ml_collections.ConfigDict) -> None:
    """Checks that a workdir in use holds the same config.

    Raises:
      InputError: names the first setting that differs, or the damaged file.
    """
    path = workdir / CONFIG_FILE
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir}: is a file; give another --workdir")
    stored = _read_object(path, OBJECT)
    if stored is None and (kept := checkpoint.newest_readable(workdir)):
        logging.warning("%s: is damaged or gone; checkpoint %d has it", path, kept.step)
        stored = kept.config
    if stored is None and path.exists():
        raise InputError(
            f"{path}: damaged; delete it if the run in {workdir} had this config"
        )
    if stored is None:
        return
    is_finished = (workdir / RESULTS_FILE).exists()
    difference = config_lib.first_difference(config, stored, is_finished)
    if difference is not None:
        key, then, now = difference
        raise InputError(
            f"{workdir}: belongs to a run with {key}={then!r}, this one has {now!r}; "
            "give another --workdir (and --config.init_from to start from this run's "
            "end), or use the same config to resume"
        )


def check_model(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    num_devices: int | None = None,
) -> None:
    """Checks settings against the model, before its weights are read.

    Args:
      config: of the phase.
      model_config: the architecture.
      num_devices: of all hosts; None: the devices of this run.

    Raises:
      InputError: names the setting and the remedy.
    """
    for section in ("data", "eval") if config.job != "export" else ():
        row_length = config[section].row_length
        if row_length > model_config.max_positions:
            raise InputError(
                f"{section}.row_length={row_length}: longer than the model's context "
                f"of {model_config.max_positions}; use at most that"
            )
    num_devices = num_devices or jax.device_count()
    data, fsdp, _ = mesh_shape.mesh_shape(config.mesh, num_devices)
    if data * fsdp % jax.process_count():
        raise InputError(
            f"mesh: data x fsdp = {data} x {fsdp} cannot be shared by "
            f"{jax.process_count()} hosts; make mesh.tensor smaller"
        )
    _check_mesh(config, model_config, num_devices, "model")
    if (lora := _lora(config.lora)) is not None:
        lora_lib.check_targets(model_config, lora)


def _check_mesh(
    config: ml_collections.ConfigDict,
    model_config: transformer.ModelConfig,
    num_devices: int | None,
    model: str,
) -> None:
    """Checks that the mesh's axes divide the dimensions of a model."""
    _, fsdp, tensor = mesh_shape.mesh_shape(
        config.mesh, num_devices or jax.device_count()
    )
    for axis, size, dimension, value in (
        ("tensor", tensor, "attention heads", model_config.num_heads),
        ("tensor", tensor, "key-value heads", model_config.num_kv_heads),
        ("tensor", tensor, "MLP columns", model_config.mlp_size),
        ("tensor", tensor, "vocabulary entries", model_config.vocab_size),
        ("fsdp", fsdp, "hidden size", model_config.hidden_size),
        ("expert", config.mesh.expert, "experts", model_config.num_experts),
    ):
        if value % size:
            raise InputError(
                f"mesh.{axis}={size} does not divide the {model}'s {value} {dimension}; "
                f"choose a divisor and give the rest of the devices to mesh.data"
            )


def abstract_params(
    model_config: transformer.ModelConfig, mesh: jax.sharding.Mesh, dtype: str
) -> transformer.Params:
    """Shapes, dtypes and shardings of the full parameters."""
    return sharding.place(
        transformer.abstract_params(model_config, dtype),
        sharding.shardings(mesh, transformer.param_axes(model_config)),
    )


def abstract_adapters(
    model_config: transformer.ModelConfig,
    lora: lora_lib.Lora,
    mesh: jax.sharding.Mesh,
    dtype: str,
) -> transformer.Params:
    """Shapes, dtypes and shardings of the adapters."""
    return sharding.place(
        lora_lib.abstract_adapters(model_config, lora, dtype),
        sharding.shardings(mesh, lora_lib.adapter_axes(model_config, lora)),
    )


def load_params(
    folder: str,
    model_config: transformer.ModelConfig,
    mesh: jax.sharding.Mesh,
    dtype: str,
    model_path: str = "",
    share: float = 1.0,
) -> transformer.Params:
    """The full parameters at the end of a phase, or between its start and its end.

    If the phase trained adapters, they are scaled by `share` and merged into its start.
    The sum is rounded to `dtype`; in bfloat16 most of a small update is lost.

    Args:
      folder: the phase's folder, or its `checkpoints`.
      model_config: the architecture.
      mesh: where the parameters are placed.
      dtype: of the parameters.
      model_path: the pretrained weights under adapters; empty: the path in that phase's
        config.
      share: `start + share (end - start)`, from 0 to 1; 0 and 1 give exactly the start and
        the end. For values between, both are in memory at the same time.

    Raises:
      InputError: there is no checkpoint, or it is of another model; or the start of the
        phase is needed and has changed since.
    """
    stored = ml_collections.ConfigDict(checkpoint.read_config(folder))
    lora = _trained_lora(stored)
    whole = abstract_params(model_config, mesh, dtype)
    if lora is None and share == 1:
        return checkpoint.load_params(folder, whole)
    if model_path:
        stored.model.path = model_path
    start = _load_start(folder, stored, model_config, mesh, dtype)
    if share == 0:
        return start
    shardings = jax.tree.map(lambda leaf: leaf.sharding, whole)
    if lora is None:
        end = checkpoint.load_params(folder, whole)
        return jax.tree.map(_between(share), start, end, shardings)
    adapters = checkpoint.load_params(
        folder, abstract_adapters(model_config, lora, mesh, stored.model.param_dtype)
    )
    lora = dataclasses.replace(lora, alpha=share * lora.alpha)
    merge = jax.jit(
        functools.partial(lora_lib.merge_adapters, lora=lora),
        donate_argnums=0,
        out_shardings=shardings,
    )
    return merge(start, adapters)


def _load_start(folder, stored, model_config, mesh, dtype) -> transformer.Params:
    """The full parameters that a phase with a checkpoint started from."""
    phase_folder = checkpoint.phase_folder(folder)
    given = stored
    stored, _ = resolve(stored, phase_folder)
    _check_start(
        phase_folder,
        checkpoint.read_provenance(folder)["start"],
        _start_identity(given, stored, model_config),
    )
    return _start(stored, model_config, mesh, dtype)


def _between(share: float) -> Callable[..., jax.Array]:
    """Interpolates two arrays in float32; reuses the second's buffer."""

    def interpolate(start, end):
        mixed = (1 - share) * start.astype(jnp.float32) + share * end
        return mixed.astype(end.dtype)

    def run(start, end, where):
        return jax.jit(interpolate, donate_argnums=1, out_shardings=where)(start, end)

    return run


def _start(config, model_config, mesh, dtype) -> transformer.Params:
    if config.init_from:
        return load_params(
            config.init_from, model_config, mesh, dtype, config.model.path
        )
    template = abstract_params(model_config, mesh, dtype)
    if _is_random(config):
        make = jax.jit(
            functools.partial(transformer.init_params, model_config, dtype=dtype),
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, template),
        )
        return make(jax.random.key(config.seed))
    return pretrained.load_params(config.model.path, template)


def _frozen_dtype(settings: ml_collections.ConfigDict, folder: str) -> str:
    """The dtype of a frozen model, the end of the phase in a folder if there is one."""
    if folder:
        stored = checkpoint.read_config(folder)
        if _trained_lora(ml_collections.ConfigDict(stored)):
            return settings.param_dtype
    return config_lib.frozen_dtype(settings)


def _with_shape(x: jax.Array, template: jax.ShapeDtypeStruct) -> jax.Array:
    """Cuts an array at its ends, or pads it with zeros there."""
    if x.shape == template.shape:
        return x

    def fit(x):
        kept = x[tuple(slice(size) for size in template.shape)]
        missing = [b - a for a, b in zip(kept.shape, template.shape, strict=True)]
        return jnp.pad(kept, [(0, size) for size in missing])

    return jax.jit(fit, out_shardings=template.sharding)(x)


def num_parameters(model_config: transformer.ModelConfig) -> int:
    """Of a whole model."""
    leaves = jax.tree.leaves(transformer.abstract_params(model_config))
    return sum(leaf.size for leaf in leaves)


def _name_of_start(config: ml_collections.ConfigDict) -> str:
    if config.init_from:
        return config.init_from
    if _is_random(config):
        return f"random weights (seed {config.seed})"
    return config.model.path


def _is_random(config: ml_collections.ConfigDict) -> bool:
    # A stored config may be older than the setting.
    return config.model.get("weights") == "random"


def _trained_lora(stored: ml_collections.ConfigDict) -> lora_lib.Lora | None:
    """The adapters in a checkpoint; all jobs but training save full parameters."""
    is_trained = stored.get("job", "train") == "train"
    return _lora(stored.get("lora")) if is_trained else None


def _lora(config: ml_collections.ConfigDict | None) -> lora_lib.Lora | None:
    if config is None or not config.rank:
        return None
    return lora_lib.Lora(config.rank, config.alpha, tuple(config.targets))
