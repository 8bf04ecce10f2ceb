"""Computes the frozen teacher's outputs for packed rows, once, before training.

Neither the teacher nor the rows change between epochs, so the outputs can be cached
(`data.teacher_cache`). Training then holds no layers of the teacher, and later epochs cost
as much as plain continual pre-training.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture, pipeline, sources, teacher_cache, token_cache
from mixcpt_jax.objectives import teachers
from mixcpt_jax.runtime import hosts, sharding, terminal
from mixcpt_jax.training import phase as phase_lib

_BYTES_PER_SHARD = 2**28


def needs_teacher(config: ml_collections.ConfigDict, rows: mixture.PackedRows) -> bool:
    """Whether a source is in the stream and has an objective that needs the teacher."""
    objectives = rows.source.objectives
    return rows.source.share > 0 and config_lib.needs_teacher(config, objectives)


def check_replay(phase: phase_lib.Phase) -> None:
    """Checks that samples to replay under `kd_weight` are the teacher's own.

    Replay is `KL(p || q)` on text drawn from `p`; on the samples of another model it
    preserves less.

    Raises:
      InputError: a record is a sample of another model.
    """
    config = phase.config
    for name, entry in config.sources.items():
        weights = config_lib.objective_weights(config, name)
        if not (config.objective.kind == "tokens" and entry.weight and weights["kd"]):
            continue
        records = sources.read(
            entry.path,
            entry.reader,
            entry.split,
            lambda error: None,
            entry.max_expansion,
        )
        for record in itertools.islice(records, entry.max_records or None):
            origin = record.fields.get("generated")
            if not isinstance(origin, dict):
                break  # Not a file of a phase that generates.
            writer = origin.get("model")
            if origin.get("kind") == "replay" and writer != phase.teacher_hash:
                raise InputError(
                    f"{record.place}: a sample of model {writer}, the teacher of "
                    f"sources.{name} is {phase.teacher_hash}, {phase.teacher_name}; "
                    "generate the source again from this model, set teacher.path to the "
                    f"other one, or sources.{name}.kd_weight=0"
                )


def open_rows(
    phase: phase_lib.Phase, data: pipeline.Data
) -> dict[str, teacher_cache.TeacherRows]:
    """Opens the teacher cache of a phase, by source.

    Raises:
      InputError: it is missing, damaged, or for other rows or another teacher.
    """
    return {
        rows.source.name: teacher_cache.open_rows(
            _folder(phase, rows), form_of(phase), _key(phase, rows)
        )
        if needs_teacher(phase.config, rows)
        else teacher_cache.TeacherRows(form_of(phase))
        for rows in data.packed
    }


def prepare(config: ml_collections.ConfigDict, workdir: str, name: str) -> None:
    """Runs the teacher of a phase over the rows that need it.

    Complete shards that match are kept. On several hosts, the first one writes.

    Args:
      config: a validated config without phases.
      workdir: the phase's folder; nothing is written there.
      name: of the phase.

    Raises:
      InputError: config, data, weights or workdir are wrong, or the cache cannot be
        written.
    """
    phase = phase_lib.start(config, workdir, name)
    config = phase.config
    check_replay(phase)
    data = pipeline.load(config, phase.tokenizer)
    needed = [rows for rows in data.packed if needs_teacher(phase.config, rows)]
    form = form_of(phase)
    _say(f"{name}: the teacher cache takes {form.bytes_per_token} bytes per token")
    for rows in needed:
        size = form.bytes_per_token * int(rows.plan.length.sum()) / 2**30
        epochs = next(r["epochs"] for r in data.report if r["name"] == rows.source.name)
        _say(
            f"{rows.source.name}: {len(rows)} rows, {size:.2f} GiB, of which the phase "
            f"reads {epochs:.2f} epochs; max_records reduces it"
        )
    with jax.set_mesh(phase.mesh):
        params = phase.teacher_params() if needed else None
        step = jax.jit(
            teachers.make_teacher_step(
                phase.teacher_forward(),
                config.objective.teacher_top_k,
                phase.num_tokens,
            ),
            out_shardings=sharding.replicated(phase.mesh),
            compiler_options=phase.compiler_options,
        )
        for rows in needed:
            _prepare_rows(
                phase, rows, form, lambda batch: step(params, phase.put(batch))
            )


def _prepare_rows(
    phase: phase_lib.Phase,
    rows: mixture.PackedRows,
    form: teacher_cache.Form,
    step: Any,
) -> None:
    batch_size, length = phase.config.data.batch_size, phase.config.data.row_length
    batches = max(1, _BYTES_PER_SHARD // (form.bytes_per_token * length * batch_size))
    per_shard = batches * batch_size
    folder, key = _folder(phase, rows), _key(phase, rows)
    is_first = hosts.is_first()
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / token_cache.MANIFEST).unlink(missing_ok=True)
    shards = []
    for number, first in enumerate(range(0, len(rows), per_shard)):
        here = range(first, min(first + per_shard, len(rows)))
        facts = teacher_cache.shard_facts(key, first, len(here))
        entry = token_cache.finished_shard(folder, number, facts) if is_first else None
        if hosts.of_first(entry is not None):
            shards.append(entry)
            continue
        records = _records(phase, rows, here, form, step)
        if is_first:
            shards.append(token_cache.write_shard(folder, number, records, facts))
        else:
            for _ in records:
                pass
        _say(
            f"{rows.source.name}: the teacher has read {here.stop} of {len(rows)} rows"
        )
    if is_first:
        facts = {"bytes_per_token": form.bytes_per_token}
        token_cache.write_manifest(folder, key, shards, facts)


def _records(phase, rows, numbers: range, form, step) -> Iterator[bytes]:
    """The records of some rows; the first of them starts a batch."""
    batch_size = phase.config.data.batch_size
    batches = mixture.evaluation_batches(rows, batch_size, numbers.start // batch_size)
    starts = numbers[::batch_size]
    for first, batch in zip(starts, batches, strict=False):
        arrays = jax.device_get(step(batch))
        lengths = np.count_nonzero(batch["segment_ids"], axis=1)
        for place in range(min(batch_size, numbers.stop - first)):
            one = {key: x[place] for key, x in arrays.items()}
            if form.is_broken(one, int(lengths[place])):
                raise InputError(
                    f"{rows.source.name}: row {first + place}: the teacher's outputs are "
                    "not finite numbers; its training has diverged, or its activations "
                    "are too large for model.compute_dtype: use float32 or other weights"
                )
            yield form.encode(one, int(lengths[place]))


def _say(text: str) -> None:
    if hosts.is_first():
        terminal.show(text)


def _folder(phase: phase_lib.Phase, rows: mixture.PackedRows) -> epath.Path:
    config = phase.config
    return teacher_cache.folder_of(
        config.data.prepared, rows.source.name, config.objective.teacher_top_k
    )


def form_of(phase: phase_lib.Phase) -> teacher_cache.Form:
    top_k = phase.config.objective.teacher_top_k
    vocab_size = phase.num_tokens or phase.model_config.vocab_size
    if top_k > vocab_size:
        raise InputError(
            f"objective.teacher_top_k={top_k}: the model's vocabulary has {vocab_size} "
            "tokens; use at most that"
        )
    if top_k:
        return teacher_cache.Form.compact(top_k, vocab_size)
    return teacher_cache.Form.of_hidden_states(phase.teacher_config.hidden_size)


def _key(phase: phase_lib.Phase, rows: mixture.PackedRows) -> dict[str, Any]:
    """A key of everything that the teacher's outputs for a source depend on."""
    config = phase.config
    key = {
        "row_length": config.data.row_length,
        "data.packing": config.data.packing,
        "seed": config.seed,
        "tokens": rows.source.examples.fingerprint,
        "rows": rows.plan.fingerprint,
        **phase.teacher_key,
        "teacher_dtype": phase.teacher_dtype,
        "compute_dtype": config.model.compute_dtype,
    }
    if config.objective.teacher_top_k:
        key["teacher_top_k"] = config.objective.teacher_top_k
    return key
