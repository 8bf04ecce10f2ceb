import json
import math
import os
import pathlib
import pickle
import subprocess
import sys
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import corpus, exams, filters

SHARED = pathlib.Path(__file__).parents[1] / "../shared/data"


def _settings(**changes):
    settings = config_lib.default().clean
    settings.update(changes)
    return settings


def _reason(text, exam_ngrams=None, is_document=True, **changes):
    return filters.inspect(text, _settings(**changes), is_document, exam_ngrams).reason


EVERYTHING = {
    "exact_duplicates": True,
    "near_duplicates": 0.8,
    "min_characters": 1,
    "max_characters": 10_000,
    "min_letters": 0.1,
    "max_repetition": 0.9,
    "decontaminate": 13,
}


def test_nothing_is_asked_for_by_default():
    assert not filters.is_active(_settings())
    for text in ("", "a", "1 " * 1000):
        assert filters.inspect(text, _settings(), True) == filters.Findings("")
    assert set(EVERYTHING) == set(_settings())
    for name, value in EVERYTHING.items():
        assert filters.is_active(_settings(**{name: value})), name


@pytest.mark.parametrize(
    ("text", "settings", "reason"),
    [
        ("four", {"min_characters": 4}, ""),
        ("four", {"min_characters": 5}, "too_short"),
        ("four", {"max_characters": 4}, ""),
        ("four", {"max_characters": 3}, "too_long"),
        ("", {"min_characters": 1}, "too_short"),
        ("", {"max_characters": 1, "max_repetition": 0.0}, ""),
        ("", {"min_letters": 0.1}, "few_letters"),
        ("ab 12", {"min_letters": 0.5}, ""),
        ("ab 123", {"min_letters": 0.5}, "few_letters"),
        ("骨是硬的", {"max_characters": 4, "min_letters": 1.0}, ""),
        ("1 a b c d e a b c d e", {"max_repetition": 5 / 11}, ""),
        ("1 a b c d e a b c d e", {"max_repetition": 0.45}, "repetitive"),
        # The first of several reasons is named.
        ("1 1 1 1 1 1", {"min_letters": 0.1, "max_repetition": 0.1}, "few_letters"),
        ("1 1 1 1 1 1", {"max_characters": 9, "min_letters": 0.1}, "too_long"),
    ],
)
def test_bounds_are_inclusive(text, settings, reason):
    assert _reason(text, **settings) == reason
    assert _reason(text, is_document=False, **settings) == ""


CODE = "def f(x):\n    return x[0] + 1  # ok\n"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        (" \n\t\u3000", 0),
        ("Straße", 1),
        ("骨骼系统。", 4 / 5),
        ("عِلْمُ التَّشْرِيح", 1),  # with its vowel marks
        ("हड्डी", 1),
        ("กระดูก", 1),
        ("😂😂 ok", 1 / 2),
        ("\ud800a", 1 / 2),
        ("e\u0301 é", 1),
        (CODE, 14 / 23),
    ],
)
def test_letters_of_any_script_count(text, share):
    assert filters.letter_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("a a a a a", 0),
        ("a a a a a a", 5 / 6),
        ("A b c d e, f.  a B\nc d e,", 5 / 11),
        ("one two three four five " * 10, 9 / 10),
        ("Home\nNews\n" * 100, 198 / 200),
        ("骨是硬的。" * 5, 4 / 5),
        (CODE, 0),
        ("".join(f"line {i} of a table\n" for i in range(50)), 0),
    ],
)
def test_what_was_said_before_is_repetition(text, share):
    assert filters.repetition(filters.words_of(text)) == pytest.approx(share)


@hypothesis.given(
    st.text(max_size=60),
    st.sampled_from(["\n", "  ", "\u3000\t", "\r\n", "\xa0"]),
    st.sampled_from(["\ufeff", "\u200b", "\xad", "\0", "\u200e"]),
)
@hypothesis.example("é ﬁne ΐ Straße ｗｉｄｅ ㎏", "\n", "\ufeff")
def test_case_blanks_and_unicode_forms_do_not_matter(text, blank, unseen):
    # Upper case has no way back to some letters, as dotless i.
    upper = text.upper() if text.upper().casefold() == text.casefold() else text
    for same in (
        upper,
        *(unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")),
        "".join(f"{character}{unseen}" for character in text),
        f"{blank}{blank.join(text.split())}\n",
    ):
        assert filters.digest(same) == filters.digest(text)
        assert filters.words_of(same) == filters.words_of(text)


@hypothesis.given(st.text(st.characters(), max_size=200))
@hypothesis.example("\ud800")
def test_any_text_can_be_inspected(text):
    ngrams = filters.ngrams_of([text, "a b c d e f g h"], 13)
    settings = _settings(**EVERYTHING | {"min_characters": 0})
    seen = filters.Seen(settings.near_duplicates)
    for is_document in (True, False):
        found = filters.inspect(text, settings, is_document, ngrams)
        copy = pickle.loads(pickle.dumps(found))
        assert copy[:2] == found[:2]
        assert seen.reason(copy) in ("", *filters.REASONS)


QUESTION = (
    "Which of the following bones is found in the axial skeleton, and protects the "
    "spinal cord?"
)
WORDS = QUESTION.replace(",", "").removesuffix("?").split()
SHORT = "The smallest independently functioning unit of an organism is"


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        (QUESTION, True),
        (f"Chapter 7.{QUESTION}Answer: the vertebra", True),
        (f"Exercises\n\n3) “{QUESTION.upper()}” — a) Femur", True),
        (" -\n".join(WORDS), True),
        (QUESTION.replace("skeleton", "skel\u00adeton"), True),
        (f"... {' '.join(WORDS[2:15])} ...", True),
        (f"... {' '.join(WORDS[2:14])} ...", False),
        (f"{' '.join(WORDS[:12])} not {' '.join(WORDS[13:])}", False),
        (" ".join(reversed(WORDS)), False),
        ("s".join(WORDS), False),
        (f"It says that {SHORT.lower()}, as we know, a cell.", True),
        (SHORT.removesuffix(" is"), False),
        ("", False),
        ("Bones", False),
    ],
)
def test_an_exam_is_found_in_a_text(text, is_found):
    ngrams = filters.ngrams_of(
        [QUESTION, SHORT, "Why do bones heal after they break?"], 13
    )
    assert ngrams.sizes == (9, 13)
    for is_document in (True, False):
        reason = _reason(text, ngrams, is_document)
        assert reason == ("contaminated" if is_found else "")


def test_short_exam_texts_are_looked_for_as_a_whole():
    eight, seven = "a b c d e f g h", "t u v w x y z"
    ngrams = filters.ngrams_of([eight, seven, ""], 13)
    assert filters.shares(f"0 {eight} 1".split(), ngrams)
    assert not filters.shares(eight.removesuffix(" h").split(), ngrams)
    assert not filters.shares(seven.split(), ngrams)
    assert filters.shares(seven.split(), filters.ngrams_of([seven], 7))
    nothing = filters.ngrams_of([], 13)
    assert nothing.sizes == ()
    assert not filters.shares(eight.split(), nothing)


def test_an_exam_without_blanks_is_found():
    ngrams = filters.ngrams_of(["下列哪一块骨头属于中轴骨骼并保护脊髓？"], 13)
    found = filters.words_of("练习：「下列 哪一块骨头属于中轴\n骨骼」")
    assert filters.shares(found, ngrams)
    other = filters.words_of("下列哪一块骨头属于中轴的骨骼并保护脊髓")
    assert not filters.shares(other, ngrams)


def test_a_corpus_without_its_exam(tmp_path):
    exam = {"question": f"Question: {SHORT}", "choices": ["a cell", "x"], "answer": 0}
    (tmp_path / "exam.jsonl").write_text(json.dumps(exam) + "\n")
    texts = ["Some bones.", f"We ask: {SHORT.upper()}?", "Some\nbones.", "bones " * 30]
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts.jsonl").write_text("".join(lines))
    config = config_lib.default()
    config.eval.exams.one = config_lib.exam(path=str(tmp_path / "exam.jsonl"))
    config.clean.update(decontaminate=13, exact_duplicates=True, max_repetition=0.5)
    source = config_lib.source(path=str(tmp_path / "texts.jsonl"))
    found = corpus.Corpus(config, source)
    assert [record.fields["text"] for record in found.train_split()] == texts[:1]
    assert found.left_out == {"contaminated": 1, "duplicate": 1, "repetitive": 1}
    # What is measured is not cleaned.
    assert len(corpus.Corpus(config, source).measured()) == 4


def _verdicts(texts, **changes):
    settings = _settings(**changes)
    seen = filters.Seen(settings.near_duplicates)
    return [seen.reason(filters.inspect(text, settings, False)) for text in texts]


def test_of_equal_texts_the_first_stays():
    texts = ["Ein Fuß", "EIN  FUSS\n", "Ein Fuß.", "", " ", "é", "e\u0301", "😂", "😀"]
    wanted = ["", "duplicate", "", "", "duplicate", "", "duplicate", "", ""]
    assert _verdicts(texts, exact_duplicates=True) == wanted
    assert _verdicts(texts) == [""] * len(texts)


def test_what_is_left_out_for_itself_is_not_remembered():
    seen = filters.Seen(0.8)
    found = filters.Findings("", filters.digest("a b"), filters.min_hash(["a", "b"]))
    assert seen.reason(found._replace(reason="too_short")) == "too_short"
    assert seen.reason(found) == ""
    assert seen.reason(found) == "duplicate"
    assert seen.reason(found._replace(digest=b"")) == "near_duplicate"


def _similar_pair(number, num_changed, num_words=104):
    """Two texts, and the Jaccard similarity of their sets of 100 or so 5-grams."""
    words = [f"{number}w{i}" for i in range(num_words)]
    other = [*words[:-num_changed], *(f"{number}x{i}" for i in range(num_changed))]
    first, second = (
        {tuple(text[i : i + 5]) for i in range(len(text) - 4)}
        for text in (words, other)
    )
    return " ".join(words), " ".join(other), len(first & second) / len(first | second)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_found_and_others_are_not(threshold):
    found = {}
    for num_changed in range(1, 70):
        first, other, similarity = _similar_pair(num_changed, num_changed)
        reasons = _verdicts([first, other], near_duplicates=threshold)
        assert reasons[0] == ""
        found[similarity] = reasons[1] == "near_duplicate"
    # Four standard errors of an estimate from 256 hashes.
    margin = 4 * math.sqrt(threshold * (1 - threshold) / 256)
    above = [hit for s, hit in found.items() if s > threshold + margin]
    below = [hit for s, hit in found.items() if s < threshold - margin]
    assert len(above) > 3
    assert all(above)
    assert len(below) > 20
    assert not any(below)


def test_short_texts_are_not_taken_for_others():
    texts = [f"Heading {number}" for number in range(500)]
    assert _verdicts(texts, near_duplicates=0.8) == [""] * 500


def test_every_process_finds_the_same():
    texts = [QUESTION, SHORT, "骨骼系统。", CODE, "a b c d e " * 9]
    program = (
        "import json, sys\n"
        "from mixcpt_jax.data import filters\n"
        "texts = json.loads(sys.argv[1])\n"
        "print([[filters.digest(t)] + list(filters.min_hash(\n"
        "    filters.words_of(t)).hashvalues[:9]) for t in texts])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, json.dumps(texts)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1


@pytest.mark.skipif(not SHARED.exists(), reason="the book is not in ../shared/data")
def test_the_book_and_its_exams():
    lines = (SHARED / "anatomy/docs.jsonl").read_text().splitlines()
    documents = [filters.words_of(json.loads(line)["text"]) for line in lines]
    for name in ("anatomy/exam", "general_eval/arc_easy", "general_eval/piqa"):
        questions = exams.read(str(SHARED / f"{name}.jsonl"))
        texts = [question["question"] for question in questions]
        ngrams = filters.ngrams_of(texts, 13)
        shared = np.mean([filters.shares(document, ngrams) for document in documents])
        # The book's exercises are not among its documents.
        assert shared < 0.05
        for text in texts[:20]:
            words = filters.words_of(text)
            if len(words) >= filters.LEAST_WORDS:
                assert filters.shares(documents[0] + words, ngrams)
