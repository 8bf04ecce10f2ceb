"""Questions and answers made from a document by rules, without a model.

Training on a document followed by tasks about it teaches its facts and how to answer
questions about them, as in AdaptLLM (arXiv 2309.09530). The rules here are our own. They
ask for a definition, a missing word, the next sentence, and the title or, without one, a
summary, which is the first sentence. All answers are words of the document.
"""

import collections
import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'“„(]?\w)")
_MIN_WORDS, _MAX_WORDS = 6, 60
_DEFINITION = re.compile(
    r"(?P<article>An? |The )?(?P<term>\w[\w-]*(?: [\w-]+){0,3}?) "
    r"(?P<verb>is|are) (?:an? |the |one of )\w.*",
)
_NO_TERM = frozenset(
    {"it", "this", "that", "these", "those", "there", "here", "he", "she", "they"}
    | {"we", "you", "i", "what", "which", "who"}
)
_WORD = re.compile(r"(?<![\w-])[^\W\d_]{6,}(?![\w-])")


class Task(NamedTuple):
    """A question about a document, and its answer."""

    question: str
    answer: str


def tasks(text: str, title: str = "", seed: str = "", most: int = 6) -> list[Task]:
    """Tasks about a document, at most one per sentence.

    Args:
      text: the document.
      title: if not blank, a task asks for it.
      seed: determines which tasks are chosen.
      most: the maximum number of tasks.
    """
    sentences = _sentences(text)
    draw = random.Random(seed)
    kinds = [
        draw.sample(found := list(kind), len(found))
        for kind in (
            _definitions(sentences),
            _continuations(sentences),
            _gaps(sentences, draw),
        )
    ]
    # Take the kinds in turn, so that none crowds out the others.
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    chosen: dict[int, Task] = {}
    for place, task in filter(None, turns):
        if len(chosen) < most - 1:
            chosen.setdefault(place, task)
    return [*_summaries(sentences, title), *(chosen[place] for place in sorted(chosen))]


def write(text: str, asked: list[Task]) -> str:
    """Joins a document and the tasks about it into one text."""
    parts = [f"Question: {task.question}\nAnswer: {task.answer}" for task in asked]
    return "\n\n".join([text.strip(), *parts])


def _sentences(text: str) -> list[str]:
    """Sentences that are long enough to be asked about, each on one line."""
    parts = (part for line in text.split("\n") for part in _SENTENCE_END.split(line))
    parts = (" ".join(part.split()) for part in parts)
    return [
        part
        for part in parts
        if _MIN_WORDS <= len(part.split()) <= _MAX_WORDS and part[-1] in ".!?"
    ]


def _summaries(sentences: list[str], title: str) -> list[Task]:
    if title.strip():
        return [Task("What is the title of this text?", title.strip())]
    if len(sentences) >= 3:
        return [Task("What is this text about, in one sentence?", sentences[0])]
    return []


def _definitions(sentences: list[str]) -> Iterator[tuple[int, Task]]:
    for place, sentence in enumerate(sentences):
        found = _DEFINITION.fullmatch(sentence)
        if found and found["term"].split()[0].lower() not in _NO_TERM:
            article = (found["article"] or "").lower()
            question = f"What {found['verb']} {article}{found['term']}?"
            yield place, Task(question, sentence)


def _continuations(sentences: list[str]) -> Iterator[tuple[int, Task]]:
    for place, (sentence, following) in enumerate(itertools.pairwise(sentences)):
        question = f"Which sentence follows this one: “{sentence}”"
        yield place, Task(question, following)


def _gaps(sentences: list[str], draw: random.Random) -> Iterator[tuple[int, Task]]:
    """Sentences, each without its rarest word; words are counted over the document."""
    counts = collections.Counter(
        word.lower() for sentence in sentences for word in _WORD.findall(sentence)
    )
    for place, sentence in enumerate(sentences):
        # Skip the first word: its capital letter gives it away.
        words = [m for m in _WORD.finditer(sentence) if m.start() > 0]
        words = [m for m in words if sentence.count(m[0]) == 1]
        if not words:
            continue
        fewest = min(counts[m[0].lower()] for m in words)
        gap = draw.choice([m for m in words if counts[m[0].lower()] == fewest])
        holed = f"{sentence[: gap.start()]}____{sentence[gap.end() :]}"
        yield place, Task(f"Which word is missing: “{holed}”", gap[0])
