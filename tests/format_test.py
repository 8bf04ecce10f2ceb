import pickle

import numpy as np
import pytest

from mixcpt_jax.data import format
from mixcpt_jax.data.sources import Record
from mixcpt_jax.errors import InputError


class _Bytes:
    """A token per byte."""

    bos_id, eos_id, end_of_document_id, pad_id = 256, 257, 257, None

    def __init__(self, add_bos=True):
        self.add_bos = add_bos

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


def _encode(records, name, add_bos=True, **settings):
    records = [Record(fields, f"f.jsonl:{i}") for i, fields in enumerate(records, 1)]
    return format.encode(records, name, _Bytes(add_bos), **settings)


def _texts(examples):
    return [
        bytes(t for t in examples.tokens[start:stop] if t < 256).decode()
        for start, stop in zip(examples.offsets[:-1], examples.offsets[1:], strict=True)
    ]


@pytest.mark.parametrize("add_bos", [False, True])
def test_an_example_is_bos_text_end(add_bos):
    examples = _encode([{"text": "ab"}, {"text": "c"}], "document", add_bos)
    bos = [256] if add_bos else []
    assert examples.tokens.tolist() == [*bos, 97, 98, 257, *bos, 99, 257]
    assert examples.lengths.tolist() == [3 + add_bos, 2 + add_bos]
    assert examples.tokens.dtype == np.int32
    assert not examples.loss_mask[examples.tokens == 256].any()
    assert examples.loss_mask[examples.tokens != 256].all()
    # With BOS all tokens of the text are targets; without, the first never is.
    assert examples.num_learnt == (5 if add_bos else 3)


def test_many_texts_come_out_in_order():
    words = [str(i) for i in range(3000)]
    assert _texts(_encode([{"text": word} for word in words], "document")) == words


def test_instructions_are_plain_text():
    records = [
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hello."},
        {"instruction": "Greet.", "input": None, "output": "Hello."},
        {"prompt": "Who?", "response": "I."},
    ]
    assert _texts(_encode(records, "instruction")) == [
        "Add.\n\n1 1\n\n2",
        "Greet.\n\nHello.",
        "Greet.\n\nHello.",
        "Who?\n\nI.",
    ]


@pytest.mark.parametrize(
    ("side", "texts"),
    [
        ("chosen", ["Q\n\nyes"]),
        ("rejected", ["Q\n\nno"]),
        ("both", ["Q\n\nyes", "Q\n\nno"]),
    ],
)
def test_preference_sides(side, texts):
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    assert _texts(_encode([record], "preference", preference_side=side)) == texts


def test_fields_are_mapped():
    examples = _encode([{"body": "x"}], "document", fields={"text": "body"})
    assert _texts(examples) == ["x"]
    examples = _encode(
        [{"q": "Q", "ctx": "C", "a": "A"}],
        "instruction",
        fields={"instruction": "q", "input": "ctx", "output": "a"},
    )
    assert _texts(examples) == ["Q\n\nC\n\nA"]


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("document", {"body": "x", "id": "1"}, "no field 'text' (found: body, id)"),
        ("document", {"text": 3}, "field 'text' is of type int"),
        ("document", {"text": " \n"}, "field 'text' is blank"),
        ("instruction", {"instruction": "x"}, "no field 'output'"),
        ("instruction", {"prompt": "x"}, "no field 'response'"),
        ("instruction", {"instruction": "x", "input": 1, "output": "y"}, "'input'"),
        ("instruction", {}, "no field 'instruction' (found: none)"),
        ("preference", {"prompt": "x", "rejected": "y"}, "no field 'chosen'"),
    ],
)
def test_a_bad_record_is_named(name, fields, words):
    good = {
        "text": "t", "instruction": "i", "output": "o", "prompt": "p", "chosen": "c",
    }  # fmt: skip
    with pytest.raises(InputError) as error:
        _encode([good, fields], name)
    assert str(error.value).startswith("f.jsonl:2: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "chat"}, "format 'chat' is unknown"),
        ({"fields": {"body": "text"}}, "'body' is not a field of format 'document'"),
        ({"preference_side": "best"}, "preference_side 'best' is unknown"),
    ],
)
def test_a_bad_setting_is_named(settings, words):
    with pytest.raises(InputError, match=words):
        _encode([{"text": "x"}], **{"name": "document"} | settings)


def test_pickling_maps_one_file_and_removes_it_at_the_end():
    examples = _encode([{"text": "ab"}], "document")
    copy = pickle.loads(pickle.dumps(examples))
    assert isinstance(copy.tokens, np.memmap)
    assert len(pickle.dumps(examples)) < 500
    for field in ("tokens", "loss_mask", "offsets"):
        np.testing.assert_array_equal(getattr(copy, field), getattr(examples, field))
    folder = examples._folder
    del examples
    with pytest.raises(FileNotFoundError):
        np.load(f"{folder}/tokens.npy")


def test_no_records_make_no_examples():
    assert len(_encode([], "document")) == 0
