"""The job "select": chooses the few general samples for format alignment.

The general samples of the mixture are filtered, and ranked at random or by the trained
model's scores: as plain text, and in its chat template too. `data.selection.FORMS` lists
the scored forms of each method; "random", the default, scores none. Each source's ranking
is a JSONL file, best first; SFT and DPO read its first lines.
"""

import hashlib
import io
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture, selection, sources
from mixcpt_jax.data.corpus import Corpus, measure
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.runtime import hosts, metrics
from mixcpt_jax.training import phase as phase_lib

_SECONDS_BETWEEN_SAVES = 30.0


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Ranks the samples of every source in `select.keep`.

    Writes `SOURCE.jsonl` (see `selection.write`). An interrupted run resumes with the
    batches that are not scored yet.

    Returns:
      The content of `results.json`: source -> `selection.summary`.

    Raises:
      InputError: config, data, weights or workdir are wrong.
    """
    config, settings = phase.config, phase.config.select
    if settings.max_tokens > phase.model_config.max_positions:
        raise InputError(
            f"select.max_tokens={settings.max_tokens}: longer than the model's context "
            f"of {phase.model_config.max_positions}; use at most that"
        )
    phase.announce("selects samples")
    entries = {source: config.sources[source] for source in settings.keep}
    measured = measure(config)
    found = {
        source: selection.candidates(
            Corpus(config, entry, measured).train_split(),
            entry.format,
            phase.tokenizer,
            entry.fields.to_dict(),
            max_tokens=settings.max_tokens,
            min_tokens=settings.min_tokens,
            min_response_tokens=settings.min_response_tokens,
            near_duplicates=settings.near_duplicates,
            on_bad_record=entry.on_bad_record,
            max_candidates=settings.max_candidates,
            seed=config.seed,
        )
        for source, entry in entries.items()
    }
    phase.claim(
        {s: sources.hashes(e.path, e.reader, e.split) for s, e in entries.items()}
    )
    with jax.set_mesh(phase.mesh):
        forms = selection.FORMS[settings.method]
        if forms:
            params = phase.starting_params(config.model.param_dtype)
            eval_step = phase.eval_step()
        start = repr(phase.start_key)
        results = {}
        for source, candidates in found.items():
            reasons = [f"{n} {why}" for why, n in candidates.filtered.items() if n]
            phase.say(
                f"{len(candidates.records)} samples of {source} by {settings.method}, each "
                f"scored {('not at all', 'once', 'twice')[len(forms)]}; left out: "
                f"{', '.join(reasons) or 'none'}"
            )
            scored: dict[str, np.ndarray] = {}
            for form in forms:
                scored[f"{form}_nll_C"], scored[f"{form}_count_C"] = _measure(
                    lambda batch: eval_step(params, batch),
                    getattr(candidates, form),
                    config,
                    phase.folder / f"{source}.{form}.npz",
                    start,
                    f"{phase.name}: {source}, {form}" if phase.shows_progress else "",
                )
            ranking = selection.rank(
                candidates,
                selection.Measured(**scored),
                settings.method,
                settings.keep[source],
                config.seed,
                settings.origin_field,
                settings.origin_share,
            )
            results[source] = selection.summary(ranking)
            if ranking.num_selected < ranking.keep:
                phase.say(
                    f"only {ranking.num_selected} of {ranking.keep} samples of {source} "
                    "are left to select"
                )
            if hosts.is_first():
                selection.write(phase.folder / f"{source}.jsonl", ranking)
    return phase.finish({"selection": results})


def _measure(
    score: Callable[..., Any],
    examples: Examples,
    config: ml_collections.ConfigDict,
    file: epath.Path,
    start: str,
    shown_as: str,
) -> tuple[np.ndarray, np.ndarray]:
    """The summed NLL and number of tokens of each example's response, saved in `file`."""
    row_length = max(config.data.row_length, int(examples.lengths.max()) - 1)
    rows = mixture.pack_text("samples", examples, row_length)
    batch_size = config.eval.batch_size
    # The stored sums are those of these tokens, these batches and this model.
    key = hashlib.blake2b(
        examples.tokens.tobytes() + f"{start} {row_length} {batch_size}".encode()
    ).hexdigest()
    sums, first_batch = np.zeros((3, len(examples))), 0
    if file.exists():
        arrays = {"key": ("U", 0), "sums": ("f", 2), "done": ("iu", 0)}
        remedy = "delete it, and the scores are computed again"
        stored = small_files.read_npz(file, arrays, remedy)
        if str(stored["key"]) == key:
            sums, first_batch = stored["sums"], int(stored["done"])
    saved = time.monotonic()
    num_batches = rows.num_batches(batch_size)
    steps = evaluator.add_sums(sums, score, rows, batch_size, first_batch)
    if shown_as:
        steps = metrics.track(steps, shown_as, num_batches)
    for done in steps:
        if done == num_batches or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
            _save(file, key, sums, done)
            saved = time.monotonic()
    return sums[0], sums[2]


def _save(file: epath.Path, key: str, sums: np.ndarray, done: int) -> None:
    if not hosts.is_first():
        return
    buffer = io.BytesIO()
    np.savez(buffer, sums=sums, done=done, key=key)
    paths.replace(file, buffer.getvalue())
