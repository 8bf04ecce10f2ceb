"""From a config to everything a phase reads: training batches, held-out text, exams."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import logging

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import docstrings, exams, format, mixture, sources
from mixcpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Data:
    """What a phase reads.

    Attributes:
      packed: the sources of the training stream, in the order of `source_ids`.
      objectives: source name -> weight of each objective, same order.
      texts: name -> rows that are measured and never trained on.
      pairs: name -> the same of preference pairs.
      exams: name -> multiple choice.
      prompts: conversations to answer before and after.
      files: what was read, name -> {file: hash}.
      report: one dict per source: what it holds and what the mixture gives of it.
      num_steps: how many the phase takes.
    """

    packed: list[mixture.PackedRows]
    objectives: dict[str, dict[str, float]]
    texts: dict[str, mixture.PackedRows]
    pairs: dict[str, mixture.PackedRows]
    exams: dict[str, exams.Exam]
    prompts: list[list[dict[str, str]]]
    files: dict[str, dict[str, str]]
    report: list[dict[str, Any]]
    num_steps: int


def load(config: ml_collections.ConfigDict, tokenizer: Any) -> Data:
    """Reads, encodes and packs what the phase reads of the config.

    Sources without weight or holdout are not read: a phase may name files that only a
    later one has.

    Args:
      config: a validated config.
      tokenizer: the model's.

    Raises:
      InputError: names the file, line or setting that is wrong.
    """
    row_length = config.eval.row_length or config.data.row_length
    is_training = config.job == "train"
    asked = {exam.source for exam in config.eval.exams.values()}
    held_in, texts, pairs, files = {}, {}, {}, {}
    for name, source in config.sources.items():
        held_in[name] = []
        if (is_training and source.weight) or source.holdout or name in asked:
            held_in[name], held_out = read_source(config, source)
            files[name] = sources.hashes(source.path, source.reader, source.split)
            if held_out:
                is_pair = source.format == "chat_preference"
                measured = pairs if is_pair else texts
                measured[name] = _encode(held_out, source, tokenizer)
    for name, source in config.eval.texts.items():
        texts[name] = _encode(_measured(config, source), source, tokenizer)
        files[f"eval.texts.{name}"] = sources.hashes(
            source.path, source.reader, source.split
        )
    for name, source in config.eval.pairs.items():
        pairs[name] = _encode(_measured(config, source), source, tokenizer)
        files[f"eval.pairs.{name}"] = sources.hashes(
            source.path, source.reader, source.split
        )
    for name, exam in config.eval.exams.items():
        if exam.path:
            files[f"eval.exams.{name}"] = sources.hashes(exam.path, "jsonl")
    if config.eval.prompts:
        files["eval.prompts"] = sources.hashes(config.eval.prompts, "jsonl")
    packed, report, num_steps = [], [], 0
    objectives = {
        name: config_lib.objective_weights(config, name) for name in config.sources
    }
    if is_training:
        packed, counts = _pack(config, held_in, objectives, tokenizer)
        num_steps = _num_steps(config, packed)
        rows = mixture.describe(packed, num_steps * config.data.batch_size)
        report = [row | cut for row, cut in zip(rows, counts, strict=True)]
    return Data(
        packed=packed,
        objectives=objectives,
        texts={
            name: mixture.pack_text(name, examples, row_length)
            for name, examples in texts.items()
        },
        pairs={
            name: _pack_pairs(name, examples, row_length)
            for name, examples in pairs.items()
        },
        exams={
            name: _load_exam(config, exam, held_in, tokenizer, row_length)
            for name, exam in config.eval.exams.items()
        },
        prompts=_load_prompts(config.eval.prompts),
        files=files,
        report=report,
        num_steps=num_steps,
    )


def read_source(
    config: ml_collections.ConfigDict, source: ml_collections.ConfigDict
) -> tuple[list[sources.Record], list[sources.Record]]:
    """The records of a source: those in training and those held out of it.

    The choice is made among all records, so it is the same whatever the format; then
    those that the format cannot use are left out, where the source says so, as are
    those that cannot be read.

    Raises:
      InputError: see `sources.read`, `sources.split_holdout` and `format.check`; or no
        record is left.
    """
    refuses = source.on_bad_record == "refuse"
    num_bad, example = 0, ""

    def note(error: InputError) -> None:
        nonlocal num_bad, example
        num_bad += 1
        example = example or str(error)

    records = sources.read(
        source.path, source.reader, source.split, None if refuses else note
    )
    parts = sources.split_holdout(
        itertools.islice(records, source.max_records or None),
        source.holdout,
        config.seed,
    )
    if refuses:
        return parts
    settings = source.format, source.fields.to_dict(), source.preference_side

    def is_usable(record: sources.Record) -> bool:
        try:
            format.check(record, *settings)
        except InputError as error:
            note(error)
            return False
        return True

    held_in, held_out = ([r for r in part if is_usable(r)] for part in parts)
    if num_bad and not held_in:
        raise InputError(
            f"{source.path}: no record is left, {num_bad} are skipped, such as {example}"
        )
    if num_bad:
        logging.warning(
            "%s: skipped %d bad records or ends of damaged files, such as %s",
            source.path,
            num_bad,
            example,
        )
    return held_in, held_out


def _pack(config, held_in, objectives, tokenizer):
    """The training stream's sources, and of each how many examples were cut."""
    used, counts = [], []
    for name, source in config.sources.items():
        has_pairs = source.format == "chat_preference"
        records = held_in[name] if source.weight else []
        is_doubled = source.format == "preference" and source.preference_side == "both"
        examples, cut = mixture.fit(
            _encode(records, source, tokenizer),
            config.data.row_length,
            config.data.overlong,
            [r.place for r in records for _ in range(2 if is_doubled else 1)],
            group=2 if has_pairs else 1,
        )
        if cut["dropped"] and not len(examples):
            raise InputError(
                f"sources.{name}: all of its {cut['dropped']} samples are longer than "
                f"data.row_length={config.data.row_length} and dropped; make it larger"
            )
        counts.append(cut)
        scale = 1.0
        if config.data.temperature:
            scale = max(examples.num_learnt, 1) ** (1 / config.data.temperature)
        final = source.final_weight
        used.append(
            mixture.Source(
                name,
                examples,
                share=scale * source.weight,
                final_share=None if final is None else scale * final,
                epochs=source.epochs,
                max_tokens=source.max_tokens,
                has_pairs=has_pairs,
                objectives=objectives[name],
            )
        )
    packed = mixture.pack_sources(
        used,
        config.data.row_length,
        config.data.packing,
        config.seed,
        tokenizer.pad_id,
    )
    return packed, counts


def _num_steps(config, packed: list[mixture.PackedRows]) -> int:
    """How many steps the phase takes, from the config or from the data."""
    batch_size, asked = config.data.batch_size, config.train.num_steps
    used = [rows for rows in packed if rows.source.share]
    rows = mixture.interleaving(used, asked * batch_size).num_rows
    if rows == math.inf:
        return asked
    most = math.ceil(rows / batch_size)
    if not asked:
        config_lib.check_schedule(config, most)
    if asked > most:
        raise InputError(
            f"train.num_steps={asked}: the epochs and max_tokens of the sources end after "
            f"{most} steps; set it to at most that (0: all of them), or raise a limit"
        )
    return asked or most


def batches(
    config: ml_collections.ConfigDict,
    data: Data,
    first_row: int,
    num_hosts: int = 1,
    host: int = 0,
) -> grain.IterDataset:
    """This host's share of the training stream from row `first_row` on.

    The stream is a function of the sources and the seed, so the number of rows taken is
    all there is to its position.
    """
    return mixture.mixture(
        data.packed,
        config.data.batch_size,
        config.seed,
        num_hosts,
        host,
        config.data.num_workers,
        first_row,
        data.num_steps * config.data.batch_size,
    )


def with_references(data: Data, references: Mapping[str, np.ndarray]) -> Data:
    """The same, whose training rows of pairs have the reference's log-probabilities.

    Args:
      data: what a phase reads.
      references: "sources/NAME" -> log-probabilities, nats, [examples].
    """
    packed = []
    for rows in data.packed:
        logps = references.get(f"sources/{rows.source.name}")
        if logps is not None:
            source = dataclasses.replace(rows.source, reference_logps=logps)
            rows = mixture.PackedRows(
                source, rows.source_id, rows.plan, rows.pad_id, rows.num_segments
            )
        packed.append(rows)
    return dataclasses.replace(data, packed=packed)


def fingerprint(data: Data) -> dict[str, str]:
    """Source name -> a hash of its tokens: tells whether the stream is still the same."""
    return hashes({rows.source.name: rows for rows in data.packed})


def hashes(rows_by_name: Mapping[str, mixture.PackedRows]) -> dict[str, str]:
    """A hash of each one's tokens, by name."""
    return {
        name: hashlib.blake2b(
            rows.source.examples.tokens.tobytes(), digest_size=8
        ).hexdigest()
        for name, rows in rows_by_name.items()
    }


def _measured(config, source) -> list[sources.Record]:
    """Of a source with a holdout that part, else all of it."""
    held_in, held_out = read_source(config, source)
    return held_out if source.holdout else held_in


def _encode(records, source, tokenizer) -> format.Examples:
    return format.encode(
        records,
        source.format,
        tokenizer,
        source.fields.to_dict(),
        source.preference_side,
    )


def _pack_pairs(name: str, examples: format.Examples, row_length: int):
    """Pairs that are measured: none is split, and none is lost."""
    fitting, counts = mixture.fit(examples, row_length, "truncate", group=2)
    if counts["truncated"]:
        logging.warning(
            "%s: %d held-out pairs are cut to fit data.row_length=%d",
            name,
            counts["truncated"],
            row_length,
        )
    if counts["dropped"]:
        raise InputError(
            f"{name}: of {counts['dropped']} held-out pairs the prompt alone fills half "
            f"of data.row_length={row_length}; make it larger or shorten them"
        )
    return mixture.pack_text(name, fitting, row_length)


def _load_prompts(path: str) -> list[list[dict[str, str]]]:
    if not path:
        return []
    return [format.read_prompt(record) for record in sources.read(path, "jsonl")]


def _load_exam(config, exam, held_in, tokenizer, row_length: int) -> exams.Exam:
    if exam.path:
        questions = exams.read(exam.path)[: exam.num_questions or None]
    else:
        documents = [record.fields for record in held_in[exam.source]]
        questions = docstrings.exam(documents, exam.num_questions, config.seed)
    return exams.encode(questions, tokenizer, row_length)
