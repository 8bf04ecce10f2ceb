"""Evaluates a model: perplexity and top-1 accuracy of texts, exams, preference pairs.

Perplexity alone understates what logit swap self-distillation teaches: at its optimum, the
gold token is the top token, but only as probable as the teacher's top token was. So
accuracy is measured on every text too.
"""

import hashlib
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax.core import intervals, paths, small_files
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import mixture, pipeline, tasks
from mixcpt_jax.data.exams import Exam
from mixcpt_jax.evaluation import generation, load_model
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.runtime import hosts, lease, metrics
from mixcpt_jax.training import phase as phase_lib

# The largest loss whose perplexity is a finite float.
_MAX_NATS = math.log(np.finfo(float).max)
_SECONDS_BETWEEN_SAVES = 30.0

# What is summed over the targets of an example.
_SUMMED = ("loss", "correct", "tokens")
# Sums that need the start -> the measures of texts that are their means.
_OF_START = {"kl": "kl_from_start", "router_drift": "router_drift"}

HostBatch = dict[str, np.ndarray]
Score = Callable[[HostBatch], Mapping[str, Any]]


class Evaluator:
    """All measures of a phase as a function of the parameters, compiled once.

    Attributes:
      items: the values of each example, question and pair of the last call; see
        `metrics.Writer.write_items`.
    """

    def __init__(
        self,
        phase: phase_lib.Phase,
        data: pipeline.Data,
        references: Mapping[str, np.ndarray] | None = None,
        lora: lora_lib.Lora | None = None,
        start: transformer.Params | None = None,
    ):
        """
        Args:
          phase: its config and model.
          data: its texts, exams, pairs and prompts.
          references: "pairs/NAME" -> the reference's log-probabilities of the examples
            of `data.pairs[NAME]`; without them, pairs have no rewards.
          lora: the adapters in the parameters.
          start: the frozen start; without it, texts have no `kl_from_start` and no
            `router_drift`.
        """
        self._config = phase.config
        self._data = data
        self._references = references or {}
        self._score = phase.eval_step(lora)
        self._start = start
        of_experts = ("router_drift",) if phase.model_config.num_experts else ()
        of_start = () if start is None else ("kl", *of_experts)
        self._summed = (*_SUMMED, *of_start)
        self.items: dict[str, np.ndarray] = {}
        self._sampler = generation.Sampler(
            phase.model_config,
            phase.tokenizer,
            compute_dtype=phase.config.model.compute_dtype,
            lora=lora,
        )

    @property
    def num_batches(self) -> int:
        """The number of batches of one evaluation."""
        data = self._data
        exams = (exam.rows for exam in data.exams.values())
        evaluated = *data.texts.values(), *exams, *data.pairs.values()
        batch_size = self._config.eval.batch_size
        return sum(rows.num_batches(batch_size) for rows in evaluated)

    def __call__(
        self, params, on_batch: Callable[[int], None] = lambda done: None
    ) -> dict[str, float]:
        """Computes every measure.

        Args:
          params: all parameters, adapters included.
          on_batch: callback after each batch, with the number of batches done.
        """
        done = itertools.count(1)

        def score(batch, *start):
            scores = self._score(params, batch, *start)
            on_batch(next(done))
            return scores

        def score_text(batch):
            return score(batch, self._start)

        data, batch_size = self._data, self._config.eval.batch_size
        self.items = {}
        results = measure(
            score_text, data.texts, {}, batch_size, self.items, self._summed
        )
        results |= measure(score, {}, data.exams, batch_size, self.items)
        for name, rows in data.pairs.items():
            sums = sums_per_example(score, rows, batch_size)
            references = self._references.get(f"pairs/{name}")
            results |= compare_pairs(name, sums, references, self._config.preference)
            self.items[f"{name}/pair_accuracy"] = _prefers_chosen(sums)
        return results

    def answers(self, params) -> list[str]:
        """Greedy answers to the prompts of the phase."""
        if not self._data.prompts:
            return []
        return self._sampler.chat(
            params, self._data.prompts, self._config.eval.max_new_tokens
        )


def measure(
    score: Score,
    texts: Mapping[str, mixture.PackedRows],
    exams: Mapping[str, Exam],
    batch_size: int,
    items: dict[str, np.ndarray] | None = None,
    summed: Sequence[str] = _SUMMED,
) -> dict[str, float]:
    """Computes the measures of texts and exams.

    Args:
      score: maps a batch to `ntp` (nats), `correct` and perhaps `kl` and `router_drift`,
        `[B, L]` each, replicated over all hosts; see `steps.make_eval_step`.
      texts: name -> holdout text.
      exams: name -> exam.
      batch_size: rows per batch.
      items: filled with the terms of the results: `{text}/loss`, `{text}/correct`,
        `{text}/tokens`, `{text}/kl` and `{text}/router_drift`, sums over each example,
        and `{exam}/exam`, correct or not.
      summed: of texts, see `sums_per_example`; must begin with its default.

    Returns:
      `{text}/loss` (nats per token), `{text}/perplexity`, `{text}/accuracy` (share of
      tokens that are the top token) and `{exam}/exam` (share of correct answers). With
      "kl" in `summed` also `{text}/kl_from_start`: KL(start || now), nats per token; with
      "router_drift", the share of the choices of experts that the start did not make. If
      examples begin with a prompt (formats cloze and chat), also `{text}/exact`: the
      share of examples whose continuation greedy decoding would generate exactly. A text
      without loss tokens has no results; a perplexity that overflows is left out.

    Raises:
      InputError: a score is not finite; names the item.
    """
    results = {}
    items = {} if items is None else items
    for name, rows in texts.items():
        sums = sums_per_example(score, rows, batch_size, "", summed)
        for key, values in zip(summed, sums, strict=True):
            items[f"{name}/{key}"] = values
        loss, correct, count, *of_start = sums.sum(axis=1)
        if not count:
            continue
        results[f"{name}/loss"] = float(loss / count)
        if loss / count < _MAX_NATS:
            results[f"{name}/perplexity"] = math.exp(loss / count)
        results[f"{name}/accuracy"] = float(correct / count)
        for key, total in zip(summed[len(_SUMMED) :], of_start, strict=True):
            results[f"{name}/{_OF_START[key]}"] = float(total / count)
        if rows.source.examples.is_continuation:
            is_asked = sums[2] > 0
            results[f"{name}/exact"] = float((sums[1] == sums[2])[is_asked].mean())
    for name, exam in exams.items():
        loss, _, _ = sums_per_example(score, exam.rows, batch_size)
        items[f"{name}/exam"] = exam.grade(-loss)
        results[f"{name}/exam"] = float(items[f"{name}/exam"].mean())
    return results


def compare_pairs(
    name: str,
    sums: np.ndarray,
    reference_logps: np.ndarray | None,
    config: ml_collections.ConfigDict,
) -> dict[str, float]:
    """Computes how often, and by how much, the model prefers the chosen answers.

    Args:
      name: of the pairs.
      sums: `sums_per_example` of their rows, [3, 2 pairs].
      reference_logps: the reference's summed log-probabilities, nats, [2 pairs].
      config: `config.preference`; rewards are those of its loss.

    Returns:
      `{name}/pair_accuracy`: the share of pairs whose chosen answer is more likely per
      token. With a reference also `{name}/reward_accuracy`, the share of pairs whose
      chosen answer has the larger reward `beta (logp - reference logp)`, and
      `{name}/reward_margin`, the mean difference of the two rewards. `logp` is the mean
      over tokens instead of the sum if the loss uses means.
    """
    loss, _, count = sums
    count = np.maximum(count, 1)
    if not sums.size:
        return {}
    results = {f"{name}/pair_accuracy": float(_prefers_chosen(sums).mean())}
    if reference_logps is not None:
        divisor = count if config.length_normalised or config.loss == "ipo" else 1
        ratios = (-loss - reference_logps) / divisor
        rewards = config.beta * ratios.reshape(-1, 2)
        margins = rewards[:, 0] - rewards[:, 1]
        results[f"{name}/reward_accuracy"] = float((margins > 0).mean())
        results[f"{name}/reward_margin"] = float(margins.mean())
    return results


def _prefers_chosen(sums: np.ndarray) -> np.ndarray:
    """Whether the chosen answer is more likely per token, bool [pairs]."""
    loss, _, count = sums
    chosen, rejected = (-loss / np.maximum(count, 1)).reshape(-1, 2).T
    return chosen > rejected


def sums_per_example(
    score: Score,
    rows: mixture.PackedRows,
    batch_size: int,
    shown_as: str = "",
    summed: Sequence[str] = _SUMMED,
) -> np.ndarray:
    """Sums of loss, correct and count over each example's targets, [sums, examples].

    Args:
      score, rows, batch_size: as for `measure`.
      shown_as: label of a progress bar; empty: none.
      summed: which sums; "kl" and "router_drift" need a score with them.

    Raises:
      InputError: a score is not finite; names the item.
    """
    sums = np.zeros((len(summed), len(rows.source.examples)))
    done = add_sums(sums, score, rows, batch_size, summed=summed)
    if shown_as:
        done = metrics.track(done, shown_as, rows.num_batches(batch_size))
    for _ in done:
        pass
    return sums


def kept_sums(
    file: epath.Path,
    model: Any,
    score: Score,
    rows: mixture.PackedRows,
    batch_size: int,
    shown_as: str = "",
) -> np.ndarray:
    """`sums_per_example` of a frozen model, cached in a file.

    An interrupted run resumes after the last saved batch.

    Args:
      file: an .npz file; the first host writes it.
      model: the identity of the model; its `repr` is part of the key.
      score, rows, batch_size, shown_as: as for `sums_per_example`.
    """
    examples = rows.source.examples
    parts = model, examples.fingerprint, rows.plan.fingerprint, batch_size
    key = hashlib.blake2b(repr(parts).encode()).hexdigest()
    sums, first_batch = np.zeros((3, len(examples))), 0
    if file.exists():
        arrays = {"key": ("U", 0), "sums": ("f", 2), "done": ("iu", 0)}
        remedy = "delete it, and the model scores the examples again"
        stored = small_files.read_npz(file, arrays, remedy)
        is_same = str(stored["key"]) == key and stored["sums"].shape == sums.shape
        if is_same and 0 <= stored["done"] <= rows.num_batches(batch_size):
            sums, first_batch = stored["sums"], int(stored["done"])
    saved, num_batches = time.monotonic(), rows.num_batches(batch_size)
    steps = add_sums(sums, score, rows, batch_size, first_batch)
    if shown_as:
        steps = metrics.track(steps, shown_as, num_batches)
    for done in steps:
        is_due = time.monotonic() - saved > _SECONDS_BETWEEN_SAVES
        if hosts.is_first() and (is_due or done == num_batches):
            lease.check(file.parent)
            buffer = io.BytesIO()
            np.savez(buffer, sums=sums, done=done, key=key)
            paths.replace(file, buffer.getvalue())
            saved = time.monotonic()
    return sums


def add_sums(
    sums: np.ndarray,
    score: Score,
    rows: mixture.PackedRows,
    batch_size: int,
    first_batch: int = 0,
    summed: Sequence[str] = _SUMMED,
) -> Iterator[int]:
    """Computes `sums_per_example` batch by batch.

    Args:
      sums: [sums, examples], updated in place; holds the sums of the batches before
        `first_batch`.
      score, rows, batch_size: as for `measure`.
      first_batch: number of the first batch.
      summed: as for `sums_per_example`.

    Yields:
      After each batch, the number of batches in `sums`.

    Raises:
      InputError: a score is not finite; names the item.
    """
    batches = mixture.evaluation_batches(rows, batch_size, first_batch)
    for number, batch in enumerate(batches, first_batch):
        scores = score(batch)
        first = number * batch_size
        owners = np.stack(
            [rows.example_ids(row) for row in range(first, first + batch_size)]
        )
        counted = batch["loss_mask"] > 0
        is_broken = counted & ~np.isfinite(scores["ntp"])
        if is_broken.any():
            raise InputError(
                f"{rows.place(owners[is_broken][0])}: its log-likelihood is not finite: "
                "the model's training diverged, or its activations overflow the compute "
                "dtype; use float32 or other weights"
            )
        values = {
            "loss": scores["ntp"],
            "correct": scores["correct"],
            "tokens": batch["loss_mask"],
            **{name: scores.get(name) for name in _OF_START},
        }
        for total, name in zip(sums, summed, strict=True):
            total += np.bincount(
                owners[counted],
                np.asarray(values[name], np.float64)[counted],
                minlength=sums.shape[1],
            )
        yield number + 1


def measure_tasks(
    model: load_model.LoadedModel,
    read: Sequence[tasks.Task],
    row_length: int = 1024,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures a model on tasks.

    Args:
      model: from `load_model.load`.
      read: the tasks.
      row_length: maximum number of tokens of a document, within the model's context.
      batch_size: rows per batch, rounded up to a multiple that the mesh divides.
      seed: of the bootstrap.

    Returns:
      A tree for JSON: `checkpoint`, `dtype`, `row_length` (as applied), and `tasks`:
      name -> `kind`, `path`, `fingerprint` of the items, `tokens` (a hash of their
      tokens), `measures` (name -> value, low, high: the 95 % interval of a bootstrap over
      items; measures that are not finite are left out) and `items` (column -> a number
      per item).

    Raises:
      InputError: an item does not fit its task or the model.
    """
    score, results = model.score(), {}
    with jax.set_mesh(model.mesh):
        batch_size = generation.whole_batch(batch_size)
    for task in read:
        encoded = task.encode(model.tokenizer, row_length, model.config.max_positions)
        with jax.set_mesh(model.mesh):
            sums = sums_per_example(score, encoded.rows, batch_size, task.name)
        items = encoded.columns(sums)
        results[task.name] = {
            "kind": task.kind,
            "path": task.path,
            "fingerprint": task.fingerprint,
            "tokens": encoded.examples.fingerprint,
            "measures": {
                name: estimate._asdict()
                for name, measure in tasks.MEASURES[task.kind].items()
                if (estimate := _estimate(measure, [items], seed)) is not None
            },
            "items": items,
        }
    return {
        "checkpoint": model.place,
        "dtype": model.dtype,
        "row_length": min(row_length, model.config.max_positions),
        "tasks": results,
    }


def _estimate(
    measure: tasks.Measure, sides: Sequence[Mapping[str, Any]], seed: int
) -> intervals.Estimate | None:
    """The measure of one model's items, or the difference of two models.

    None if it is not finite: a mean over nothing, or a perplexity that overflows.
    """
    columns = []
    for items in sides:
        numerator = items[measure.numerator]
        denominator = items.get(measure.denominator) or np.ones(len(numerator))
        columns += [numerator, denominator]

    def statistic(sums):
        values = [
            measure.of(sums[..., at] / sums[..., at + 1])
            for at in range(0, 2 * len(sides), 2)
        ]
        return values[0] - values[1] if len(sides) > 1 else values[0]

    with np.errstate(all="ignore"):
        if not np.isfinite(statistic(np.array([np.sum(c) for c in columns]))):
            return None
        estimate = intervals.bootstrap(np.stack(columns, axis=1), statistic, seed)
    return estimate if np.isfinite(estimate).all() else None


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Compares two models on the tasks that both were measured on.

    Args:
      first, second: from `measure_tasks`.
      seed: of the bootstrap.

    Returns:
      Task -> measure -> `difference`, the first minus the second, with `low` and `high`,
      its paired 95 % interval; for measures of correct answers also `first_alone`,
      `second_alone` and `p_value`, see `intervals.mcnemar`. Measures per token are left out
      if the tokenizers differ on the items.

    Raises:
      InputError: the two have no task in common, or the items or the maximum lengths of
        documents differ.
    """
    shared = [name for name in first["tasks"] if name in second["tasks"]]
    if not shared:
        raise InputError(
            f"--compare: no task in common: {', '.join(first['tasks'])} and "
            f"{', '.join(second['tasks'])}; measure both on the same tasks"
        )
    comparison = {}
    for name in shared:
        sides = [side["tasks"][name] for side in (first, second)]
        facts = [
            (side["fingerprint"], side["kind"], len(next(iter(side["items"].values()))))
            for side in sides
        ]
        if facts[0] != facts[1]:
            raise InputError(
                f"--compare: the items of task {name} differ; measure both on the same "
                "file with the same --limit"
            )
        lengths = [side["row_length"] for side in (first, second)]
        if sides[0]["kind"] == "text" and lengths[0] != lengths[1]:
            raise InputError(
                f"--compare: documents of task {name} were cut to {lengths[0]} tokens for "
                f"one model and to {lengths[1]} for the other; measure both with "
                f"--row_length={min(lengths)}"
            )
        are_alike = _have_same_tokens(*sides)
        items = [side["items"] for side in sides]
        comparison[name] = {}
        for key, measure in tasks.MEASURES[sides[0]["kind"]].items():
            if not are_alike and measure.is_per_token:
                continue
            needed = {measure.numerator, measure.denominator} - {""}
            if not all(needed <= side.keys() for side in items):
                continue  # an older version did not compute it
            difference = _estimate(measure, items, seed)
            if difference is None:
                continue
            entry = dict(zip(("difference", "low", "high"), difference, strict=True))
            if not measure.denominator:
                answers = (side[measure.numerator] for side in items)
                entry |= intervals.mcnemar(*answers)._asdict()
            comparison[name][key] = entry
    return comparison


def _have_same_tokens(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether the tokenizers of two models agree on the items of a task."""
    hashes = {side["tokens"] for side in (first, second) if "tokens" in side}
    # Results of older versions have counts only, no hash.
    counts = [side["items"].get("tokens") for side in (first, second)]
    return len(hashes) < 2 and counts[0] == counts[1]


def describe(result: Mapping[str, Any]) -> str:
    """A table of the result of `measure_tasks`."""
    header, rows = ["task", "measure", "items", "value", "95 % interval"], []
    for name, task in result["tasks"].items():
        for key, entry in task["measures"].items():
            form = _form(key)
            num_items = len(next(iter(task["items"].values())))
            interval = f"{form.format(entry['low'])} to {form.format(entry['high'])}"
            if num_items < 2:
                interval = ""
            rows.append(
                [name, key, str(num_items), form.format(entry["value"]), interval]
            )
    return (
        f"{text_lib.value(result['checkpoint'])} ({text_lib.value(result['dtype'])})\n\n"
        f"{metrics.table(header, rows)}"
    )


def describe_comparison(result: Mapping[str, Any]) -> str:
    """A table of the comparison in a result."""
    header = ["task", "measure", "difference", "95 % interval", "only A", "only B", "p"]
    rows: list[list[str]] = []
    for name, measures in result["comparison"].items():
        for key, entry in measures.items():
            form = _form(key).replace(":", ":+")
            row = [name, key, form.format(entry["difference"])]
            row.append(f"{form.format(entry['low'])} to {form.format(entry['high'])}")
            if "p_value" in entry:
                row += [str(entry["first_alone"]), str(entry["second_alone"])]
                row.append(f"{entry['p_value']:.2g}")
            rows.append(row + [""] * (len(header) - len(row)))
    second = result["compared_with"]
    places = [text_lib.value(side["checkpoint"]) for side in (result, second)]
    legend = f"A - B; A: {places[0]}, B: {places[1]}"
    dtypes = [text_lib.value(side["dtype"]) for side in (result, second)]
    if dtypes[0] != dtypes[1]:
        legend += (
            f"\nA was measured in {dtypes[0]}, B in {dtypes[1]}: part of the difference is "
            "rounding. --dtype measures both in the same dtype."
        )
    others = [
        name
        for name in result["comparison"]
        if not _have_same_tokens(result["tasks"][name], second["tasks"][name])
    ]
    if others:
        legend += (
            f"\nThe tokenizers differ on {', '.join(others)}: compare bits per byte; "
            "measures per token are not comparable."
        )
    return f"{legend}\n\n{metrics.table(header, rows)}"


def _form(measure: str) -> str:
    is_share = measure not in ("perplexity", "bits_per_byte")
    return "{:.1%}" if is_share else "{:.3f}"
