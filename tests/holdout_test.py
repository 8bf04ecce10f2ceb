"""What a phase measures, it does not train on: whatever the settings say it is in."""

import json
import os

import hypothesis
import pytest
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import corpus, formats, pipeline, sources, token_cache_writer

NUMBERS = range(12)
# The forms in which a question and its answer can lie in a file.
FORMS = {
    "document": lambda q, a: {"text": f"{q}\n\n{a}"},
    "instruction": lambda q, a: {"instruction": q, "output": a},
    "chat": lambda q, a: {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    },
    "preference": lambda q, a: {"prompt": q, "chosen": a, "rejected": "No idea."},
    "chat_preference": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "chosen": a,
        "rejected": "I will not say.",
    },
    "cloze": lambda q, a: {"context": f"{q}\n", "target": a},
}


def question(number):
    return f"What is thing {number}?"


def answer(number):
    return f"It is the {number * 7919}th of them all."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A file of each form, with every record twice: under two URLs, in two spellings."""
    root = tmp_path_factory.mktemp("forms")
    for name, form in FORMS.items():
        with (root / f"{name}.jsonl").open("w") as file:
            for number in NUMBERS:
                for url, change in (("a", str), ("b", str.upper)):
                    record = form(change(question(number)), change(answer(number)))
                    record |= {"url": url, "id": f"{number}{url}", "n": number}
                    file.write(json.dumps(record) + "\n")
    return root


ENTRIES = st.fixed_dictionaries(
    {
        "format": st.sampled_from(sorted(FORMS)),
        "holdout": st.integers(0, 8),
        "max_records": st.sampled_from([0, 0, 5, 18]),
        "spelling": st.sampled_from(["{}/{}", "{}/./{}", "{}/../{base}/{}"]),
        "on_bad_record": st.sampled_from(["refuse", "skip"]),
        "reader": st.sampled_from(["", "jsonl"]),
    }
)


def make_source(folder, entry, **settings):
    entry = dict(entry)
    spelling = entry.pop("spelling")
    file = f"{entry['format']}.jsonl"
    path = spelling.format(folder, file, base=folder.name)
    return config_lib.source(path=path, **entry, **settings)


def numbers_of(records):
    return {record.fields["n"] for record in records}


@hypothesis.given(
    trained=st.lists(ENTRIES, min_size=1, max_size=3),
    measured=st.lists(ENTRIES, max_size=2),
    exact_duplicates=st.booleans(),
    seed=st.integers(0, 3),
)
def test_trained_and_measured_texts_are_disjoint(
    folder, trained, measured, exact_duplicates, seed
):
    """Forms of one question and answer are one text, in any source, by any path."""
    config = config_lib.default()
    config.seed = seed
    config.clean.exact_duplicates = exact_duplicates
    for i, entry in enumerate(trained):
        config.sources[f"s{i}"] = make_source(folder, entry)
    for i, entry in enumerate(measured):
        section = "pairs" if entry["format"] == "chat_preference" else "texts"
        config.eval[section][f"e{i}"] = make_source(folder, entry)
    try:
        found = corpus.measure(config)
    except InputError as error:  # five records have three texts
        hypothesis.assume("cannot hold out" not in str(error))
        raise
    holdout = set().union(*map(numbers_of, found.records.values()))
    for place, entry in config_lib.all_sources(config):
        if entry.holdout:
            assert len(numbers_of(found.records[place])) == entry.holdout
    for entry in config.sources.values():
        source = corpus.Corpus(config, entry, found)
        total = entry.max_records or 2 * len(NUMBERS)
        there = {n // 2 for n in range(total)}
        if there <= holdout:
            with pytest.raises(InputError, match="left.* measures the same texts"):
                list(source.train_split())
            continue
        records = list(source.train_split())
        # No more than what is measured is left out.
        assert numbers_of(records) == there - holdout
        assert len(records) + sum(source.left_out.values()) == total
        # A corpus by itself finds what the config holds out.
        assert list(corpus.Corpus(config, entry).train_split()) == records


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_choice_knows_neither_order_nor_format_nor_other_fields(tmp_path, form):
    kin = {
        "instruction": "chat",
        "preference": "chat_preference",
    }
    records = [FORMS[form](question(n), answer(n)) for n in NUMBERS]
    chosen = set()
    for trial, changed in enumerate((records, records[::-1], records * 2)):
        file = tmp_path / f"{trial}.jsonl"
        lines = (json.dumps(r | {"url": f"{trial} {i}"}) for i, r in enumerate(changed))
        file.write_text("\n".join(lines))
        for name in {form, kin.get(form, form)}:
            source = config_lib.source(path=str(file), format=name, holdout=4)
            holdout = corpus.Corpus(config_lib.default(), source).holdout
            texts = [
                json.dumps({k: v for k, v in r.fields.items() if k != "url"})
                for r in holdout
            ]
            chosen.add(tuple(sorted(texts)))
    assert len(chosen) == 1
    assert len(chosen.pop()) == 4


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


@pytest.mark.parametrize(
    ("measured", "trained", "is_held_out"),
    [
        # The answer alone is a document.
        ((FORMS["instruction"], "instruction"), {"text": answer(1)}, True),
        (({"text": answer(1)}, "document"), FORMS["instruction"], True),
        # An answer that two questions have.
        (
            ({"instruction": "A?", "output": "Yes."}, "instruction"),
            {"instruction": "B?", "output": "Yes."},
            False,
        ),
        # A conversation that continues another, and that one.
        (
            ({"messages": messages("A?", "1", "B?", "2")}, "chat"),
            {"instruction": "A?", "output": "1"},
            True,
        ),
        (
            ({"instruction": "A?", "output": "1"}, "instruction"),
            {"messages": messages("A?", "1", "B?", "2")},
            True,
        ),
        # Two conversations that begin alike.
        (
            ({"messages": messages("A?", "1", "B?", "2")}, "chat"),
            {"messages": messages("A?", "1", "C?", "3")},
            False,
        ),
        # A pair whose rejected answer is trained on, and another answer.
        (
            ({"prompt": "A?", "chosen": "1", "rejected": "2"}, "chat_preference"),
            {"instruction": "A?", "output": "2"},
            True,
        ),
        (
            ({"prompt": "A?", "chosen": "1", "rejected": "2"}, "chat_preference"),
            {"instruction": "A?", "output": "3"},
            False,
        ),
        # What the prompt of a pair answers is not measured.
        (
            (
                {
                    "prompt": messages("A?", "1", "B?"),
                    "chosen": "2",
                    "rejected": "3",
                },
                "chat_preference",
            ),
            {"instruction": "A?", "output": "1"},
            False,
        ),
    ],
)
def test_what_the_same_text_is(measured, trained, is_held_out):
    def passages(fields, name):
        if callable(fields):
            fields = fields(question(1), answer(1))
        return formats.passages(sources.Record(fields, "place"), name)

    if callable(trained):
        trained = trained(question(1), answer(1))
    name = next(n for f, n in NAMES.items() if f in trained)
    holdout = corpus.Holdout()
    holdout.add(passages(*measured), "eval.texts.one")
    expected = "eval.texts.one" if is_held_out else ""
    assert holdout.holder(passages(trained, name)) == expected


NAMES = {"text": "document", "messages": "chat", "instruction": "instruction"}


def test_what_is_left_out_is_reported_and_prepared_tokens_follow(tmp_path, folder):
    config = config_lib.default()
    config.data.row_length, config.train.num_steps = 64, 2
    file = f"{folder}/document.jsonl"
    config.sources.domain = config_lib.source(path=file, weight=1.0)
    config.data.prepared = str(tmp_path / "prepared")
    tokenizer = _Tokenizer()
    token_cache_writer.prepare(config, tokenizer)
    data = pipeline.load(config, tokenizer)
    assert (data.report[0]["prepared"], data.report[0]["held_out"]) == (True, 0)
    config.eval.texts.measured = config_lib.source(path=file, holdout=3)
    data = pipeline.load(config, tokenizer)
    assert (data.report[0]["prepared"], data.report[0]["held_out"]) == (False, 6)
    token_cache_writer.prepare(config, tokenizer)
    again = pipeline.load(config, tokenizer)
    assert (again.report[0]["prepared"], again.report[0]["held_out"]) == (True, 6)
    assert pipeline.fingerprint(again) == pipeline.fingerprint(data)


class _Tokenizer:
    """A token a character."""

    fingerprint, add_bos, bos_id, end_of_document_id, pad_id = "x", False, 0, 1, 0

    def encode_batch(self, texts):
        return [[ord(c) for c in text] for text in texts]


@pytest.mark.parametrize("spelling", ["{}", "{}/../x/./{}", "link"])
def test_a_source_that_is_measured_whole_is_refused(tmp_path, spelling):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text("")
    os.symlink(tmp_path / "x" / "a.jsonl", tmp_path / "link")
    path = f"{tmp_path}/link"
    if spelling != "link":
        path = spelling.format(f"{tmp_path}/x", "a.jsonl")
        path = path if path.endswith("jsonl") else f"{path}/a.jsonl"
    config = config_lib.default()
    config.model.path = "model"
    config.sources.domain = config_lib.source(path=f"{tmp_path}/x/a.jsonl")
    config.eval.texts.same = config_lib.source(path=path)
    with pytest.raises(
        InputError, match="eval.texts.same: .* sources.domain trains on"
    ):
        config_lib.validate(config)
    for change in ({"holdout": 5}, {"max_records": 5}, {"split": "test"}):
        config.eval.texts.same = config_lib.source(path=path, **change)
        config_lib.validate(config)
