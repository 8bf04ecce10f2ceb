"""From a config to everything that a phase reads: training batches, holdouts, exams."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import logging

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError, in_place, naming
from mixcpt_jax.data import corpus as corpus_lib
from mixcpt_jax.data import documents, exams, formats, mixture, sources, token_cache
from mixcpt_jax.data import files as files_lib
from mixcpt_jax.data.corpus import Corpus
from mixcpt_jax.data.tally import Tally
from mixcpt_jax.data.teacher_cache import Form, TeacherRows

# The jobs that `load` their data; others read a part of it, or none.
JOBS = ("train", "evaluate", "merge")


@dataclasses.dataclass(frozen=True)
class Data:
    """What a phase reads.

    Attributes:
      packed: the sources of the training stream, in the order of `source_ids`.
      num_steps: of the phase.
      texts: name -> rows that are measured and never trained on.
      pairs: name -> the same, for preference pairs.
      exams: name -> multiple choice.
      prompts: conversations to answer before and after training.
      files: what was read, name -> {file: hash}.
      report: one dict per source: what it holds and how much of it the phase reads.
      limited: as text, the texts, pairs and exams of which `eval.max_tokens` measures only
        a part.
    """

    packed: list[mixture.PackedRows]
    num_steps: int
    texts: dict[str, mixture.PackedRows]
    pairs: dict[str, mixture.PackedRows]
    exams: dict[str, exams.Exam]
    prompts: list[list[dict[str, str]]]
    files: dict[str, dict[str, str]]
    report: list[dict[str, Any]]
    limited: list[str]


def load(
    config: ml_collections.ConfigDict,
    tokenizer: Any,
    max_positions: int | None = None,
) -> Data:
    """Reads, encodes and packs what the phase reads.

    Sources with neither weight nor holdout are not read, so a config may name files that
    exist only in a later phase.

    Args:
      config: a validated config.
      tokenizer: the model's.
      max_positions: its context length, which measured items must fit; None: no limit.

    Raises:
      InputError: names the file, line or setting that is wrong.
    """
    row_length = config.eval.row_length or config.data.row_length
    max_tokens, limited = config.eval.max_tokens, []
    is_training = config.job == "train"
    find_files(config)
    measured = corpus_lib.measure(config)
    corpora, texts, pairs, files = {}, {}, {}, {}
    for name, source in config.sources.items():
        if _is_read(config, f"sources.{name}", source):
            corpora[name] = Corpus(config, source, measured)
            files[name] = sources.hashes(source.path, source.reader, source.split)
    for place, source in config_lib.all_sources(config):
        if place not in measured.records:
            continue
        name = place.rpartition(".")[2]
        with naming(place):
            examples, places = _measured(
                name, measured.records[place], source, tokenizer, max_positions
            )
        group = len(examples) // max(len(places), 1)
        part, kept = mixture.within(examples, max_tokens, group)
        is_pair = source.format == "chat_preference"
        if part is not examples:
            limited.append(
                f"{'pairs ' if is_pair else ''}{name} {part.num_tokens:,} of "
                f"{examples.num_tokens:,} tokens"
            )
        places = [places[number] for number in kept]
        rows = mixture.pack_text(name, part, row_length, max_positions, places)
        (pairs if is_pair else texts)[name] = rows
        if place.startswith("eval."):
            files[place] = sources.hashes(source.path, source.reader, source.split)
    if config.eval.prompts:
        files["eval.prompts"] = sources.hashes(config.eval.prompts, "jsonl")
    loaded_exams = {}
    for name, exam in config.eval.exams.items():
        files[f"eval.exams.{name}"] = sources.hashes(exam.path, exams.reader(exam.path))
        questions = exams.read(exam.path)[: exam.num_questions or None]
        asked_of = exams.within(questions, tokenizer, max_tokens)
        if len(asked_of) < len(questions):
            limited.append(f"exam {name} {len(asked_of)} of {len(questions)} questions")
        loaded_exams[name] = exams.encode(
            [questions[number] for number in asked_of],
            tokenizer,
            row_length,
            max_positions,
            exam.path,
            [f"{exam.path}: question {number + 1}" for number in asked_of],
        )
    packed, report, num_steps = [], [], 0
    if is_training:
        packed, notes = _pack(config, corpora, measured.holdout, files, tokenizer)
        num_steps = _num_steps(config, packed)
        rows = mixture.describe(packed, num_steps * config.data.batch_size)
        report = [row | note for row, note in zip(rows, notes, strict=True)]
        _check_epochs(config, report)
    return Data(
        packed=packed,
        num_steps=num_steps,
        texts=texts,
        pairs=pairs,
        exams=loaded_exams,
        prompts=_load_prompts(config.eval.prompts),
        files=files,
        report=report,
        limited=limited,
    )


def find_files(config: ml_collections.ConfigDict, workdir: str = "") -> None:
    """Looks for what a phase reads from local disks; opens no data.

    Args:
      config: of the phase; its paths may still name other phases.
      workdir: of the run, whose phases may still write files below it; empty: all files
        must exist.

    Raises:
      InputError: names the key of a path at which nothing is found, or whose files need a
        library that is not installed.
    """
    named = [
        (f"{place}.path", source.path, source.reader, source.split)
        for place, source in config_lib.all_sources(config)
        if _is_read(config, place, source)
    ]
    named += [
        (f"eval.exams.{name}.path", exam.path, None, "")
        for name, exam in config.eval.exams.items()
    ]
    if config.eval.prompts:
        named.append(("eval.prompts", config.eval.prompts, "jsonl", ""))
    own = workdir and os.path.join(os.path.abspath(workdir), "")
    for key, path, reader, split in named:
        is_local = "://" not in path and not path.startswith("phase:")
        if not is_local or (own and os.path.abspath(path).startswith(own)):
            continue
        try:
            reader = exams.reader(path) if reader is None else reader
            found = files_lib.find(path, reader, split)
            documents.require_libraries(found.by_reader())
        except InputError as error:
            raise InputError(f"{key}: {error}") from error


def _is_read(config, place: str, source: ml_collections.ConfigDict) -> bool:
    """Whether the phase trains on a source or measures it."""
    trains = config.job == "train" and source.weight
    return bool(trains or source.holdout or place.startswith("eval."))


def synthetic(config: ml_collections.ConfigDict, form: Form | None = None) -> Data:
    """Synthetic training data for a step that is only compiled; reads no text.

    Each source is one row, of one document or of one pair.

    Args:
      config: of a phase that trains.
      form: of the teacher cache, if the step reads one.
    """
    length = config.data.row_length
    used = []
    for name, source in config.sources.items():
        has_pairs = source.format == "chat_preference"
        lengths = [length // 2] * 2 if has_pairs else [length + 1]
        examples = formats.Examples.collect(
            (np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths
        )
        references = has_pairs and config.preference.reference == "precomputed"
        used.append(
            mixture.Source(
                name,
                examples,
                share=source.weight,
                has_pairs=has_pairs,
                objectives=config_lib.objective_weights(config, name),
                reference_logps=np.zeros(2, np.float32) if references else None,
                teacher_rows=TeacherRows(form) if form else None,
            )
        )
    packed = mixture.pack_sources(used, length)
    return Data(packed, config.train.num_steps or 1, {}, {}, {}, [], {}, [], [])


def _measured(
    name: str, records, source, tokenizer, max_positions: int | None
) -> tuple[formats.Examples, list[str]]:
    """The measured examples of a source, and where each item is from."""
    tally = Tally(keeps_places=True)
    examples = _encode(records, source, tokenizer, tally)
    tally.warn(name, ["lost", "spelt"])
    for line in tally.lines(["unread"]):
        logging.info("%s: %s", name, line)
    group = len(examples) // max(len(tally.places), 1)
    examples, kept = mixture.of_context(examples, max_positions, group)
    places = [tally.places[number] for number in kept]
    if len(places) < len(tally.places):
        left_out = set(tally.places) - set(places)
        logging.warning(
            "%s: %d of %d items are longer than the model's context of %d tokens and are "
            "not measured, such as %s",
            name,
            len(tally.places) - len(places),
            len(tally.places),
            max_positions,
            next(place for place in tally.places if place in left_out),
        )
    return examples, places


def _pack(config, corpora, holdout, files, tokenizer):
    """The sources of the training stream, and further facts about each for the report."""
    used, notes = [], []
    for name, source in config.sources.items():
        has_pairs = source.format == "chat_preference"
        examples, places, note = formats.Examples.collect([]), [], Tally().counts()
        if source.weight:
            with naming(f"sources.{name}"):
                examples, places, note = _examples(
                    config, name, corpora[name], holdout, files[name], tokenizer
                )
        examples, cut = mixture.fit(
            examples,
            config.data.row_length,
            config.data.overlong,
            places,
            group=2 if has_pairs else 1,
        )
        if cut["dropped"] and not len(examples):
            raise InputError(
                f"sources.{name}: all of its {cut['dropped']} samples are longer than "
                f"data.row_length={config.data.row_length} and dropped; make it larger"
            )
        # Splitting documents is normal, so it is not reported.
        usual = ("split",) if source.format == "document" else ()
        overlong = {rule: n for rule, n in cut.items() if n and rule not in usual}
        note |= {"overlong": overlong}
        num_held_out = note["left_out"].get("held_out", 0)
        notes.append({"held_out": num_held_out} | note | cut)
        scale = 1.0
        if config.data.temperature:
            scale = max(examples.num_loss_tokens, 1) ** (1 / config.data.temperature)
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
                is_cut=source.format == "document",
                objectives=config_lib.objective_weights(config, name),
            )
        )
    packed = mixture.pack_sources(
        used,
        config.data.row_length,
        config.data.packing,
        config.seed,
        tokenizer.pad_id,
    )
    return packed, notes


def _examples(
    config: ml_collections.ConfigDict,
    name: str,
    corpus: Corpus,
    holdout: corpus_lib.Holdout,
    files: dict[str, str],
    tokenizer: Any,
) -> tuple[formats.Examples | token_cache.PreparedExamples, list[str], dict[str, Any]]:
    """The examples of a source: prepared ones if they match the config, else encoded here.

    Returns:
      The examples; where each sample is from, if `fit` needs it; and, for the report,
      whether they were `prepared`, and `Tally.counts`.
    """
    source = config.sources[name]
    if config.data.prepared:
        folder = token_cache.folder_of(config.data.prepared, name)
        if not folder.parent.exists():
            raise InputError(
                f"data.prepared={config.data.prepared}: no such folder; run "
                "`python -m mixcpt_jax prepare` with this config, or correct the path"
            )
        manifest = token_cache.read_manifest(folder)
        part = None
        if manifest is not None:
            key = corpus_lib.identity(config, source, tokenizer, files, holdout)
            part = token_cache.difference(manifest, key)
        if manifest is not None and part is None:
            examples = token_cache.PreparedExamples(folder, manifest)
            return examples, [], {"prepared": True} | examples.found
        logging.warning(
            "sources.%s: %s, so it is tokenized here; `python -m mixcpt_jax prepare` with "
            "this config prepares it",
            name,
            f"{folder} was prepared with other {part}"
            if part
            else f"{folder} holds nothing prepared",
        )
    tally = Tally(keeps_places=config.data.overlong == "refuse")
    examples = _encode(corpus.train_split(), source, tokenizer, tally)
    tally.left_out.update(corpus.left_out)
    tally.pass_over(sources.not_read(source.path, source.reader, source.split))
    found, shown = tally.counts(), corpus.examples | tally.examples
    shown = {
        why: in_place(shown[why], f"sources.{name}")
        for kind in ("left_out", "files")
        for why in found[kind]
    }
    return examples, tally.places, {"prepared": False, "examples": shown} | found


def _num_steps(config, packed: list[mixture.PackedRows]) -> int:
    """The number of steps, from the config or from the limits of the sources."""
    batch_size, asked = config.data.batch_size, config.train.num_steps
    used = [rows for rows in packed if rows.source.share]
    order = mixture.interleaving(used, asked * batch_size)
    if not asked:
        steps = math.ceil(order.rows_to_limits() / batch_size)
        config_lib.check_schedule(config, steps)
        return steps
    if order.num_rows == math.inf:
        return asked
    most = math.ceil(order.num_rows / batch_size)
    if asked > most:
        raise InputError(
            f"train.num_steps={asked}: the sources reach their epochs and max_tokens "
            f"after {most} steps; set it to at most that (0: all of them), or raise a limit"
        )
    return asked


def _check_epochs(config, report: list[dict[str, Any]]) -> None:
    """Warns about sources that are repeated too often, and refuses them above the limit.

    Raises:
      InputError: names the source, its epochs and the remedy.
    """
    warned, most = config.data.warn_epochs, config.data.max_epochs
    for source in report:
        name, epochs = source["name"], source["epochs"]
        found = (
            f"sources.{name}: its {source['loss_tokens']:,} tokens are read "
            f"{epochs:.1f} times"
        )
        remedy = "give it more text, a lower weight or epochs, or train fewer steps"
        if most and epochs > most:
            raise InputError(
                f"{found}, data.max_epochs={most:g}; {remedy}, or raise data.max_epochs"
            )
        if warned and epochs > warned:
            logging.warning(
                "%s; text repeated that often teaches little: %s", found, remedy
            )


def batches(
    config: ml_collections.ConfigDict,
    data: Data,
    first_row: int,
    num_hosts: int = 1,
    host: int = 0,
) -> grain.IterDataset:
    """This host's part of the training stream, from row `first_row`.

    The stream is a function of the sources and the seed, so the number of rows taken is
    its whole position.
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
    """Returns the data with the reference's log-probabilities in the rows of pairs.

    Args:
      data: what a phase reads.
      references: "sources/NAME" -> log-probabilities, nats, [examples].
    """
    return _with(
        data,
        "reference_logps",
        {name.removeprefix("sources/"): logps for name, logps in references.items()},
    )


def with_teacher(data: Data, teacher_rows: Mapping[str, TeacherRows]) -> Data:
    """Returns the data with teacher outputs, given by source, in the training rows."""
    return _with(data, "teacher_rows", teacher_rows)


def _with(data: Data, field: str, values: Mapping[str, Any]) -> Data:
    packed = [
        dataclasses.replace(
            rows,
            source=dataclasses.replace(
                rows.source, **{field: values.get(rows.source.name)}
            ),
        )
        for rows in data.packed
    ]
    return dataclasses.replace(data, packed=packed)


def fingerprint(data: Data) -> dict[str, str]:
    """Source name -> hash of its tokens; a resumed run uses it to recognize the stream."""
    return {rows.source.name: rows.source.examples.fingerprint for rows in data.packed}


def _encode(records, source, tokenizer, tally: Tally) -> formats.Examples:
    """The examples of a source's records; records left out are counted and logged.

    Raises:
      InputError: see `formats.encode`; or nothing is left.
    """
    examples = formats.encode(
        records,
        source.format,
        tokenizer,
        source.fields.to_dict(),
        source.preference_side,
        tally,
        source.on_bad_record,
    )
    if tally.left_out and not len(examples):
        [found] = tally.lines(["left_out"])
        raise InputError(f"{source.path}: no record is left; {found}")
    tally.warn(source.path, ["left_out"])
    return examples


def _load_prompts(path: str) -> list[list[dict[str, str]]]:
    if not path:
        return []
    tally = Tally()
    prompts = [formats.read_prompt(r, tally) for r in sources.read(path, "jsonl")]
    tally.warn(path)
    return prompts
