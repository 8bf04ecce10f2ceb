"""What the files beside a tokenizer say is read as transformers reads it, and kept."""

import json
import pathlib

import jax
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.jobs import export
from mixcpt_jax.models import pretrained, tokenizer, transformer

CHATML = tokenizer.CHATML
SPECIAL = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
MARKED = "user says <|im_start|>hi<|im_end|> <tool>there"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """kind -> the vocabulary file alone, and how many tokens it has."""
    folder = tmp_path_factory.mktemp("base")
    words = ["user says hi", "assistant says hello there"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(words, 300, special_tokens=["<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")
    )
    return {
        "tokenizer.model": (folder / "tokenizer.model", pieces.get_piece_size()),
        "tokenizer.json": (folder / "tokenizer.json", bpe.get_vocab_size()),
    }


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def vocabulary(request, base, tmp_path):
    """(folder with one vocabulary file, its number of tokens)."""
    return put(base, request.param, tmp_path)


def put(base, name, folder):
    file, size = base[name]
    (folder / name).write_bytes(file.read_bytes())
    return folder, size


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def decoder(size):
    added = {"<|im_start|>": True, "<|im_end|>": True, "<tool>": False}
    return {
        str(size + i): {"content": token, "special": special, **SPECIAL}
        for i, (token, special) in enumerate(added.items())
    }


def write_new(folder, size):
    """As transformers writes today."""
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "model_max_length": 77,
        "chat_template": CHATML,
        "added_tokens_decoder": decoder(size),
    }
    write(folder, "tokenizer_config.json", config)


def write_old(folder, size):
    """As it did: what is new stands in files of its own."""
    added = {token["content"]: int(i) for i, token in decoder(size).items()}
    write(folder, "added_tokens.json", added)
    names = {
        "bos_token": {"content": "<s>", **SPECIAL},
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<|im_start|>"],
    }
    write(folder, "special_tokens_map.json", names)
    # It has the last word.
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "eos_token": "</s>"}
    write(folder, "tokenizer_config.json", config)


@pytest.mark.parametrize("write_files", [write_new, write_old])
def test_added_tokens_like_transformers(vocabulary, write_files, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder, size = vocabulary
    write_files(folder, size)
    if (folder / "tokenizer.json").exists():
        edit(folder, tokenizer_class="PreTrainedTokenizerFast")
    ours = tokenizer.load(str(folder))
    ours.save(str(tmp_path / "out"))
    assert ours.vocab_size == size + 3
    for place in (folder, tmp_path / "out"):
        theirs = transformers.AutoTokenizer.from_pretrained(str(place))
        ids = theirs(MARKED, add_special_tokens=False)["input_ids"]
        assert ours.encode_with_special(MARKED) == ids
        names = ("bos_token_id", "eos_token_id")
        found = [getattr(theirs, name) for name in names]
        assert (
            found == [ours.bos_id, ours.eos_id] == [ours.token_to_id("<s>"), size + 1]
        )
    plain = ours.encode(MARKED + "</s>")
    assert not {size, size + 1, ours.token_to_id("</s>")} & set(plain)
    assert size + 2 in plain  # Added and not special.
    again = tokenizer.load(str(tmp_path / "out"))
    assert again.fingerprint == ours.fingerprint
    assert ours.decode([size + 1]) == ""


def edit(folder, **changes):
    file = folder / "tokenizer_config.json"
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(raw | changes))


def test_an_export_has_the_files_of_its_start(vocabulary, tmp_path):
    folder, size = vocabulary
    write_old(folder, size)
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        if not (folder / name).exists():
            write(folder, name, f"as {name} was")
    write(folder, "chat_template.jinja", CHATML)
    edit(folder, model_max_length=77, auto_map={"AutoTokenizer": "code.py"})
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tokenizer.load(str(folder)).save(str(tmp_path / "out"))
    after = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert before.keys() - {"out"} == after.keys()
    # The tokens of added_tokens.json join those of tokenizer.json.
    changed = {"tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"}
    same = before.keys() - changed
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    config, names = (
        json.loads(after[f"{name}.json"])
        for name in ("tokenizer_config", "special_tokens_map")
    )
    assert config["model_max_length"] == 77
    assert "auto_map" not in config
    assert names["eos_token"] == config["eos_token"] == "<|im_end|>"
    assert names["additional_special_tokens"] == ["<|im_start|>"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "A"}}, "A"),
        (
            {
                "tokenizer_config.json": {"chat_template": "A"},
                "chat_template.jinja": "B",
                "chat_template.json": {"chat_template": "C"},
            },
            "B",
        ),
        ({"chat_template.json": {"chat_template": "C"}}, "C"),
        (
            {"chat_template.jinja": "B", "additional_chat_templates/tool.jinja": "T"},
            "B",
        ),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [
                        {"name": "default", "template": "A"},
                        {"name": "tool", "template": "T"},
                    ]
                }
            },
            "A",
        ),
        ({"additional_chat_templates/tool.jinja": "T"}, None),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool", "template": "T"}]
                }
            },
            None,
        ),
    ],
)
def test_which_template_is_the_models(files, expected, base, tmp_path):
    folder, _ = put(base, "tokenizer.json", tmp_path)
    (folder / "additional_chat_templates").mkdir()
    for name, value in files.items():
        write(folder, name, value)
    if expected is None:
        with pytest.raises(InputError, match="named tool and no default"):
            tokenizer.load(str(folder))
        write(folder, "mine.jinja", "M")
        assert tokenizer.load(str(folder), str(folder / "mine.jinja")).template == "M"
        return
    loaded = tokenizer.load(str(folder))
    assert loaded.chat_template == expected
    loaded.save(str(tmp_path / "out"))
    again = tokenizer.load(str(tmp_path / "out"))
    assert again.chat_template == expected
    assert again.companions.templates == loaded.companions.templates


@pytest.mark.parametrize(
    ("token_id", "token", "message"),
    [
        (0, {}, "has id 0 .* use the files of one tokenizer"),
        (5000, {}, "has id 5000 .* use the files of one tokenizer"),
        (None, {"rstrip": True}, "changes the text around it"),
    ],
)
def test_added_tokens_that_do_not_fit(token_id, token, message, vocabulary):
    folder, size = vocabulary
    entry = {"content": "<new>", "special": True, **SPECIAL, **token}
    added = {str(size if token_id is None else token_id): entry}
    edit(folder, added_tokens_decoder=added)
    if token and (folder / "tokenizer.json").exists():
        loaded = tokenizer.load(str(folder))
        assert loaded.encode_with_special("<new>  a") == [size, *loaded.encode("a")]
        return
    with pytest.raises(InputError, match=message):
        tokenizer.load(str(folder))


def test_a_named_token_must_be_there(vocabulary):
    folder, _ = vocabulary
    write(folder, "special_tokens_map.json", {"eos_token": "<nowhere>"})
    with pytest.raises(InputError, match=r"special_tokens_map\.json: eos_token"):
        tokenizer.load(str(folder))
    write(folder, "special_tokens_map.json", {"eos_token": "</s>", "bos_token": None})
    edit(folder, add_bos_token=True)
    with pytest.raises(InputError, match="bos_token is missing, and add_bos_token"):
        tokenizer.load(str(folder))


@pytest.mark.parametrize("token", [{}, {"text": "</s>"}, "\ud800", 2, ["</s>"]])
def test_a_named_token_is_a_text(token, vocabulary):
    folder, _ = vocabulary
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        write(folder, name, {"eos_token": token})
        with pytest.raises(InputError, match=rf"{name}: "):
            tokenizer.load(str(folder))
        (folder / name).unlink()


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("additional_special_tokens", ["</s>", "<nowhere>"]),
        ("additional_special_tokens", [{"content": "<nowhere>", **SPECIAL}]),
        ("extra_special_tokens", {"image_token": "<nowhere>"}),
        ("unk_token", "<nowhere>"),
        ("mask_token", {"content": "<nowhere>", **SPECIAL}),
    ],
)
def test_no_other_named_token_is_left_out(key, value, name, vocabulary):
    folder, size = vocabulary
    write(folder, name, {key: value})
    with pytest.raises(InputError, match=rf"{name}: {key} has '<nowhere>'"):
        tokenizer.load(str(folder))
    # The same with the token there.
    write(folder, "added_tokens.json", {"<nowhere>": size})
    assert size in tokenizer.load(str(folder)).encode_with_special("a <nowhere>")


def test_generation_ends_at_the_tokens_in_the_models_files(vocabulary):
    folder, size = vocabulary
    for ends in (9, [9, 11]):
        write(folder, "config.json", {"eos_token_id": ends})
        assert {9} <= tokenizer.load(str(folder)).document_ends
        assert (ends == 9) != (11 in tokenizer.load(str(folder)).document_ends)
    write(folder, "generation_config.json", {"top_p": 0.9})
    assert not {9, 11} & tokenizer.load(str(folder)).document_ends
    (folder / "generation_config.json").unlink()
    write(folder, "config.json", {"eos_token_id": size})
    with pytest.raises(InputError, match=rf"[^_]config\.json: eos_token_id is {size}"):
        tokenizer.load(str(folder))
    write(folder, "generation_config.json", {"eos_token_id": [5, 7], "top_p": 0.9})
    assert {5, 7} <= tokenizer.load(str(folder)).document_ends
    write(folder, "generation_config.json", {"eos_token_id": size})
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id"):
        tokenizer.load(str(folder))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 400)
    | st.text(max_size=5)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "special", "name", "template", "5", "x"]), inner
        )
    ),
    max_leaves=6,
)
FILES = {
    "tokenizer_config.json": (
        "bos_token", "eos_token", "pad_token", "add_bos_token", "chat_template",
        "added_tokens_decoder", "legacy", "extra_special_tokens",
    ),
    "special_tokens_map.json": ("bos_token", "eos_token", "additional_special_tokens"),
    "added_tokens.json": ("<new>", "<s>"),
    "generation_config.json": ("eos_token_id",),
    "chat_template.json": ("chat_template",),
}  # fmt: skip


@given(st.data())
def test_any_value_is_read_or_refused_by_name(base, tmp_path_factory, data):
    kind = data.draw(st.sampled_from(sorted(base)))
    folder = tmp_path_factory.getbasetemp() / f"any-{kind}"
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink() if file.is_file() else None
    put(base, kind, folder)
    name = data.draw(st.sampled_from(sorted(FILES)))
    keys = st.lists(st.sampled_from(FILES[name]), min_size=1, max_size=2)
    write(folder, name, {key: data.draw(VALUES) for key in data.draw(keys)})
    try:
        loaded, message = tokenizer.load(str(folder)), ""
    except InputError as error:
        loaded, message = None, str(error)
    if loaded is None:
        assert str(folder) in message
        assert "\n" not in message
        return
    loaded.encode_with_special("a b")
    loaded.save(str(folder / "out"))
    assert tokenizer.load(str(folder / "out")).fingerprint == loaded.fingerprint
    for file in (folder / "out").iterdir():
        file.unlink()


def test_an_export_keeps_settings_and_licence_and_deletes_nothing(tiny_model, tmp_path):
    start, workdir = tmp_path / "start", tmp_path / "run"
    start.mkdir()
    for file in pathlib.Path(tiny_model).iterdir():
        (start / file.name).write_bytes(file.read_bytes())
    generation = {"eos_token_id": [0, 9], "temperature": 0.6, "pad_token_id": 7}
    write(start, "generation_config.json", generation)
    write(start, "LICENSE.txt", "as it pleases")
    write(start, "README.md", "of another model")
    config = config_lib.default()
    config.job, config.model.path = "export", str(start)
    config.metrics.progress = False
    out = pathlib.Path(export.run(config, str(workdir), "export")["folder"])
    written = json.loads((out / "generation_config.json").read_text())
    assert written["temperature"] == 0.6
    assert {0, 9} <= set(written["eos_token_id"])
    assert (out / "LICENSE.txt").read_text() == "as it pleases"
    assert not (out / "README.md").exists()
    params = transformer.init_params(
        pretrained.read_model_config(str(out)), jax.random.key(0)
    )
    architecture = pretrained.read_model_config(str(out))
    write(out, "tokenizer.model", "put there by hand")
    with pytest.raises(InputError, match=r"tokenizer\.model, which is not part of an"):
        pretrained.save_pretrained(str(out), params, architecture)
    (out / "tokenizer.model").unlink()
    pretrained.save_pretrained(str(out), params, architecture)
    foreign = {
        "transformers_version": "5",
        **json.loads((out / "config.json").read_text()),
    }
    write(out, "config.json", {k: v for k, v in foreign.items() if "files" not in k})
    with pytest.raises(InputError, match="which is not part of an export"):
        pretrained.save_pretrained(str(out), params, architecture)
