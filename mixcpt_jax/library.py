"""The mixture, the evaluation and the generation, for code of your own.

`import mixcpt_jax` offers these and the losses by name, and imports nothing until you use
one. The names in `mixcpt_jax.__all__` are the library; all other modules may change from
one version to the next.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline, tasks
from mixcpt_jax.evaluation import evaluator, generation
from mixcpt_jax.evaluation.load_model import LoadedModel
from mixcpt_jax.evaluation.load_model import load as load_model
from mixcpt_jax.models import tokenizer as tokenizer_lib

__all__ = ["Mixture", "evaluate", "generate", "load_model"]


class Mixture:
    """Batches of several sources, packed and interleaved, for a training loop of your own.

    An iterable of batches: dicts of NumPy arrays `[batch_size, row_length]`. `tokens` are
    the inputs and `targets` the next tokens; `positions` and `segment_ids` keep packed
    documents apart (0: padding); `loss_mask` is 1 where a target counts; `ntp_weights`,
    `lssd_weights`, `kd_weights` and `selective_weights` are the weights of each objective
    at each target, 0 where it does not count.

    Examples:
      >>> from mixcpt_jax import Mixture
      >>> mixture = Mixture(
      ...     {
      ...         "domain": {"path": "domain.jsonl", "weight": 0.5},
      ...         "instructions": {
      ...             "path": "instructions.jsonl", "format": "instruction", "weight": 0.5
      ...         },
      ...     },
      ...     tokenizer="model",
      ...     row_length=64,
      ...     batch_size=2,
      ...     num_steps=3,
      ... )
      >>> [batch["tokens"].shape for batch in mixture]
      [(2, 64), (2, 64), (2, 64)]
    """

    def __init__(
        self,
        sources: Mapping[str, Mapping[str, Any]],
        tokenizer: str,
        *,
        row_length: int = 2048,
        batch_size: int = 8,
        num_steps: int = 0,
        seed: int = 0,
        num_hosts: int = 1,
        host: int = 0,
    ):
        """Reads, encodes and packs all sources.

        Args:
          sources: name -> the settings of `config.source`: `path`, `format`, `weight`, ...
          tokenizer: folder or file of a model or a tokenizer.
          row_length: tokens of a row.
          batch_size: rows of the global batch, over all hosts.
          num_steps: number of batches; 0: until all sources reach their `epochs` or
            `max_tokens`.
          seed: of the order of the rows.
          num_hosts: each host gets `batch_size / num_hosts` rows of every batch.
          host: the number of this one, from 0.

        Raises:
          InputError: names the setting, or the file and the line, that is wrong.
        """
        config = config_lib.default()
        config.model.path = tokenizer
        config.data.row_length, config.data.batch_size = row_length, batch_size
        config.train.num_steps, config.seed = num_steps, seed
        config.optimizer.warmup_steps = 0
        for name, settings in sources.items():
            if unknown := set(settings) - set(config_lib.source()):
                raise InputError(
                    f"sources.{name}.{min(unknown)}: no such setting; there are "
                    f"{', '.join(config_lib.source())}"
                )
            config.sources[name] = config_lib.source(**settings)
        config_lib.validate(config, 1)
        self._config, self._hosts = config, (num_hosts, host)
        self._data = pipeline.load(config, tokenizer_lib.load(tokenizer))

    @property
    def source_names(self) -> tuple[str, ...]:
        """The sources, in the order of the batches' `source_ids`."""
        return tuple(rows.source.name for rows in self._data.packed)

    @property
    def report(self) -> list[dict[str, Any]]:
        """One dict per source: its tokens, its share, its epochs, what was left out."""
        return self._data.report

    def __len__(self) -> int:
        """The number of batches."""
        return self._data.num_steps

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.batches()

    def batches(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The batches from number `first` on, to resume a run: no state has to be saved."""
        config = self._config
        stream = pipeline.batches(
            config, self._data, first * config.data.batch_size, *self._hosts
        )
        for _, batch in zip(range(first, len(self)), stream, strict=False):
            yield batch


def evaluate(
    model: LoadedModel,
    files: Mapping[str, str],
    *,
    row_length: int = 1024,
    batch_size: int = 8,
    limit: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """Measures texts, exams and clozes, as the command `evaluate` does.

    Examples:
      >>> from mixcpt_jax import evaluate, load_model
      >>> measured = evaluate(load_model("model"), {"book": "domain.jsonl"})
      >>> sorted(measured["book"])
      ['accuracy', 'bits_per_byte', 'perplexity']
      >>> sorted(measured["book"]["perplexity"])
      ['high', 'low', 'value']

    Args:
      model: from `load_model`.
      files: name -> path; the fields of its records decide what is measured, see
        `data.tasks`.
      row_length: maximum number of tokens of a document.
      batch_size: rows at a time.
      limit: number of items of each file, the first; 0: all.

    Returns:
      Name -> measure -> value, low and high, the 95 % interval over items.

    Raises:
      InputError: names the file and the record that is wrong.
    """
    read = [tasks.read(f"{name}={path}", limit) for name, path in files.items()]
    measured = evaluator.measure_tasks(model, read, row_length, batch_size)
    return {name: task["measures"] for name, task in measured["tasks"].items()}


def generate(
    model: LoadedModel,
    prompts: Sequence[str] | Sequence[Sequence[Mapping[str, Any]]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continues texts, or answers conversations in the chat template.

    Examples:
      >>> from mixcpt_jax import generate, load_model
      >>> model = load_model("model")
      >>> len(generate(model, ["optax chains transformations"], max_new_tokens=4))
      1
      >>> messages = [{"role": "user", "content": "hello"}]
      >>> len(generate(model, [messages], max_new_tokens=4, temperature=1.0, seed=1))
      1

    Args:
      model: from `load_model`.
      prompts: texts to continue, or lists of messages to answer.
      max_new_tokens: longer answers are cut off.
      temperature: 0 decodes greedily.
      top_k: samples from this many of the most likely tokens; None: from all.
      top_p: of these, samples from the smallest set with this share of the probability.
      seed: of the random keys.

    Returns:
      The new text for each prompt.

    Raises:
      InputError: a setting is out of range, or a prompt does not fit the context.
    """
    sampler = generation.Sampler(
        model.config, model.tokenizer, compute_dtype=model.dtype
    )
    is_text = [isinstance(prompt, str) for prompt in prompts]
    if any(is_text) != all(is_text):
        raise InputError("prompts: give texts or conversations, not both in one call")
    decode = sampler.complete if all(is_text) else sampler.chat
    sampling = generation.SamplingParams(temperature, top_k, top_p)
    with jax.set_mesh(model.mesh):
        return decode(model.params, prompts, max_new_tokens, sampling, seed)
