"""Which records of a source are learnt: its limit, its holdout, damage and cleaning."""

import collections
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
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import exams, filters, formats, sources

# `(function, items) -> (item, function(item))` in order.
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]

_RECORDS_PER_BLOCK = 256
# Raised whenever the same records and settings make other tokens than before.
_VERSION = 3
# Raised whenever other records of the same source are held out than before.
SPLIT_VERSION = 3


def one_by_one(function, items):
    """The `InOrder` of one process."""
    return ((item, function(item)) for item in items)


class Holdout:
    """The texts that a phase measures, by their hashes, and what measures them.

    Texts are the same that differ in case, blanks and forms of characters alone, see
    `filters.digest`. A record is held out if one
    of its whole texts is held out, whole or as a part of what is, or if one of its parts
    is a whole text that is. That two records have a part in common, as an answer to
    different questions, is no reason. See `formats.passages`.
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
          holder: which setting measures it, such as "eval.texts.NAME".
        """
        for keys, texts in zip((self._wholes, self._parts), passages, strict=True):
            for text in texts:
                keys.setdefault(filters.digest(text), holder)

    def holder(self, passages: formats.Passages) -> str:
        """Which setting measures a record of these passages, or ''."""
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
        """16 hex digits: a hash of the texts; '' if there are none."""
        if not self:
            return ""
        digest = hashlib.blake2b(digest_size=8)
        for keys in (self._wholes, self._parts):
            digest.update(b"".join(sorted(keys)) + b" ")
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a phase measures of its sources and of its `eval` entries.

    Attributes:
      records: place in the config, such as "sources.NAME" -> what is measured of it.
      holdout: their texts, which no source trains on.
    """

    records: dict[str, list[sources.Record]]
    holdout: Holdout


def measure(config: ml_collections.ConfigDict) -> Measured:
    """Reads what a phase measures.

    That is the `holdout` of each source, and of each of `eval.texts` and `eval.pairs` the
    same, or all of it if it has none.

    Raises:
      InputError: see `Corpus.measured`.
    """
    measured = Measured({}, Holdout())
    for place, entry in config_lib.all_sources(config):
        if place.startswith("eval.") or entry.holdout:
            corpus = Corpus(config, entry, measured)
            measured.records[place] = corpus.measured()
            for record in measured.records[place]:
                measured.holdout.add(corpus.passages(record), place)
    return measured


@dataclasses.dataclass
class _Pass:
    """What one pass over a source left out, and examples of it."""

    left_out: collections.Counter
    bad_record: InputError | None = None
    holder: str = ""

    def note(self, error: InputError) -> None:
        self.left_out["bad_record"] += 1
        self.bad_record = self.bad_record or error


class Corpus:
    """The records of a source; each pass reads its files anew and keeps none of them.

    The holdout is chosen among all records, so it is the same whatever the format; then
    those that the format cannot use are left out, where the source says so, as are those
    that cannot be read; then those whose text the phase measures, whichever source or
    `eval` entry holds it out; then those that `config.clean` is against.

    Attributes:
      left_out: why -> how many records, of the last pass of `train_split` that came to its
        end; "bad_record", "held_out" or one of `filters.REASONS`.
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
          measured: what the phase measures; None: what `measure` makes of the config,
            and the source's own holdout, are read when they are asked for.
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

    @functools.cached_property
    def _chosen(self) -> list[sources.Record]:
        source = self._source
        chosen = sources.choose_holdout(
            self._to_choose_from(),
            source.holdout,
            self._config.seed,
            source.path,
            lambda record: formats.said_in(record, *self._settings[:2]),
        )
        return list(chosen.values())

    def _to_choose_from(self) -> Iterator[sources.Record]:
        # Whatever is wrong with the first, such as a field's name, is told before what
        # all together are too few for.
        is_first = self._refuses
        for record in self._read(None if self._refuses else lambda error: None):
            if is_first:
                formats.plain_text(record, *self._settings)
                is_first = False
            yield record

    @functools.cached_property
    def _phase_holdout(self) -> Holdout:
        if self._measured is not None:
            return self._measured.holdout
        holdout = measure(self._config).holdout
        for record in self.holdout:
            holdout.add(self.passages(record), self._source.path)
        return holdout

    def passages(self, record: sources.Record) -> formats.Passages:
        """The texts of one of its records, see `formats.passages`."""
        return formats.passages(record, *self._settings)

    @property
    def holdout(self) -> list[sources.Record]:
        """Its holdout.

        Raises:
          InputError: see `sources.read` and `sources.choose_holdout`.
        """
        if self._refuses:
            return self._chosen
        return [r for r in self._chosen if self._complaint(r) is None]

    def measured(self) -> list[sources.Record]:
        """What is measured of it: its holdout, or all of it if it has none.

        Raises:
          InputError: see `holdout`; or no record is left.
        """
        if self._source.holdout:
            return self.holdout
        this_pass = _Pass(collections.Counter())
        return list(self._told(self._usable(this_pass), this_pass))

    def train_split(self, in_order: InOrder = one_by_one) -> Iterator[sources.Record]:
        """One pass over those that are learnt.

        Args:
          in_order: what maps blocks of records to findings about them.

        Raises:
          InputError: see `sources.read`, `sources.choose_holdout`, `formats.plain_text`; or
            no record is left.
        """
        this_pass = _Pass(collections.Counter())
        records = self._without_holdout(this_pass)
        if filters.is_active(self._clean):
            records = self._cleaned(records, in_order, this_pass.left_out)
        yield from self._told(records, this_pass)
        self.left_out = dict(this_pass.left_out)

    def _told(
        self, records: Iterator[sources.Record], this_pass: _Pass
    ) -> Iterator[sources.Record]:
        """The same, at whose end it is told what was left out."""
        is_empty = True
        for record in records:
            is_empty = False
            yield record
        left_out, bad = this_pass.left_out, this_pass.bad_record
        if bad:
            logging.warning(
                "%s: skipped %d bad records or ends of damaged files, such as %s",
                self._source.path,
                left_out["bad_record"],
                bad,
            )
        if is_empty and left_out:
            reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
            such = f", such as {bad}" if bad else ""
            if this_pass.holder:
                such += f"; {this_pass.holder} measures the same texts"
            raise InputError(
                f"{self._source.path}: no record is left; left out are {reasons}{such}"
            )

    @property
    def _refuses(self) -> bool:
        return self._source.on_bad_record == "refuse"

    def _read(self, on_bad) -> Iterator[sources.Record]:
        source = self._source
        records = sources.read(source.path, source.reader, source.split, on_bad)
        return itertools.islice(records, source.max_records or None)

    def _usable(self, this_pass: _Pass) -> Iterator[sources.Record]:
        if self._refuses:
            yield from self._read(None)
            return
        for record in self._read(this_pass.note):
            complaint = self._complaint(record)
            if complaint is None:
                yield record
            else:
                this_pass.note(complaint)

    def _without_holdout(self, this_pass: _Pass) -> Iterator[sources.Record]:
        holdout = self._phase_holdout
        for record in self._usable(this_pass):
            if holdout and (holder := holdout.holder(self.passages(record))):
                this_pass.left_out["held_out"] += 1
                this_pass.holder = holder
            else:
                yield record

    def _complaint(self, record: sources.Record) -> InputError | None:
        try:
            formats.plain_text(record, *self._settings)
        except InputError as error:
            return error
        return None

    def _cleaned(self, records, in_order, left_out) -> Iterator[sources.Record]:
        seen = filters.Seen(self._clean.near_duplicates)
        inspect = functools.partial(_inspect, self._settings, self._clean, self._exams)
        for block, findings in in_order(inspect, _blocks(records)):
            for record, found in zip(block, findings, strict=True):
                reason = found.reason or seen.reason(found)
                if reason:
                    left_out[reason] += 1
                else:
                    yield record


def identity(
    config: ml_collections.ConfigDict,
    source: ml_collections.ConfigDict,
    tokenizer: Any,
    files: dict[str, str],
    holdout: Holdout,
) -> dict[str, Any]:
    """All that the tokens of a source come from, plain enough for JSON.

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
    return tuple(exam.path for exam in config.eval.exams.values() if exam.path)


def _inspect(settings, rules, exam_files, records) -> list[filters.Findings]:
    # A function of the module, so that worker processes can be told of it.
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
    """Of questions alone, and of each with each of its choices."""
    texts = []
    for path in files:
        for question in exams.read(path):
            text = question["question"].removeprefix("Question:")
            texts += [text, *(f"{text} {choice}" for choice in question["choices"])]
    return filters.ngrams_of(texts, n)
