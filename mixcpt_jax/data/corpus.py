"""Splits a source into train split and holdout, and leaves out bad and filtered records."""

import dataclasses
import functools
import hashlib
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
from absl import logging

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError, naming
from mixcpt_jax.data import exams, filters, formats, readers, sources
from mixcpt_jax.data.readers import DocumentError, OnBad
from mixcpt_jax.data.tally import Tally

# `(function, items) -> (item, function(item))` in order.
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]

_RECORDS_PER_BLOCK = 256
# Increment this whenever the same records and settings start to give different tokens.
_VERSION = 4
# Increment this whenever the choice of held-out records of a source changes.
SPLIT_VERSION = 4


def one_by_one(function, items):
    """The `InOrder` of one process."""
    return ((item, function(item)) for item in items)


class Holdout:
    """Hashes of the texts that a phase measures, and which setting measures each.

    Texts that differ only in case, whitespace and character forms count as equal, see
    `filters.digest`. A record is held out if one of its whole texts equals a held-out text
    or a part of one, or if one of its parts equals a whole held-out text. Records that only
    share a part, such as the same answer to different questions, are not held out. See
    `formats.passages`.
    """

    def __init__(self):
        self._wholes: dict[bytes, str] = {}
        self._parts: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._wholes)

    def add(self, passages: formats.Passages, holder: str) -> None:
        """Holds out a record.

        Args:
          passages: of the record.
          holder: the setting that measures it, such as "eval.texts.NAME".
        """
        for keys, texts in zip((self._wholes, self._parts), passages, strict=True):
            for text in texts:
                keys.setdefault(filters.digest(text), holder)

    def holder(self, passages: formats.Passages) -> str:
        """The setting that measures a record with these passages, or ''."""
        for text in passages.wholes:
            key = filters.digest(text)
            if found := self._wholes.get(key) or self._parts.get(key):
                return found
        for text in passages.parts:
            if found := self._wholes.get(filters.digest(text)):
                return found
        return ""

    @property
    def fingerprint(self) -> str:
        """A hash of the texts, 16 hex digits; '' if there are none."""
        if not self:
            return ""
        digest = hashlib.blake2b(digest_size=8)
        for keys in (self._wholes, self._parts):
            digest.update(b"".join(sorted(keys)) + b" ")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Measured:
    """The records that a phase measures.

    Attributes:
      records: place in the config, such as "sources.NAME" -> its measured records.
      holdout: their texts, which no source trains on.
    """

    records: dict[str, list[sources.Record]]
    holdout: Holdout


def measure(config: ml_collections.ConfigDict) -> Measured:
    """Reads the records that a phase measures.

    These are the `holdout` of each source and of each entry of `eval.texts` and
    `eval.pairs`; of entries without one, all records.

    Raises:
      InputError: see `Corpus.measured`.
    """
    measured = Measured({}, Holdout())
    for place, entry in config_lib.all_sources(config):
        if place.startswith("eval.") or entry.holdout:
            corpus = Corpus(config, entry, measured)
            with naming(place):
                measured.records[place] = corpus.measured()
            for record in measured.records[place]:
                measured.holdout.add(corpus.passages(record), place)
    return measured


class Corpus:
    """The records of a source. Each pass reads its files again and keeps no records.

    The holdout is chosen among all records, so it does not depend on the format. Then
    records are dropped, in this order: if the source says so, records that cannot be read
    or that the format cannot use; records whose text the phase measures, whichever source
    or `eval` entry holds it out; and records that `config.clean` filters.

    Attributes:
      left_out: reason -> number of records, of the last complete pass of `train_split`;
        the reason of a `readers.DocumentError`, "bad_record", "held_out" or one of
        `filters.REASONS`.
      examples: reason -> one of them.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        source: ml_collections.ConfigDict,
        measured: Measured | None = None,
    ):
        """Reads nothing.

        Args:
          config: a validated config.
          source: one of its sources or measured texts.
          measured: what the phase measures; None: `measure(config)` and the source's own
            holdout are read when first needed.
        """
        self._config, self._source = config, source
        self._measured = measured
        self._clean = types.SimpleNamespace(**config.clean.to_dict())
        self._exams = _exam_files(config)
        self._settings = (
            source.format,
            source.fields.to_dict(),
            source.preference_side,
        )
        self.left_out: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    @functools.cached_property
    def _chosen(self) -> list[sources.Record]:
        source, tally, num_read = self._source, Tally(), itertools.count()
        on_bad = self._handler(tally.skip)

        def text_of(record: sources.Record) -> str:
            text = formats.said_in(record, *self._settings[:2])
            # Report an error in the first record, such as a wrong field name, before an
            # error about the number of records.
            if not text or not next(num_read):
                self._is_usable(record, on_bad)
            return text

        try:
            chosen = sources.choose_holdout(
                self._read(on_bad),
                text_of,
                source.holdout,
                self._config.seed,
                source.path,
            )
        except InputError as error:
            if not tally.left_out:
                raise
            [found] = tally.lines(["left_out"])
            raise InputError(f"{error}; {found}") from error
        return list(chosen.values())

    @functools.cached_property
    def _phase_holdout(self) -> Holdout:
        if self._measured is not None:
            return self._measured.holdout
        holdout = measure(self._config).holdout
        for record in self.holdout:
            holdout.add(self.passages(record), self._source.path)
        return holdout

    def passages(self, record: sources.Record) -> formats.Passages:
        """The texts of a record of this source, see `formats.passages`."""
        return formats.passages(record, *self._settings)

    @property
    def holdout(self) -> list[sources.Record]:
        """Its holdout.

        Raises:
          InputError: see `sources.read` and `sources.choose_holdout`.
        """
        on_bad = self._handler(lambda error: None)
        return [record for record in self._chosen if self._is_usable(record, on_bad)]

    def measured(self) -> list[sources.Record]:
        """Its holdout, or all of its records if it has none.

        Raises:
          InputError: see `holdout`; or no record is left.
        """
        if self._source.holdout:
            return self.holdout
        tally = Tally()
        return list(self._reported(self._usable(tally), tally))

    def train_split(self, in_order: InOrder = one_by_one) -> Iterator[sources.Record]:
        """One pass over the records to train on.

        Args:
          in_order: maps blocks of records to findings about them.

        Raises:
          InputError: see `sources.read`, `sources.choose_holdout`, `formats.plain_text`; or
            no record is left.
        """
        tally = Tally()
        records = self._without_holdout(tally)
        if filters.is_active(self._clean):
            records = self._cleaned(records, in_order, tally)
        yield from self._reported(records, tally)
        self.left_out = dict(tally.left_out)
        self.examples = {reason: tally.examples[reason] for reason in tally.left_out}

    def _reported(
        self, records: Iterator[sources.Record], tally: Tally
    ) -> Iterator[sources.Record]:
        """Yields the records; after the last one, reports what was left out."""
        is_empty = True
        for record in records:
            is_empty = False
            yield record
        left_out, bad = tally.left_out, tally.examples.get("bad_record")
        if bad:
            logging.warning(
                "%s: skipped %d bad records or ends of damaged files, such as %s",
                self._source.path,
                left_out["bad_record"],
                bad,
            )
        if is_empty and left_out:
            reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
            first = bad or next(
                (s for why, s in tally.examples.items() if why in readers.REASONS), ""
            )
            such = f", such as {first}" if first else ""
            if "held_out" in left_out:
                such += f"; {tally.examples['held_out']} measures the same texts"
            raise InputError(
                f"{self._source.path}: no record is left; left out are {reasons}{such}"
            )

    def _handler(self, leave_out: OnBad) -> OnBad:
        return readers.handler(self._source.on_bad_record, leave_out)

    def _read(self, on_bad: OnBad) -> Iterator[sources.Record]:
        source = self._source

        def advise(error: InputError) -> None:
            if source.on_bad_record != "skip" and not isinstance(error, DocumentError):
                error = InputError(
                    f"{error}; or leave out what cannot be read, "
                    "--config.sources.NAME.on_bad_record=skip"
                )
            on_bad(error)

        records = sources.read(
            source.path, source.reader, source.split, advise, source.max_expansion
        )
        return itertools.islice(records, source.max_records or None)

    def _usable(self, tally: Tally) -> Iterator[sources.Record]:
        on_bad = self._handler(tally.skip)
        policy = self._source.on_bad_record
        for record in self._read(on_bad):
            # Where an error ends the run anyway, encoding the record will find it.
            is_checked = policy == "skip" or (
                policy == "by_kind" and record.kind in readers.DOCUMENTS
            )
            if not is_checked or self._is_usable(record, on_bad):
                yield record

    def _without_holdout(self, tally: Tally) -> Iterator[sources.Record]:
        holdout = self._phase_holdout
        for record in self._usable(tally):
            if holdout and (holder := holdout.holder(self.passages(record))):
                tally.leave_out("held_out", holder)
            else:
                yield record

    def _is_usable(self, record: sources.Record, on_bad: OnBad) -> bool:
        complaint = self._complaint(record)
        if complaint is not None:
            on_bad(complaint)
        return complaint is None

    def _complaint(self, record: sources.Record) -> InputError | None:
        try:
            formats.plain_text(record, *self._settings)
        except InputError as error:
            return readers.of_record(error, record)
        return None

    def _cleaned(self, records, in_order, tally: Tally) -> Iterator[sources.Record]:
        seen = filters.Seen(self._clean.near_duplicates)
        inspect = functools.partial(_inspect, self._settings, self._clean, self._exams)
        for block, findings in in_order(inspect, _blocks(records)):
            for record, found in zip(block, findings, strict=True):
                reason = found.reason or seen.reason(found)
                if reason:
                    tally.leave_out(reason, record.place)
                else:
                    yield record


def identity(
    config: ml_collections.ConfigDict,
    source: ml_collections.ConfigDict,
    tokenizer: Any,
    files: dict[str, str],
    holdout: Holdout,
) -> dict[str, Any]:
    """Everything that determines the tokens of a source, ready for JSON.

    Args:
      config, source: as for `Corpus`.
      tokenizer: has a `fingerprint`.
      files: `sources.hashes` of the source. Their names do not count.
      holdout: the texts that the phase measures.
    """
    settings = config.clean.to_dict()
    exam_hashes = [
        digest
        for path in _exam_files(config)
        for digest in sources.hashes(path, exams.reader(path)).values()
    ]
    return {
        "version": _VERSION,
        "tokenizer": tokenizer.fingerprint,
        "files": list(files.values()),
        "reader": source.reader,
        "split": source.split,
        "format": source.format,
        "fields": source.fields.to_dict(),
        "preference_side": source.preference_side,
        "max_records": source.max_records,
        "on_bad_record": source.on_bad_record,
        "holdout": holdout.fingerprint or 0,
        "clean": settings if filters.is_active(config.clean) else {},
        "exams": exam_hashes if settings["decontaminate"] else [],
    }


def _blocks(records: Iterator[sources.Record]) -> Iterator[list[sources.Record]]:
    while block := list(itertools.islice(records, _RECORDS_PER_BLOCK)):
        yield block


def _exam_files(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    return tuple(exam.path for exam in config.eval.exams.values())


def _inspect(settings, rules, exam_files, records) -> list[filters.Findings]:
    # At module level, because worker processes unpickle it by name.
    ngrams = None
    if rules.decontaminate:
        ngrams = _exam_ngrams(exam_files, rules.decontaminate)
    is_document = settings[0] == "document"
    return [
        filters.inspect(
            formats.plain_text(record, *settings), rules, is_document, ngrams
        )
        for record in records
    ]


@functools.cache
def _exam_ngrams(files: tuple[str, ...], n: int) -> filters.Ngrams:
    """The n-grams of each question alone and of each question with each of its choices."""
    texts = []
    for path in files:
        for question in exams.read(path):
            text = question["question"].removeprefix("Question:")
            texts += [text, *(f"{text} {choice}" for choice in question["choices"])]
    return filters.ngrams_of(texts, n)
