"""From a config to everything a phase reads: training batches, held-out text, exams."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import grain
import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import docstrings, exams, format, mixture, sources


@dataclasses.dataclass(frozen=True)
class Data:
    """What a phase reads.

    Attributes:
      packed: the sources of the training stream, in the order of `source_ids`.
      objectives: source name -> weight of each objective, same order.
      texts: name -> rows that are measured and never trained on.
      exams: name -> multiple choice.
      report: one dict per source: what it holds and what the mixture gives of it.
    """

    packed: list[mixture.PackedRows]
    objectives: dict[str, dict[str, float]]
    texts: dict[str, mixture.PackedRows]
    exams: dict[str, exams.Exam]
    report: list[dict[str, Any]]


def load(config: ml_collections.ConfigDict, tokenizer: Any) -> Data:
    """Reads, encodes and packs every source of the config.

    Args:
      config: a validated config.
      tokenizer: the model's.

    Raises:
      InputError: names the file, line or setting that is wrong.
    """
    held_in, texts = {}, {}
    for name, source in config.sources.items():
        held_in[name], held_out = sources.split_holdout(
            _read(source), source.holdout, config.seed
        )
        if held_out:
            texts[name] = _encode(held_out, source, tokenizer)
    for name, source in config.eval.texts.items():
        texts[name] = _encode(_read(source), source, tokenizer)
    objectives = {
        name: config_lib.objective_weights(config, name) for name in config.sources
    }
    row_length = config.data.row_length
    packed = mixture.pack_sources(
        [
            mixture.Source(
                name,
                _encode(held_in[name], source, tokenizer),
                share=source.weight,
                **{f"{key}_weight": w for key, w in objectives[name].items()},
            )
            for name, source in config.sources.items()
        ],
        row_length,
        config.data.packing,
        config.seed,
        tokenizer.pad_id,
    )
    return Data(
        packed=packed,
        objectives=objectives,
        texts={
            name: mixture.pack_text(name, examples, row_length)
            for name, examples in texts.items()
        },
        exams={
            name: _load_exam(config, exam, held_in, tokenizer)
            for name, exam in config.eval.exams.items()
        },
        report=mixture.describe(packed),
    )


def batches(
    config: ml_collections.ConfigDict,
    data: Data,
    first_batch: int,
    num_hosts: int = 1,
    host: int = 0,
) -> grain.IterDataset:
    """This host's share of the training stream from global batch `first_batch` on.

    The stream is a function of the sources and the seed, so the number of batches
    taken is all there is to its position.
    """
    return mixture.mixture(
        data.packed,
        config.data.batch_size,
        config.seed,
        num_hosts,
        host,
        config.data.num_workers,
        first_batch,
    )


def fingerprint(data: Data) -> dict[str, str]:
    """Source name -> a hash of its tokens: tells whether the stream is still the same."""
    return {
        rows.source.name: hashlib.blake2b(
            rows.source.examples.tokens.tobytes(), digest_size=8
        ).hexdigest()
        for rows in data.packed
    }


def _read(source: ml_collections.ConfigDict) -> Iterator[sources.Record]:
    records = sources.read(source.path, source.reader)
    return itertools.islice(records, source.max_records or None)


def _encode(records, source, tokenizer) -> format.Examples:
    return format.encode(
        records,
        source.format,
        tokenizer,
        source.fields.to_dict(),
        source.preference_side,
    )


def _load_exam(config, exam, held_in, tokenizer) -> exams.Exam:
    if exam.path:
        questions = exams.read(exam.path)[: exam.num_questions or None]
    else:
        documents = [record.fields for record in held_in[exam.source]]
        questions = docstrings.exam(documents, exam.num_questions, config.seed)
    return exams.encode(questions, tokenizer, config.data.row_length)
