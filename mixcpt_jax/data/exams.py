"""Multiple-choice exams, as packed rows whose choices are scored."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import hub, mixture, readers, sources
from mixcpt_jax.data.fields import check_text
from mixcpt_jax.data.formats import Examples, encode_continuations
from mixcpt_jax.data.sources import Record

_FIELDS = ("question", "choices", "answer")


@dataclasses.dataclass(frozen=True)
class Exam:
    r"""Questions with each of their choices written as text.

    Attributes:
      rows: one example per choice ("Question: ...\nAnswer: choice"), in the order of
        questions and their choices; the choice's tokens are the loss tokens.
      num_bytes: UTF-8 length of each choice without surrounding whitespace, int [choices].
      first_choice: where each question's choices start, int [questions + 1].
      answers: index of the right choice of each question, int [questions].
    """

    rows: mixture.PackedRows
    num_bytes: np.ndarray
    first_choice: np.ndarray
    answers: np.ndarray

    def grade(self, log_likelihoods: np.ndarray) -> np.ndarray:
        """Whether each question is answered correctly, bool [questions].

        The answer is the choice with the greatest log-likelihood per byte, so that long
        choices have no disadvantage; ties go to the first choice.

        Args:
          log_likelihoods: summed over each choice's tokens, nats, float [choices].
        """
        return self.choose(log_likelihoods / self.num_bytes) == self.answers

    def choose(self, scores: np.ndarray) -> np.ndarray:
        """The index of the choice with the greatest score, int [questions]."""
        return np.array([question.argmax() for question in self.split(scores)])

    def split(self, scores: np.ndarray) -> list[np.ndarray]:
        """Scores of choices, [choices], split by question."""
        return np.split(scores, self.first_choice[1:-1])


def read(path: str) -> list[dict[str, Any]]:
    """Reads an exam of `{question, choices, answer}`.

    Args:
      path: as for `sources.read`; a file with an unknown suffix is read as JSON lines.

    Raises:
      InputError: names the file and line of what is wrong.
    """
    records = list(sources.read(path, reader(path)))
    check_all(records, path)
    return [record.fields for record in records]


def check_all(records: Sequence[Record], path: str) -> None:
    """Checks each record, and logs the fields that are not read.

    Raises:
      InputError: see `check`.
    """
    unread = collections.Counter()
    for record in records:
        check(record.fields, record.place)
        unread.update(record.fields.keys() - {"id", *_FIELDS})
    if unread:
        counts = ", ".join(f"{k!a} ({n})" for k, n in sorted(unread.items()))
        logging.warning("%s: fields that are not read: %s", path, counts)


def reader(path: str) -> str:
    """The reader of a measured file: JSON lines unless its suffix names another."""
    is_known = readers.suffix(path) in readers.READER_OF_SUFFIX
    return "jsonl" if not is_known and hub.resolve(path).is_file() else ""


def check(question: dict[str, Any], place: str) -> None:
    """Checks that a record is a question with choices and an answer.

    Raises:
      InputError: it is not; names the place.
    """
    wanted = (
        "an exam line is a JSON object with question (text), "
        "choices (list of texts) and answer (index of the right one)"
    )
    for name in _FIELDS:
        if name not in question:
            raise InputError(f"{place}: no field {name!r}; {wanted}")
    check_text(question["question"], "question", place)
    choices, answer = question["choices"], question["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(f"{place}: choices is not a list of two or more; {wanted}")
    for number, choice in enumerate(choices):
        check_text(choice, f"choices[{number}]", place)
    # In Python, True is an int; and a table may have turned integers into floats such as
    # 1.0 because of a missing value.
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"{place}: answer is {answer!a:.40}, must be the index of the right choice, a "
            f"whole number from 0 to {len(choices) - 1}"
        )
    # Two identical wrong choices, which occur in ARC, do not affect the grade.
    if sum(choice.strip() == choices[answer].strip() for choice in choices) > 1:
        raise InputError(
            f"{place}: another choice is the same as the right one; drop the question"
        )


def encode(
    questions: list[dict[str, Any]],
    tokenizer: Any,
    row_length: int,
    max_positions: int | None = None,
    name: str = "exam",
    places: Sequence[str] = (),
) -> Exam:
    """Encodes questions in the usual form of benchmarks.

    Args:
      questions: at least one.
      tokenizer: see `formats.encode_continuations`.
      row_length, max_positions, name: see `mixture.pack_text`.
      places: where each question is from; if empty, errors give its number.

    Raises:
      InputError: there are no questions, a question does not fit the context, or a choice
        has no token of its own.
    """
    if not questions:
        raise InputError(f"{name}: has no questions; name another file")
    places = places or [f"{name}: question {i + 1}" for i in range(len(questions))]
    counts = [len(question["choices"]) for question in questions]
    choice_places = np.repeat(places, counts).tolist()
    examples = spell_out(questions, tokenizer, choice_places)
    choices = [choice for question in questions for choice in question["choices"]]
    return Exam(
        mixture.pack_text(name, examples, row_length, max_positions, choice_places),
        np.array([len(choice.strip().encode()) for choice in choices]),
        np.concatenate([[0], np.cumsum(counts)]),
        np.array([question["answer"] for question in questions]),
    )


def within(
    questions: list[dict[str, Any]], tokenizer: Any, max_tokens: int
) -> list[int]:
    """Indices of the questions to ask, so that they and their choices stay within a limit.

    Args:
      questions: see `check`.
      tokenizer: has `encode_batch`.
      max_tokens: of all questions and choices; 0: no limit; see `mixture.spread`.
    """
    if not questions:
        return []
    asked = [
        f"{question['question']} {choice}"
        for question in questions
        for choice in question["choices"]
    ]
    lengths = [len(ids) for ids in tokenizer.encode_batch(asked)]
    first_choice = np.cumsum([0, *(len(q["choices"]) for q in questions)])[:-1]
    return mixture.spread(np.add.reduceat(lengths, first_choice), max_tokens).tolist()


def spell_out(
    questions: list[dict[str, Any]], tokenizer: Any, places: Sequence[str] = ()
) -> Examples:
    """One example per choice: the question, and the choice, which has the loss.

    Exactly one space precedes a choice, whatever whitespace surrounds it in the file.

    Args:
      questions: the questions.
      tokenizer: see `formats.encode_continuations`.
      places: where each choice is from, for errors.
    """
    continuations = []
    for number, question in enumerate(questions, 1):
        text = question["question"].removeprefix("Question:").strip()
        for choice in question["choices"]:
            place = places[len(continuations)] if places else f"question {number}"
            prompt = f"Question: {text}\nAnswer:"
            continuations.append((prompt, f" {choice.strip()}", place))
    return Examples.collect(encode_continuations(continuations, tokenizer))
