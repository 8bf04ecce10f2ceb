"""Counts what is left out, not read or lost while a source is encoded.

The table before the first step and the report show the counts of each source; prepared
sources keep them in their manifest.
"""

import collections
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from mixcpt_jax.core.errors import InputError

KINDS = (
    "layouts", "encodings", "files", "left_out", "unread", "lost", "spelt",
    "without_loss",
)  # fmt: skip
# Special tokens that texts often contain, even if the vocabulary lacks them: ends of
# documents in concatenated files, and tags of chats that were saved as text.
_USUAL = (
    "<|endoftext|>", "<|end_of_text|>", "<eos>", "<s>", "</s>", "<|im_start|>",
    "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
# The form of nearly all special tokens. One search for this form is faster than thousands
# of searches for single tokens.
_FORM = r"<[^<>\s]{1,64}>"
_BRACKETS = r"\[[^\[\]\s]{1,64}\]"
# The maximum number of names that are counted separately; data could have any number.
_MOST_NAMES = 100
_OTHERS = "others"
_MOST_SHOWN = 8


class Tally:
    """Counts of one source.

    Attributes:
      layouts: layout that was recognised, with its field map -> number of records.
      encodings: encoding other than UTF-8 -> number of records.
      files: reason -> number of files that are not read.
      left_out: reason -> number of records, or of documents.
      unread: field -> number of records that have it and whose text lacks its value.
      lost: character that the vocabulary drops -> number of occurrences.
      spelt: special token that occurs in texts, as plain text -> number of occurrences.
      without_loss: reason -> number of the assistant's turns that have no loss tokens
        although they should.
      places: where the record of each example is from, if `keeps_places`.
      examples: name of a finding -> place or error of the first one.
    """

    def __init__(self, keeps_places: bool = False):
        self.layouts: collections.Counter[str] = collections.Counter()
        self.encodings: collections.Counter[str] = collections.Counter()
        self.files: collections.Counter[str] = collections.Counter()
        self.left_out: collections.Counter[str] = collections.Counter()
        self.unread: collections.Counter[str] = collections.Counter()
        self.lost: collections.Counter[str] = collections.Counter()
        self.spelt: collections.Counter[str] = collections.Counter()
        self.without_loss: collections.Counter[str] = collections.Counter()
        self.places: list[str] = []
        self.examples: dict[str, str] = {}
        self._keeps_places = keeps_places
        self._seen: set[str] = set()
        self._lost: set[str] = set()

    def leave_out(self, why: str, example: str) -> None:
        """Counts a record that is left out; `example` is its place or error."""
        self.left_out[why] += 1
        self.examples.setdefault(why, example)

    def skip(self, error: InputError) -> None:
        """Counts a record or a document that cannot be used."""
        self.leave_out(getattr(error, "reason", "bad_record"), str(error))

    def keep(self, place: str, num_examples: int = 1) -> None:
        """Keeps the place of examples."""
        if self._keeps_places:
            self.places += [place] * num_examples

    def leave_unread(self, names: Iterable[str], place: str) -> None:
        """Counts a record with fields that are not read."""
        for name in names:
            self._count(self.unread, name, place)

    def read(self, layout: str, encoding: str, place: str) -> None:
        """Counts a record whose layout was recognised, or that was not in UTF-8.

        Args:
          layout: '' if none was recognised.
          encoding: of its file; '' if it does not matter.
          place: where it is from.
        """
        if layout:
            self._count(self.layouts, layout, place)
        if encoding and not encoding.startswith("utf-8"):
            self._count(self.encodings, encoding, place)

    def pass_over(self, files: Mapping[str, Sequence[str]]) -> None:
        """Counts files that are not read, given by reason."""
        for reason, names in files.items():
            self.files[reason] += len(names)
            self.examples.setdefault(reason, names[0])

    def leave_without_loss(self, number: int, place: str) -> None:
        """Counts turns that the chat template rewrites once other turns follow."""
        if number > 0:
            self._count(self.without_loss, "rewritten", place, number)

    def see(self, text: str, place: str, tokenizer: Any) -> None:
        """Counts characters that the vocabulary drops, and special tokens as plain text.

        Each distinct character is tested once.

        Args:
          text: as it will be encoded.
          place: where it is from.
          tokenizer: may have `loses` and `special_tokens`.
        """
        loses = getattr(tokenizer, "loses", None)
        characters = set(text)
        if loses is not None:
            self._lost |= set(filter(loses, characters - self._seen))
        self._seen |= characters
        for character in sorted(characters & self._lost):
            self._count(self.lost, character, place, text.count(character))
        special = getattr(tokenizer, "special_tokens", frozenset())
        for found in _spelling_of(special).findall(text):
            if found in special or found in _USUAL:
                self._count(self.spelt, found, place)

    def _count(self, counts, name: str, place: str, number: int = 1) -> None:
        if not name.isprintable() and counts is not self.lost:
            name = ascii(name)
        if name not in counts and len(counts) >= _MOST_NAMES:
            name = _OTHERS
        counts[name[:64]] += number
        self.examples.setdefault(name[:64], place)

    def add(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Adds the `counts` of another tally."""
        for kind, numbers in counts.items():
            getattr(self, kind).update(numbers)

    def counts(self) -> dict[str, dict[str, int]]:
        """The findings of each of `KINDS`."""
        return {kind: dict(getattr(self, kind)) for kind in KINDS}

    def lines(self, kinds: Sequence[str] = KINDS) -> list[str]:
        """One line per kind of finding; see the function `lines`."""
        return lines({kind: getattr(self, kind) for kind in kinds}, self.examples)

    def warn(self, where: str, kinds: Sequence[str] = KINDS) -> None:
        """Logs each line after `where`."""
        for line in self.lines(kinds):
            logging.warning("%s: %s", where, line)


@functools.lru_cache(maxsize=8)
def _spelling_of(special: frozenset[str]) -> re.Pattern:
    """Matches these tokens, and all text of the usual form of special tokens."""
    has_brackets = any(re.fullmatch(_BRACKETS, token) for token in special)
    forms = [_FORM] + [_BRACKETS] * has_brackets
    others = [t for t in special if t.strip() and not re.fullmatch("|".join(forms), t)]
    longest_first = sorted(others, key=lambda token: (-len(token), token))
    return re.compile("|".join([*map(re.escape, longest_first), *forms]))


def lines(
    counts: Mapping[str, Mapping[str, int]], examples: Mapping[str, str] | None = None
) -> list[str]:
    """Describes findings as lines of text.

    Args:
      counts: from `Tally.counts`, and `overlong`, see `mixture.fit`.
      examples: as `Tally.examples`.
    """

    def listed(kind: str, form: Callable[[str], str] = str) -> str:
        found = sorted(counts.get(kind, {}).items(), key=lambda item: -item[1])
        # Each reason has its own example; of other findings, the first.
        with_example = found if kind in ("left_out", "files") else found[:1]
        ends = {
            name: f", such as {example}"
            for name, _ in with_example
            if (example := (examples or {}).get(name))
        }
        are_several = len(ends) > 1
        shown = [
            f"{form(name)} ({number})" + ends.get(name, "") * are_several
            for name, number in found[:_MOST_SHOWN]
        ]
        if len(found) > _MOST_SHOWN:
            shown.append(f"and {len(found) - _MOST_SHOWN} more")
        if are_several:
            return "; ".join(shown)
        return ", ".join(shown) + "".join(ends.values())

    texts = {
        "layouts": "read as {}",
        "encodings": "decoded from {}",
        "files": "files that are not read: {}",
        "left_out": "left out: {}",
        "unread": "fields that are not read: {}",
        "lost": "characters that the vocabulary lacks and drops: {}",
        "spelt": "special tokens in texts, read as plain text: {}",
        "overlong": "samples longer than a row: {}",
        "without_loss": "turns without loss, because the chat template rewrites them once "
        "others follow: {}",
    }
    forms = {"lost": ascii}
    return [
        text.format(listed(kind, forms.get(kind, str)))
        for kind, text in texts.items()
        if counts.get(kind)
    ]
