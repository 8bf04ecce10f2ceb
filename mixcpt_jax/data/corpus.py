"""Which records of a source are learnt: its limit, its holdout, damage and cleaning."""

import collections
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
from absl import logging

from mixcpt_jax.data import clean, exams, format, readers, sources
from mixcpt_jax.errors import InputError

# `(function, items) -> (item, function(item))` in order.
InOrder = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]

_RECORDS_PER_BLOCK = 256
# Raised whenever the same records and settings make other tokens than before.
_VERSION = 2


def one_by_one(function, items):
    """The `InOrder` of one process."""
    return ((item, function(item)) for item in items)


class Corpus:
    """The records of a source; each pass reads its files anew and keeps none of them.

    The holdout is chosen among all records, so it is the same whatever the format; then
    those that the format cannot use are left out, where the source says so, as are those
    that cannot be read; then those that `config.clean` is against.

    Attributes:
      left_out: why -> how many records, of the last pass of `held_in` that came to its
        end; "bad_record" or one of `clean.REASONS`.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        source: ml_collections.ConfigDict,
        is_cleaned: bool = True,
    ):
        """Reads nothing.

        Args:
          config: a validated config.
          source: one of its sources or measured texts.
          is_cleaned: by the rules of `config.clean`.
        """
        self._source = source
        self._seed = config.seed
        self._clean = types.SimpleNamespace(**config.clean.to_dict())
        self._is_cleaned = is_cleaned and clean.is_active(self._clean)
        self._exams = _exam_files(config)
        self._settings = (
            source.format,
            source.fields.to_dict(),
            source.preference_side,
        )
        self.left_out: dict[str, int] = {}

    @functools.cached_property
    def _held_out(self) -> dict[bytes, sources.Record]:
        return sources.held_out(
            self._to_choose_from(), self._source.holdout, self._seed, self._source.path
        )

    def _to_choose_from(self) -> Iterator[sources.Record]:
        # Whatever is wrong with the first, such as a field's name, is told before what
        # all together are too few for.
        is_first = self._refuses
        for record in self._read(None if self._refuses else lambda error: None):
            if is_first:
                format.plain_text(record, *self._settings)
                is_first = False
            yield record

    @property
    def held_out(self) -> list[sources.Record]:
        """Those that are measured instead.

        Raises:
          InputError: see `sources.read` and `sources.held_out`.
        """
        records = self._held_out.values()
        return [r for r in records if self._refuses or self._complaint(r) is None]

    def held_in(self, in_order: InOrder = one_by_one) -> Iterator[sources.Record]:
        """One pass over those that are learnt.

        Args:
          in_order: what maps blocks of records to findings about them.

        Raises:
          InputError: see `sources.read`, `sources.held_out` and `format.plain_text`; or
            no record is left.
        """
        left_out = collections.Counter()
        examples: list[InputError] = []

        def note(error: InputError) -> None:
            left_out["bad_record"] += 1
            if not examples:
                examples.append(error)

        records = self._usable(note)
        is_empty = True
        if self._is_cleaned:
            records = self._cleaned(records, in_order, left_out)
        for record in records:
            is_empty = False
            yield record
        if examples:
            logging.warning(
                "%s: skipped %d bad records or ends of damaged files, such as %s",
                self._source.path,
                left_out["bad_record"],
                examples[0],
            )
        self.left_out = dict(left_out)
        if is_empty and left_out:
            reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
            such = f", such as {examples[0]}" if examples else ""
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

    def _usable(self, note: readers.OnBad) -> Iterator[sources.Record]:
        held_out = self._held_out
        for record in self._read(None if self._refuses else note):
            if held_out and sources.content_key(record, self._seed) in held_out:
                continue
            complaint = None if self._refuses else self._complaint(record)
            if complaint is None:
                yield record
            else:
                note(complaint)

    def _complaint(self, record: sources.Record) -> InputError | None:
        try:
            format.plain_text(record, *self._settings)
        except InputError as error:
            return error
        return None

    def _cleaned(self, records, in_order, left_out) -> Iterator[sources.Record]:
        seen = clean.Seen(self._clean.near_duplicates)
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
) -> dict[str, Any]:
    """All that the tokens of a source come from, plain enough for JSON.

    Args:
      config, source: as for `Corpus`.
      tokenizer: has a `fingerprint`.
      files: `sources.hashes` of the source. Their names do not count.
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
        "holdout": [source.holdout, config.seed] if source.holdout else 0,
        "clean": settings if clean.is_active(config.clean) else {},
        "exams": exam_hashes if settings["decontaminate"] else [],
    }


def _blocks(records: Iterator[sources.Record]) -> Iterator[list[sources.Record]]:
    while block := list(itertools.islice(records, _RECORDS_PER_BLOCK)):
        yield block


def _exam_files(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    return tuple(exam.path for exam in config.eval.exams.values() if exam.path)


def _inspect(settings, rules, exam_files, records) -> list[clean.Findings]:
    # A function of the module, so that worker processes can be told of it.
    ngrams = None
    if rules.decontaminate:
        ngrams = _exam_ngrams(exam_files, rules.decontaminate)
    is_document = settings[0] == "document"
    return [
        clean.inspect(format.plain_text(record, *settings), rules, is_document, ngrams)
        for record in records
    ]


@functools.cache
def _exam_ngrams(files: tuple[str, ...], n: int) -> clean.Ngrams:
    """Of questions alone, and of each with each of its choices."""
    texts = []
    for path in files:
        for question in exams.read(path):
            text = question["question"].removeprefix("Question:")
            texts += [text, *(f"{text} {choice}" for choice in question["choices"])]
    return clean.ngrams_of(texts, n)
