"""What a model knows: perplexity and top-1 accuracy on text, and multiple choice.

Perplexity alone understates what logit swap self-distillation teaches: at its optimum
the gold token is the top token with no more than the teacher's own confidence. So
accuracy always stands beside it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mixcpt_jax.data import mixture
from mixcpt_jax.data.exams import Exam

HostBatch = dict[str, np.ndarray]


def evaluate(
    score: Callable[[HostBatch], Mapping[str, Any]],
    texts: Mapping[str, mixture.PackedRows],
    exams: Mapping[str, Exam],
    batch_size: int,
) -> dict[str, float]:
    """Measures every text and exam.

    Args:
      score: maps a batch to `ntp` (nats) and `correct`, `[B, L]` each, whole on every
        host; see `steps.make_eval_step`.
      texts: name -> held-out text.
      exams: name -> exam.
      batch_size: rows per batch.

    Returns:
      `{text}/loss` (nats per token), `{text}/perplexity`, `{text}/accuracy` (share of
      tokens that are the top token) and `{exam}/exam` (share answered rightly).
    """
    results = {}
    for name, rows in texts.items():
        loss, correct, count = _sums_per_example(score, rows, batch_size).sum(axis=1)
        results[f"{name}/loss"] = float(loss / count)
        results[f"{name}/perplexity"] = math.exp(loss / count)
        results[f"{name}/accuracy"] = float(correct / count)
    for name, exam in exams.items():
        loss, _, _ = _sums_per_example(score, exam.rows, batch_size)
        results[f"{name}/exam"] = float(exam.grade(-loss).mean())
    return results


def _sums_per_example(score, rows: mixture.PackedRows, batch_size: int) -> np.ndarray:
    """Sums of loss, correct and count over each example's targets, [3, examples]."""
    num_examples = len(rows.source.examples)
    sums = np.zeros((3, num_examples))
    for number, batch in enumerate(mixture.evaluation_batches(rows, batch_size)):
        scores = score(batch)
        first = number * batch_size
        owners = np.stack(
            [rows.example_ids(row) for row in range(first, first + batch_size)]
        )
        counted = batch["loss_mask"] > 0
        for total, values in zip(
            sums,
            (scores["ntp"], scores["correct"], batch["loss_mask"]),
            strict=True,
        ):
            total += np.bincount(
                owners[counted],
                np.asarray(values, np.float64)[counted],
                minlength=num_examples,
            )
    return sums
