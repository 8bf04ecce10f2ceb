"""The job "select": chooses the few general samples for format alignment.

The general samples of the mixture are filtered, then ranked at random or by the trained
model's scores, computed on plain text and in its chat template. `data.selection.FORMS`
lists the scored forms of each method; "random", the default, scores none. Each source's
ranking is a JSONL file, best first; SFT and DPO read its first lines.
"""

from typing import Any

import jax
import numpy as np

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture, selection, sources
from mixcpt_jax.data.corpus import Corpus, measure
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.runtime import hosts, lease
from mixcpt_jax.training import phase as phase_lib


@phase_lib.job
def run(phase: phase_lib.Phase) -> dict[str, Any]:
    """Ranks the samples of every source in `select.keep`.

    Writes `SOURCE.jsonl` (see `selection.write`). An interrupted run resumes with the first
    batch that is not scored.

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
                examples = getattr(candidates, form)
                row_length = max(config.data.row_length, examples.lengths.max() - 1)
                nll_C, _, count_C = evaluator.kept_sums(
                    phase.folder / f"{source}.{form}.npz",
                    phase.start_key,
                    lambda batch: eval_step(params, batch),
                    mixture.pack_text("samples", examples, int(row_length)),
                    config.eval.batch_size,
                    f"{phase.name}: {source}, {form}" if phase.shows_progress else "",
                )
                scored |= {f"{form}_nll_C": nll_C, f"{form}_count_C": count_C}
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
            lease.check(phase.folder)
            if hosts.is_first():
                selection.write(phase.folder / f"{source}.jsonl", ranking)
    return phase.finish({"selection": results})
