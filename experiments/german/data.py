"""The data of the German study: a domain in a language that the model barely knows.

The domain is the German edition of *The Debian Administrator's Handbook*, from the Debian
package `debian-handbook` (GPL-2+ and CC BY-SA 3.0). The package holds 26 editions of one
source, so a German page has an English page of the same name and structure.

    apt-get download debian-handbook
    dpkg-deb -x debian-handbook_*.deb runs/german/handbook

Paragraphs that the translators left in English are dropped. Pages are split once, at
random, into pages that arms read and pages that no arm reads.
"""

import hashlib
import html.parser
import json
import pathlib
import random
import re

HANDBOOK = "usr/share/doc/debian-handbook/html"
# Number of pages that no arm reads, and of their measured characters.
NUM_UNREAD, PAGE_CHARACTERS = 24, 5_000
WIKITEXT_CHARACTERS = 100_000
NUM_CLOZES, NUM_TRANSLATIONS, NUM_LAMBADA = 400, 300, 800
# The fewest characters of a document.
SHORTEST_PAGE = 500
# Number of instructions whose answers are graded, and the most characters of a choice.
NUM_PROMPTS, LONGEST_CHOICE = 150, 40

_GERMAN = frozenset(
    re.findall(
        r"\w+",
        "der die das und ist nicht ein eine einen einem einer zu mit von den dem des für "
        "auf wird werden sich sie es im auch oder als kann bei aus wenn dass nach wie über",
    )
)
_ENGLISH = frozenset(
    re.findall(
        r"\w+",
        "the and is not a an to with of for on will be it in also or as can at from if "
        "that after how by this are which you your has have its when but",
    )
)
_SENTENCE_END = re.compile(r"(?<=[a-zäöüß)“\"]{2}[.!?])\s+(?=[A-ZÄÖÜ„])")


class _Page(html.parser.HTMLParser):
    """The title and the paragraphs of a page, without code, tables and indexes."""

    def __init__(self):
        super().__init__()
        self.title, self.paragraphs = "", []
        self._open: list[str] = []  # the role of each open <div> or <pre>
        self._text: list[str] | None = None

    def handle_starttag(self, tag, attributes):
        if tag == "title":
            self._text = []
        elif tag in ("div", "pre"):
            kind = dict(attributes).get("class") or tag
            # A paragraph that holds a block ends where the block begins.
            self._end_paragraph()
            self._open.append("para" if kind == "para" else "other")
            if kind == "para":
                self._text = []

    def handle_endtag(self, tag):
        if tag == "title" and self._text is not None:
            self.title, self._text = _squeeze(self._text), None
        elif tag in ("div", "pre") and self._open:
            self._end_paragraph()
            self._open.pop()

    def handle_data(self, data):
        if self._text is not None:
            self._text.append(data)

    def _end_paragraph(self):
        if self._text is not None and self._open and self._open[-1] == "para":
            self.paragraphs.append(_squeeze(self._text))
            self._text = None


def write(handbook: pathlib.Path, shared: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the data of the cells.

    Args:
      handbook: where the package `debian-handbook` was unpacked.
      shared: a folder with `general/instructions.jsonl`, `general/preferences.jsonl`,
        `anatomy/docs.jsonl`, and in `general_eval/` `arc_easy.jsonl`, `piqa.jsonl`,
        `openbook_qa.jsonl`, `lambada.jsonl` and `wikitext2_valid.txt`;
        `experiments/anatomy/README.md` has their origin.
      folder: for the files; `hashes.json` is written last.
    """
    if (folder / "hashes.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pages = _pages(handbook / HANDBOOK)
    unread = set(random.Random(0).sample(sorted(pages), NUM_UNREAD))
    files = {
        "handbook": [
            _document(n, *pages[n][:2]) for n in sorted(pages.keys() - unread)
        ],
        "unread_pages": [
            _document(n, *pages[n][:2], PAGE_CHARACTERS) for n in sorted(unread)
        ],
        "last_words": last_words([pages[n][1] for n in sorted(unread)]),
        "translation_exam": _translations([pages[n][2] for n in sorted(unread)]),
        "wikitext": [
            {
                "text": (shared / "general_eval/wikitext2_valid.txt").read_text()[
                    :WIKITEXT_CHARACTERS
                ]
            }
        ],
        "lambada": [
            {"context": p["context"], "target": f" {p['continuation']}"}
            for p in _read(shared / "general_eval/lambada.jsonl")[:NUM_LAMBADA]
        ],
        "instructions": _read(shared / "general/instructions.jsonl"),
        "preferences": _read(shared / "general/preferences.jsonl"),
        "prose": _read(shared / "anatomy/docs.jsonl"),
    }
    for name in ("arc_easy", "piqa", "openbook_qa"):
        exam = _read(shared / f"general_eval/{name}.jsonl")
        random.Random(0).shuffle(exam)
        files[f"{name}_exam"] = exam
    hashes = {}
    for name, records in files.items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(text)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")


def write_prompts(folder: pathlib.Path) -> None:
    """Writes `asked.jsonl`: instructions whose answers a program can check.

    Arms read all of the general instructions, so these are made of questions that none
    reads: the second half of ARC-easy, of which the exam asks the first questions.

    Args:
      folder: where `write` has written.
    """
    file = folder / "asked.jsonl"
    if file.exists():
        return
    questions = _read(folder / "arc_easy_exam.jsonl")
    questions = [
        question
        for question in questions[len(questions) // 2 :]
        if max(map(len, question["choices"])) <= LONGEST_CHOICE
    ]
    questions.sort(key=lambda q: hashlib.sha256(q["question"].encode()).digest())
    chosen = enumerate(questions[:NUM_PROMPTS])
    lines = (json.dumps(ask(*numbered), ensure_ascii=False) for numbered in chosen)
    file.write_text("".join(f"{line}\n" for line in lines))


def ask(number: int, question: dict) -> dict:
    """A question as an instruction: one of three forms of answer, by its number.

    Returns:
      The "prompt", the "choices" that have the form, and the place of the right one,
      "answer".
    """
    text = question["question"].removeprefix("Question: ").strip()
    choices, answer = question["choices"], question["answer"]
    rest, form = divmod(number, 3)
    if form == 0:
        task = "\n".join(
            ("Reply with one of these answers and with nothing else:", *choices)
        )
    elif form == 1:
        letters = "ABCDEFGH"[: len(choices)]
        listed = (f"{a}) {b}" for a, b in zip(letters, choices, strict=True))
        task = "\n".join(
            (*listed, "Reply with the letter of the answer and with nothing else.")
        )
        choices = list(letters)
    else:
        # Right in every second question.
        shown = choices[(answer + rest % 2) % len(choices)]
        task = (
            f"Is this the answer: {shown}\nReply with yes or no and with nothing else."
        )
        choices, answer = ["yes", "no"], rest % 2
    return {"prompt": f"{text}\n\n{task}", "choices": choices, "answer": answer}


def is_german(text: str) -> bool:
    """Whether more of the words are German function words than English ones."""
    words = re.findall(r"\w+", text.lower())
    return sum(w in _GERMAN for w in words) > sum(w in _ENGLISH for w in words)


def _pages(root: pathlib.Path) -> dict[str, tuple[str, list[str], list[tuple]]]:
    """Page name -> its title, German paragraphs, and (German, English) paragraph pairs."""
    pages, seen = {}, set()
    for file in sorted((root / "de-DE").glob("*.html")):
        german, english = (
            _parse(root / tongue / file.name) for tongue in ("de-DE", "en-US")
        )
        # Notices recur on many pages.
        paragraphs = [p for p in german.paragraphs if p not in seen and is_german(p)]
        seen.update(paragraphs)
        if sum(map(len, paragraphs)) < SHORTEST_PAGE:
            continue
        pairs = []
        if len(german.paragraphs) == len(english.paragraphs):
            pairs = [
                (de, en)
                for de, en in zip(german.paragraphs, english.paragraphs, strict=True)
                if is_german(de) and not is_german(en)
            ]
        title = re.sub(r"^(Kapitel |Anhang )?([\d.]+|[A-Z]\.)\s*", "", german.title)
        pages[file.stem] = title, paragraphs, pairs
    return pages


def _parse(file: pathlib.Path) -> _Page:
    page = _Page()
    if file.exists():
        page.feed(file.read_text())
    return page


def _document(
    name: str, title: str, paragraphs: list[str], limit: int | None = None
) -> dict[str, str]:
    text = "\n\n".join([title, *paragraphs])
    return {"id": name, "text": text[:limit]}


def last_words(pages: list[list[str]]) -> list[dict[str, str]]:
    """Passages and their last words, as in LAMBADA; one per paragraph.

    A passage is a paragraph up to the end of its last sentence that ends with a word of
    four letters or more, and has at least 120 characters.
    """
    clozes = []
    for paragraph in (p for page in pages for p in page):
        ends = [match.start() for match in _SENTENCE_END.finditer(paragraph)]
        for end in reversed([*ends, len(paragraph)]):
            match = re.search(r" (\w{4,})[.!?]$", paragraph[:end])
            if match and end >= 120:
                context = paragraph[: match.start()]
                clozes.append({"context": context, "target": f" {match[1]}"})
                break
    random.Random(0).shuffle(clozes)
    return clozes[:NUM_CLOZES]


def _translations(pages: list[list[tuple[str, str]]]) -> list[dict]:
    """Questions: which of four English sentences of a page translates a German one?"""
    questions, chance = [], random.Random(0)
    for pairs in pages:
        sentences = [
            (de, en)
            for de, en in (
                (_first_sentence(de), _first_sentence(en)) for de, en in pairs
            )
            if 30 <= len(en) <= 200 and 30 <= len(de) <= 250
        ]
        for german, english in sentences:
            others = sorted(
                {en for _, en in sentences} - {english},
                key=lambda en: abs(len(en) - len(english)),
            )[:3]
            if len(others) < 3:
                continue
            choices = [english, *others]
            chance.shuffle(choices)
            questions.append(
                {
                    "question": f"German: {german}\nEnglish:",
                    "choices": choices,
                    "answer": choices.index(english),
                }
            )
    chance.shuffle(questions)
    return questions[:NUM_TRANSLATIONS]


def _first_sentence(paragraph: str) -> str:
    return _SENTENCE_END.split(paragraph, maxsplit=1)[0]


def _squeeze(parts: list[str]) -> str:
    return " ".join("".join(parts).split())


def _read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
