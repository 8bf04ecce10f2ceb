"""Filters texts: quality, decontamination of exams, exact and near duplicates.

`inspect` judges one text by itself, in any process; `Seen` compares it with the texts
before it, in one process. A word is a run of letters and digits, case-insensitive; in
scripts that do not separate words by spaces, each letter is a word.
"""

import collections
import functools
import hashlib
import re
import typing
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

if typing.TYPE_CHECKING:  # imports SciPy; few runs need it
    import datasketch

REASONS = (
    "too_short",
    "too_long",
    "few_letters",
    "repetitive",
    "contaminated",
    "duplicate",
    "near_duplicate",
)

WORDS_PER_SHINGLE = 5
# An exam text shorter than an n-gram is matched as a whole if it has at least this many
# words.
LEAST_WORDS = 8

# The standard error of an estimated Jaccard similarity is 0.03 at most.
_NUM_HASHES = 256
_RECALL = 0.99
_ALONE = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u3040-\u30ff"  # kana
    "\u3400-\u9fff\U00020000-\U0003ffff"  # Han
)
# Combining marks, such as vowel signs of Indic scripts, always separate words here.
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
# Control characters except whitespace, soft hyphens, joiners, direction marks, the byte
# order mark, variation selectors.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069"
    "\ufe00-\ufe0f\ufeff]"
)


class Findings(NamedTuple):
    """The result of `inspect` for one text.

    Attributes:
      reason: one of `REASONS`, or empty.
      digest: of the text, 16 bytes; empty if the rule is off.
      min_hash: see `min_hash`; None if the rule is off.
    """

    reason: str
    digest: bytes = b""
    min_hash: "datasketch.LeanMinHash | None" = None


class Ngrams(NamedTuple):
    """Word n-grams to look for.

    Attributes:
      sizes: their lengths in words; n and some smaller ones, see `ngrams_of`.
      texts: the n-grams, words joined by single spaces.
    """

    sizes: tuple[int, ...]
    texts: frozenset[str]


def is_active(settings: Any) -> bool:
    """Whether any rule of the config's section `clean` is on."""
    return bool(
        settings.exact_duplicates
        or settings.near_duplicates
        or settings.decontaminate
        or settings.min_characters
        or settings.max_characters
        or settings.min_letters
        or settings.max_repetition < 1
    )


def inspect(
    text: str,
    settings: Any,
    is_document: bool,
    exam_ngrams: Ngrams | None = None,
) -> Findings:
    """Checks one text by itself.

    The reason is the first rule that the text breaks, in the order of `REASONS`.

    Args:
      text: any.
      settings: the config's section `clean`, or anything with the same attributes.
      is_document: whether the rules on length, letters and repetition apply.
      exam_ngrams: a text that contains one is contaminated; None: the rule is off.
    """
    if is_document:
        if len(text) < settings.min_characters:
            return Findings("too_short")
        if 0 < settings.max_characters < len(text):
            return Findings("too_long")
        if settings.min_letters and letter_share(text) < settings.min_letters:
            return Findings("few_letters")
    limit = settings.max_repetition if is_document else 1
    if limit >= 1 and exam_ngrams is None and not settings.near_duplicates:
        words = []  # not needed
    else:
        words = words_of(text)
    if limit < 1 and repetition(words) > limit:
        return Findings("repetitive")
    if exam_ngrams is not None and shares(words, exam_ngrams):
        return Findings("contaminated")
    return Findings(
        "",
        digest(text) if settings.exact_duplicates else b"",
        min_hash(words) if settings.near_duplicates else None,
    )


def words_of(text: str) -> list[str]:
    """The words of a text, case-folded."""
    return _WORD.findall(_fold(text))


def digest(text: str) -> bytes:
    """A hash of a text that ignores case, whitespace and character forms, 16 bytes."""
    content = " ".join(_fold(text).split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def letter_share(text: str) -> float:
    """Share of letters and marks, of any script, among the non-whitespace characters."""
    counts = collections.Counter()
    for character, count in collections.Counter(text).items():
        if not character.isspace():
            counts[unicodedata.category(character)[0] in "LM"] += count
    return counts[True] / max(counts.total(), 1)


def repetition(words: list[str]) -> float:
    """Share of the words' characters in 5-grams of words that occurred before.

    Each character counts once. This is the measure of Gopher's rule on duplicate 5-grams
    (Rae et al. 2021, table A1), which allows 0.15.
    """
    seen, covered = set(), set()
    for start, shingle in enumerate(_ngrams(words, WORDS_PER_SHINGLE)):
        if shingle in seen:
            covered.update(range(start, start + WORDS_PER_SHINGLE))
        seen.add(shingle)
    total = sum(map(len, words))
    return sum(len(words[number]) for number in covered) / max(total, 1)


def min_hash(words: list[str]) -> "datasketch.LeanMinHash":
    """256 MinHash values of the set of word 5-grams.

    A text of fewer than 5 words counts as a single 5-gram.
    """
    import datasketch

    hashes = _no_words().copy()
    shingles = set(_ngrams(words, WORDS_PER_SHINGLE)) or {" ".join(words)}
    hashes.update_batch([s.encode("utf-8", "surrogatepass") for s in shingles])
    return datasketch.LeanMinHash(hashes)


@functools.cache
def _no_words() -> "datasketch.MinHash":
    import datasketch

    return datasketch.MinHash(_NUM_HASHES, seed=1)


def ngrams_of(texts: Iterable[str], n: int) -> Ngrams:
    """The word n-grams of exams.

    A text of fewer than n words counts as a whole if it has 8 or more, otherwise not at
    all: such short texts match by chance.

    Args:
      texts: questions, and questions with an answer.
      n: usually 13 (GPT-3, Brown et al. 2020, appendix C).
    """
    by_size = collections.defaultdict(set)
    for text in texts:
        words = words_of(text)
        size = min(n, len(words))
        if size >= min(n, LEAST_WORDS):
            by_size[size].update(_ngrams(words, size))
    return Ngrams(tuple(sorted(by_size)), frozenset().union(*by_size.values()))


def shares(words: list[str], ngrams: Ngrams) -> bool:
    """Whether a text of these words contains one of the n-grams."""
    return any(
        not ngrams.texts.isdisjoint(_ngrams(words, size)) for size in ngrams.sizes
    )


class Seen:
    """The texts so far, to find duplicates of them.

    A text takes about 100 bytes for its digest and 12 kB for its MinHash.
    """

    def __init__(self, threshold: float = 0.0):
        """Near duplicates have at least this Jaccard similarity of their word 5-grams.

        MinHash estimates it, with a standard error of sqrt(J (1 - J) / 256) at a
        similarity J: 0.025 at 0.8. Two texts are compared if all values of some band agree,
        which holds for 99% of the pairs at the threshold.
        """
        self._threshold = threshold
        self._digests = set()
        self._min_hashes = []

    @functools.cached_property
    def _index(self) -> "datasketch.MinHashLSH":
        import datasketch

        # Use the longest bands that miss almost no pair at the threshold: they need the
        # fewest comparisons.
        sizes = range(1, _NUM_HASHES // 2 + 1)
        slips = [(1 - self._threshold**size) ** (_NUM_HASHES // size) for size in sizes]
        size = max(1, sum(slip <= 1 - _RECALL for slip in slips))
        return datasketch.MinHashLSH(
            num_perm=_NUM_HASHES, params=(_NUM_HASHES // size, size)
        )

    def reason(self, findings: Findings) -> str:
        """Why to leave out a text, or ''; remembers a text that stays.

        The reason is the findings' own, or else 'duplicate' or 'near_duplicate' of an
        earlier text.
        """
        if findings.reason:
            return findings.reason
        if findings.digest:
            if findings.digest in self._digests:
                return "duplicate"
            self._digests.add(findings.digest)
        mine = findings.min_hash
        if mine is not None:
            for other in self._index.query(mine):
                if mine.jaccard(self._min_hashes[other]) >= self._threshold:
                    return "near_duplicate"
            self._index.insert(len(self._min_hashes), mine)
            self._min_hashes.append(mine)
        return ""


def _fold(text: str) -> str:
    """Removes case, compatibility forms and invisible characters from a text.

    Texts that match by Unicode's compatibility caseless matching (D146) become the same.
    """
    text = _INVISIBLE.sub("", text)
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFD", text).casefold()
    folded = unicodedata.normalize("NFKD", folded).casefold()
    return unicodedata.normalize("NFKC", folded)


def _ngrams(words: list[str], size: int) -> Iterator[str]:
    """Runs of `size` words."""
    return (
        " ".join(words[start : start + size]) for start in range(len(words) - size + 1)
    )
