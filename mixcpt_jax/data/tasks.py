"""Tasks that `evaluate` measures: texts, multiple choice, cloze.

A task is a file of records of one kind. The fields determine the kind:

- "text" `{"text"}`: how well each document is predicted, its end included;
- "choice" `{"question", "choices", "answer"}`: see `exams`;
- "cloze" `{"context", "target"}`: whether the model continues the context with the target.
  With `continuation` instead of `target`, a space is inserted between them if there is
  none.

Results are columns with one number per item; a measure is a ratio of sums of columns.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import exams, formats, mixture, sources
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.data.sources import Record
from mixcpt_jax.data.tally import Tally

_NAMED = re.compile(r"([\w.-]+)(?::(\w+))?=(.+)")


class Measure(NamedTuple):
    """`of(sum of numerator / sum of denominator)`.

    Without a denominator, it is the mean over items: 1 if correct, 0 if not.
    """

    numerator: str
    denominator: str = ""
    of: Callable[[np.ndarray], np.ndarray] = lambda ratio: ratio

    @property
    def is_per_token(self) -> bool:
        """Whether models with different tokenizers cannot be compared by it."""
        return self.denominator == "tokens"


MEASURES = {
    "text": {
        "perplexity": Measure("nats", "tokens", np.exp),
        "bits_per_byte": Measure("nats", "bytes", lambda nats: nats / math.log(2)),
        "accuracy": Measure("correct", "tokens"),
    },
    "choice": {"acc_bytes": Measure("acc_bytes"), "acc": Measure("acc")},
    "cloze": {
        "exact": Measure("exact"),
        "perplexity": Measure("nats", "tokens", np.exp),
        "bits_per_byte": Measure("nats", "bytes", lambda nats: nats / math.log(2)),
    },
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Records of one kind.

    Attributes:
      name: of the task.
      path: as given.
      kind: a key of `MEASURES`.
      records: its items.
    """

    name: str
    path: str
    kind: str
    records: list[Record]

    @property
    def fingerprint(self) -> str:
        """A hash of the records, 16 hex digits."""
        fields = [record.fields for record in self.records]
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def encode(self, tokenizer: Any, row_length: int, max_positions: int) -> "Encoded":
        """Packs the task in rows, see `mixture.pack_text`.

        Args:
          tokenizer: the model's.
          row_length: targets in a row, at most the context's; items that must not be cut
            may need longer rows.
          max_positions: the model's context.

        Raises:
          InputError: an item does not fit the context or its kind.
        """
        row_length = min(row_length, max_positions)
        places, tally = [record.place for record in self.records], Tally()
        match self.kind:
            case "choice":
                questions = [record.fields for record in self.records]
                exam = exams.encode(
                    questions, tokenizer, row_length, max_positions, self.name, places
                )
                return Encoded(self, exam.rows, exam)
            case "text":
                examples = formats.encode(
                    self.records, "document", tokenizer, tally=tally
                )
            case "cloze":
                records = [_with_target(record) for record in self.records]
                examples = formats.encode(records, "cloze", tokenizer, tally=tally)
        tally.warn(self.path)
        rows = mixture.pack_text(self.name, examples, row_length, max_positions, places)
        return Encoded(self, rows)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A task in a model's tokens.

    Attributes:
      task: the task.
      rows: its examples.
      exam: of kind "choice".
    """

    task: Task
    rows: mixture.PackedRows
    exam: exams.Exam | None = None

    @property
    def examples(self) -> Examples:
        return self.rows.source.examples

    def columns(self, sums: np.ndarray) -> dict[str, list[Any]]:
        """The results per item.

        Args:
          sums: of nats, correct and count over each example's targets, [3, examples].

        Returns:
          Column -> one number per item; for "choice" also `log_likelihoods`, nats, one
          list per item.
        """
        nats, correct, count = sums
        if self.exam is not None:
            exam = self.exam
            acc = exam.choose(-nats) == exam.answers
            return {
                "acc_bytes": exam.grade(-nats).astype(int).tolist(),
                "acc": acc.astype(int).tolist(),
                "log_likelihoods": [scores.tolist() for scores in exam.split(-nats)],
            }
        columns = {"nats": nats.tolist(), "tokens": count.astype(int).tolist()}
        if self.task.kind == "cloze":
            targets = [_with_target(r).fields["target"] for r in self.task.records]
            return columns | {
                "exact": (correct == count).astype(int).tolist(),
                "bytes": [len(target.encode()) for target in targets],
            }
        texts = [record.fields["text"] for record in self.task.records]
        return columns | {
            "correct": correct.astype(int).tolist(),
            "bytes": [len(text.encode()) for text in texts],
        }


def read(setting: str, limit: int = 0) -> Task:
    """Reads a task.

    Args:
      setting: PATH, NAME=PATH or NAME:KIND=PATH, with PATH as for `sources.read`. A setting
        that exists as a file or folder is a path. The default name is the file's name; the
        default kind is that of the first record.
      limit: the number of records from the beginning; 0: all.

    Raises:
      InputError: the setting, the file or a record in it is wrong.
    """
    found = None if paths.exists(setting) else _NAMED.fullmatch(setting)
    name, kind, path = found.groups() if found else ("", "", setting)
    name = name or re.sub(r"\..*", "", path.rstrip("/").rpartition("/")[2])
    read = sources.read(path, exams.reader(path))
    records = list(itertools.islice(read, limit or None))
    kind = kind or _kind_of(records[0])
    if kind not in MEASURES:
        raise InputError(f"{setting}: kind {kind!r}: use one of {', '.join(MEASURES)}")
    if kind == "choice":
        exams.check_all(records, path)
    return Task(name, path, kind, records)


def _kind_of(record: Record) -> str:
    match record.fields:
        case {"choices": _}:
            return "choice"
        case {"context": _}:
            return "cloze"
        case {"text": _}:
            return "text"
    raise InputError(
        f"{record.place}: has the fields {', '.join(sorted(record.fields)) or 'none'}; a "
        "task has text, or question, choices and answer, or context and target"
    )


def _with_target(record: Record) -> Record:
    fields = record.fields
    context, continuation = fields.get("context"), fields.get("continuation")
    if "target" in fields or not isinstance(context, str) or not continuation:
        return record
    is_apart = context[-1:].isspace() or continuation[:1].isspace()
    target = continuation if is_apart else f" {continuation}"
    return Record({"context": context, "target": target}, record.place)
