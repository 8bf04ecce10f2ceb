"""Conversations are what the model's template makes of them, to the token."""

import dataclasses
import itertools
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mixcpt_jax import tokenizer
from mixcpt_jax.errors import InputError

SYSTEM, ASK, ANSWER, THANK, CLOSE = (
    {"role": role, "content": content}
    for role, content in [
        ("system", "Be brief."),
        ("user", "What is\n2 + 2?"),
        ("assistant", "It is 4: two and two."),
        ("user", "Thank you!"),
        ("assistant", "You're welcome,\n\n  naïve one. 日本"),
    ]
)
CONVERSATIONS = [
    [ASK, ANSWER],
    [SYSTEM, ASK, ANSWER],
    [ASK, ANSWER, THANK, CLOSE],
    [SYSTEM, ASK, ANSWER, THANK, CLOSE],
]
LINES = [m["content"] for m in CONVERSATIONS[3]] * 3 + ["a\n\nb", "user assistant"] * 9


def byte_level(folder, special, config, adds_bos=False, plain=()):
    """A byte-level BPE as Llama 3's, with such special and plain added tokens."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = tokenizer._pre_tokenizer("llama-bpe")
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        LINES,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens(list(plain))
    if adds_bos:
        bos = config["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def transformers_of(tok, folder):
    """What transformers builds from the files that `tok` saves."""
    transformers = pytest.importorskip("transformers")
    tok.save(str(folder))
    return transformers.AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("has_chatml", [False, True])
@pytest.mark.parametrize("given", [None, tokenizer.CHATML_WITH_EOS, "bos"])
def test_conversations_begin_as_plain_texts_do(tmp_path, adds_bos, has_chatml, given):
    """In ChatML, and in a template that is named apart from the model."""
    special = ["<s>", "</s>", *["<|im_start|>", "<|im_end|>"] * has_chatml]
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = byte_level(tmp_path / "base", special, names, adds_bos)
    file = ""
    if given:
        file = tmp_path / "given.jinja"
        # A template's own BOS stays, once, whatever the tokenizer does.
        bos = "{{ bos_token }}" * (given == "bos" and adds_bos)
        file.write_text(bos + given.replace("bos", tokenizer.CHATML_WITH_EOS, 1))
    tok = tokenizer.load(folder, str(file))
    assert tok.add_bos == adds_bos
    theirs = transformers_of(
        dataclasses.replace(tok, chat_template=tok.template), tmp_path / "saved"
    )
    for messages in CONVERSATIONS:
        ids, mask = tok.encode_chat(messages)
        assert ids == theirs.apply_chat_template(messages)["input_ids"]
        assert ids.count(tok.bos_id) == adds_bos
        assert (ids[0] == tok.bos_id) == adds_bos == (theirs("a").input_ids[0] == 0)
        assert not mask[0]
        end = "<|im_end|>" if has_chatml and not given else "</s>"
        assert tok.end_of_turn_id == tok.token_to_id(end)
        # What the vocabulary lacks is text, as any other.
        start = tok.encode_with_special("<|im_start|>")
        assert (len(start) == 1) == has_chatml
        assert ids[adds_bos : adds_bos + len(start)] == start


def test_a_template_file_may_have_a_byte_order_mark_and_any_line_ends(tmp_path):
    names = {"eos_token": "<|im_end|>"}
    folder = byte_level(tmp_path, ["<|im_start|>", "<|im_end|>"], names)
    template = (
        "{%- for m in messages -%}\n{{ '<|im_start|>' + m.role + '\n' }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}\n"
        "{% if add_generation_prompt -%}\n<|im_start|>assistant\n\n{% endif %}"
    )
    expected = dataclasses.replace(
        tokenizer.load(folder), chat_template=template
    ).encode_chat(CONVERSATIONS[3])
    own = tmp_path / "chat_template.jinja"
    given = tmp_path / "given.jinja"
    for mark, end in itertools.product(["", "\ufeff"], ["\n", "\r\n", "\r"]):
        text = mark + template.replace("\n", end)
        given.write_bytes(text.encode())
        loaded = [tokenizer.load(folder, str(given))]
        own.write_bytes(text.encode())
        loaded += [tokenizer.load(folder)]
        own.unlink()
        config = tmp_path / "tokenizer_config.json"
        config.write_text(json.dumps(names | {"chat_template": text}))
        loaded += [tokenizer.load(folder)]
        config.write_text(json.dumps(names))
        for tok in loaded:
            assert tok.encode_chat(CONVERSATIONS[3]) == expected
            assert not tok.chat_template.startswith("\ufeff")
    given.write_bytes(b"\xff\xfe{\x00")
    with pytest.raises(InputError, match=r"given\.jinja: byte 0 is not UTF-8; save"):
        tokenizer.load(folder, str(given))


@pytest.fixture(scope="module")
def dummy_prefix(tmp_path_factory):
    """A sentencepiece model that puts a space before a text, as those of Llama 2."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


# How much the templates of the family write around a special token.
SPACES = [
    "{{ bos_token }}{% for m in messages %}"
    f"{{{{ {before!r} * (m.role != 'assistant') + m.content + {after!r} + eos_token }}}}"
    "{% endfor %}"
    for before, after in itertools.product(["", " ", "\n", "[INST] "], ["", " ", "\n"])
]


@pytest.mark.parametrize("legacy", [None, False, True])
def test_a_dummy_prefix_stands_where_transformers_puts_it(
    dummy_prefix, tmp_path, legacy
):
    (tmp_path / "tokenizer.model").write_bytes(
        (dummy_prefix / "tokenizer.model").read_bytes()
    )
    config = {"tokenizer_class": "LlamaTokenizer"}
    config |= {} if legacy is None else {"legacy": legacy}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tok = tokenizer.load(str(tmp_path))
    transformers = pytest.importorskip("transformers")
    start = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    export = transformers_of(tok, tmp_path / "saved")
    for template in [tok.template, *SPACES]:
        ours = dataclasses.replace(tok, chat_template=template)
        for messages in CONVERSATIONS:
            ids, _ = ours.encode_chat(messages)
            for theirs in (start, export):
                encoded = theirs.apply_chat_template(messages, chat_template=template)
                assert ids == encoded["input_ids"]
                text = ours.apply_chat_template(messages)
                assert ours.encode_with_special(text) == encoded["input_ids"]
