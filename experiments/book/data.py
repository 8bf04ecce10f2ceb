"""Prepares the data of the study of a book."""

import json
import pathlib
import random

# Number of modules that no arm reads.
NUM_UNREAD = 20
# The measures use the first characters of each unread module and of WikiText, and the first
# passages of LAMBADA.
MODULE_CHARACTERS, WIKITEXT_CHARACTERS, LAMBADA_PASSAGES = 8_000, 120_000, 400


def write(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the data of the cells.

    Splits the modules of the book once, at random, into modules that arms read and modules
    that they do not. Questions of the book's exam go with the module that they test.

    Args:
      source: a folder with `anatomy/docs.jsonl` (`{id, title, text}`, a module of the book
        each) and `anatomy/exam.jsonl` (`{doc_id, question, choices, answer}`),
        `general/instructions.jsonl` and `preferences.jsonl`, and in `general_eval/`
        `arc_easy.jsonl`, `piqa.jsonl`, `openbook_qa.jsonl`, `lambada.jsonl`
        (`{context, continuation}`) and `wikitext2_valid.txt`; `anatomy/README.md` of the
        experiments has their origin.
      folder: for the files; `done` is written last.
    """
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    modules = _read(source / "anatomy/docs.jsonl")
    unread = {m["id"] for m in random.Random(0).sample(modules, NUM_UNREAD)}
    _write(folder / "book.jsonl", [m for m in modules if m["id"] not in unread])
    _write(
        folder / "unread_modules.jsonl",
        [
            module | {"text": module["text"][:MODULE_CHARACTERS]}
            for module in modules
            if module["id"] in unread
        ],
    )
    questions = _read(source / "anatomy/exam.jsonl")
    for name, is_unread in (("read_modules", False), ("unread_modules", True)):
        asked = [q for q in questions if (q["doc_id"] in unread) == is_unread]
        _write(folder / f"{name}_exam.jsonl", asked)
    for name in ("instructions", "preferences"):
        _write(folder / f"{name}.jsonl", _read(source / f"general/{name}.jsonl"))
    for name in ("arc_easy", "piqa", "openbook_qa"):
        exam = _read(source / f"general_eval/{name}.jsonl")
        random.Random(0).shuffle(exam)
        _write(folder / f"{name}_exam.jsonl", exam)
    passages = _read(source / "general_eval/lambada.jsonl")[:LAMBADA_PASSAGES]
    _write(
        folder / "lambada.jsonl",
        [
            {"context": p["context"], "target": f" {p['continuation']}"}
            for p in passages
        ],
    )
    text = (source / "general_eval/wikitext2_valid.txt").read_text()
    _write(folder / "wikitext.jsonl", [{"text": text[:WIKITEXT_CHARACTERS]}])
    (folder / "done").touch()


def _read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _write(file: pathlib.Path, records: list[dict]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
