"""What the sources of a config would read, without a model or a tokenizer."""

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator

import ml_collections

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError, in_place
from mixcpt_jax.data import documents, files, formats, readers, sources
from mixcpt_jax.data import tally as tally_lib
from mixcpt_jax.data.tally import Tally

# Of each reason.
_MOST_EXAMPLES = 5


@dataclasses.dataclass
class Inspection:
    """What was found of one source.

    Attributes:
      files: reader -> number of files or data sets.
      encodings: encoding -> number of records.
      num_records, num_characters: of what was read.
      first: the place and text of the first record.
      tally: layouts, and what is not read or left out.
      examples: reason for leaving out -> examples, each of another file.
      refused: errors of records that would end the run.
      missing: errors of libraries, without which a run reads nothing of the source.
      is_whole: whether all files were read.
    """

    files: dict[str, int]
    encodings: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    num_records: int = 0
    num_characters: int = 0
    first: tuple[str, str] = ("", "")
    tally: Tally = dataclasses.field(default_factory=Tally)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    refused: list[InputError] = dataclasses.field(default_factory=list)
    missing: list[InputError] = dataclasses.field(default_factory=list)
    is_whole: bool = True

    def lines(self) -> Iterator[str]:
        """One line per kind of finding."""
        yield f"files: {_counted(self.files)}"
        extent = "" if self.is_whole else " so far, there are more"
        yield (
            f"records: {self.num_records:,}, {self.num_characters:,} characters{extent}"
        )
        if self.encodings:
            yield f"encodings: {_counted(self.encodings)}"
        if self.num_records:
            place, text = self.first
            yield f'first: {place}: "{text_lib.value(text)}"'
        yield from self.tally.lines(["layouts", "unread"])
        for kind in ("files", "left_out"):
            for reason, number in self.tally.counts()[kind].items():
                first, *others = self.examples[reason]
                yield from tally_lib.lines({kind: {reason: number}}, {reason: first})
                yield from (f"  and {other}" for other in others)
        yield from (f"not read: {error}" for error in self.missing)
        if self.refused:
            first, *others = self.refused
            number = len(self.refused)
            yield f"refused, which ends a run: {number}, such as {first}"
            yield from (f"  and {other}" for other in others[: _MOST_EXAMPLES - 1])

    def leave_out(self, reason: str, example: str) -> None:
        """Keeps an example of a reason, unless it has enough or one of the same file."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < _MOST_EXAMPLES and _file(example) not in map(_file, kept):
            kept.append(example)


def inspect(config: ml_collections.ConfigDict, seconds: float) -> Iterator[str]:
    """Describes what a phase reads: each source, and each text and pairs it measures.

    Args:
      config: of the phase, with resolved paths; only its sources matter.
      seconds: how long each source is read at most.

    Yields:
      Lines of text.

    Raises:
      InputError: after the last line, if a run would refuse a source.
    """
    refused, can_skip = [], []
    for place, source in config_lib.all_sources(config):
        if not (source.weight or source.holdout):
            continue
        yield f"{place}: {source.path or 'no path is given'} as {source.format}"
        if not source.path:
            continue
        try:
            found = of_source(source, seconds)
            yield from (f"  {in_place(line, place)}" for line in found.lines())
            refused += [place] * bool(found.refused or found.missing)
            can_skip += [place] * bool(found.refused)
        except InputError as error:
            yield f"  refused: {in_place(str(error), place)}"
            refused.append(place)
    if refused:
        remedy = "correct it"
        if can_skip:
            remedy += (
                ", or leave out records that cannot be read, as in "
                f"--config.{can_skip[0]}.on_bad_record=skip"
            )
        raise InputError(
            f"{', '.join(refused)}: a run would end with what is refused or not read "
            f"above; {remedy}"
        )


def of_source(source: ml_collections.ConfigDict, seconds: float) -> Inspection:
    """Reads a source, or as much as `seconds` allow.

    Raises:
      InputError: nothing is found, or a setting of the source is wrong.
    """
    deadline = time.monotonic() + seconds
    settings = source.format, source.fields.to_dict(), source.preference_side
    formats.check_settings(*settings)
    found = files.find(source.path, source.reader, source.split)
    found.warn(source.path)
    missing = documents.missing_libraries(found.by_reader())
    seen = Inspection(found.by_reader(), missing=[*missing.values()])
    tally = seen.tally
    if not source.reader:
        not_read = found.not_read()
        tally.pass_over(not_read)
        for reason, names in not_read.items():
            for name in names:
                seen.leave_out(reason, name)

    def leave_out(error: InputError) -> None:
        tally.skip(error)
        seen.leave_out(getattr(error, "reason", "bad_record"), str(error))

    judge = readers.handler(source.on_bad_record, leave_out)

    def on_bad(error: InputError) -> None:
        try:
            judge(error)
        except InputError as refused:
            seen.refused.append(refused)

    parts = [part for part in found.parts if part.reader not in missing]
    records = sources.read_parts(parts, on_bad, source.max_expansion)
    with contextlib.closing(records):
        for record in records:
            try:
                said = formats.read(record, *settings)
            except InputError as error:
                on_bad(readers.of_record(error, record))
            else:
                tally.leave_unread(said.unread, record.place)
                tally.read(said.layout, "", record.place)
                text = formats.SEPARATOR.join(said.texts)
                if not seen.num_records:
                    seen.first = record.place, text
                seen.num_records += 1
                seen.num_characters += len(text)
                if record.encoding:
                    seen.encodings[record.encoding] += 1
            if seen.num_records == source.max_records != 0:
                break
            if time.monotonic() > deadline:
                seen.is_whole = False
                break
    return seen


def _file(example: str) -> str:
    """The file in an example, which begins with it: FILE, FILE:LINE or FILE: ROW."""
    return re.sub(r":\d+$", "", example.partition(": ")[0])


def _counted(counts: dict[str, int]) -> str:
    found = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} ({number})" for name, number in found)
