"""Conversations are encoded as the model's template writes them, to the token."""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats, selection, tally
from mixcpt_jax.data.sources import Record
from mixcpt_jax.models import gguf_vocabulary, tokenizer

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


# As Qwen3's: thinking stands in the turns behind the last question and in no other.
THINKING = """
{%- set last = namespace(question=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought, content = ([''] + content.split('</think>'))[-2:] %}
        {%- set content = content.lstrip('\n') %}
        {%- if loop.index0 > last.question %}
            {%- set thought = thought.split('<think>')[-1].strip('\n') %}
            {{- '<think>\n' + thought + '\n</think>\n\n' }}
        {%- endif %}
    {%- endif %}
    {{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
# As SmolLM3's: the system's turn explains thinking, the prompt ends with an empty one.
EXPLAINED = """
{%- set rules = 'Write <think> thoughts </think> first.' %}
{{- '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '. ' + rules }}
{%- if messages[0].role == 'system' %}
    {{- '\n' + messages[0].content.rstrip() }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}
        {{- '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') }}
        {{- '<|im_end|>\n' }}
        {%- endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n\n</think>\n' }}
{%- endif %}
"""
# As Gemma's: BOS in the template, no system's turn, contents are trimmed.
TURNS = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
    {%- set role = 'model' if m.role == 'assistant' else m.role %}
    {{- '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
# As Llama 3.2's: BOS, and always a system's turn with the date.
DATED = """
{{- bos_token + '<|header|>system<|/header|>\n\nToday Date: ' }}
{{- strftime_now('%d %b %Y') + '\n\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|header|>' + m.role + '<|/header|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}
"""
# As Mistral's: the system's words stand in the first question; no generation prompt.
ASKED = """
{{- bos_token }}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns have to alternate') }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Template -> what it writes into a turn before the content, how it trims, and the end.
TEMPLATES = {
    tokenizer.CHATML: ("", str, "<|im_end|>"),
    tokenizer.CHATML_WITH_EOS: ("", str, "</s>"),
    THINKING: ("<think>\n\n</think>\n\n", lambda text: text.lstrip("\n"), "<|im_end|>"),
    EXPLAINED: ("", lambda text: text.lstrip("\n"), "<|im_end|>"),
    TURNS: ("", str.strip, "<end_of_turn>"),
    DATED: ("", str.strip, "<|eot_id|>"),
    ASKED: (" ", str, "</s>"),
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIAL += ["<|header|>", "<|/header|>", "<start_of_turn>", "<end_of_turn>"]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def byte_level(folder, special, config, adds_bos=False, plain=()):
    """A byte-level BPE as Llama 3's, with such special and plain added tokens."""
    folder.mkdir(exist_ok=True)
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = gguf_vocabulary._pre_tokenizer("llama-bpe")
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


RESPONSES = [
    "It is 4: two.",
    " \n two and two\n\n",
    "</s>It <think> is",
    "日本 naïve",
    "a",
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A vocabulary with the special tokens of all templates; `<think>` is not special."""
    folder = tmp_path_factory.mktemp("plain")
    added = ["<think>", "</think>"]
    return tokenizer.load(byte_level(folder, SPECIAL, NAMES, True, added))


@pytest.fixture(scope="module")
def theirs(plain, tmp_path_factory):
    return transformers_of(plain, tmp_path_factory.mktemp("theirs"))


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [None, *TEMPLATES], ids=range(8))
def test_selection_scores_the_same_tokens_in_both_forms(plain, template, adds_bos):
    """The response's own, whatever the template writes before, around and behind."""
    tok = dataclasses.replace(plain, chat_template=template, add_bos=adds_bos)
    records = [
        Record({"prompt": f"{number}?", "response": response}, "f:1")
        for number, response in enumerate(RESPONSES)
    ]
    found = selection.candidates(
        records, "instruction", tok, max_tokens=999, near_duplicates=0.0
    )
    # Behind a blank of the template, a single word is another token.
    blank = TEMPLATES.get(template, ("",))[0] == " "
    assert len(found.records) >= len(records) - blank
    for number, record in enumerate(found.records):
        (plain_ids, plain_mask), (chat_ids, chat_mask) = (
            examples.read(*examples.offsets[number : number + 2])
            for examples in (found.plain, found.chat)
        )
        assert plain_ids[plain_mask].tolist() == chat_ids[chat_mask].tolist()
        scored = tok.decode(plain_ids[plain_mask])
        response = record.fields["response"]
        trim = TEMPLATES.get(template, ("", str))[1]
        assert trim(response).endswith(scored)
        assert blank or trim(response) == scored
        assert not chat_mask[-1]
        has_bos = adds_bos and chat_ids[0] == tok.bos_id
        assert (plain_ids[0] == tok.bos_id) == has_bos


_WORDS = ["a", " ", "\n", "\n\n", "It is 4.", "naïve", "日本", "\u0301", "{{ m }}"]
_CONTENT = st.lists(
    st.sampled_from([*_WORDS, "\ufdd0", *SPECIAL]), min_size=1, max_size=5
)
_CONTENT = _CONTENT.map("".join).filter(str.strip)
_CONVERSATION = st.tuples(
    st.lists(_CONTENT, max_size=1),
    st.lists(st.tuples(_CONTENT, _CONTENT), min_size=1, max_size=3),
)


@pytest.mark.parametrize("template", TEMPLATES, ids=range(7))
@hypothesis.given(conversation=_CONVERSATION)
def test_the_loss_is_on_the_responses_and_their_ends(
    plain, theirs, template, conversation
):
    system, pairs = conversation
    messages = [{"role": "system", "content": content} for content in system]
    if template == TURNS:  # which refuses it
        messages = []
    for question, answer in pairs:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    tok = dataclasses.replace(plain, chat_template=template)
    ids, mask = tok.encode_chat(messages)
    lead, trim, end = TEMPLATES[template]
    # Only the last turn is as generation writes it where earlier ones lose their lead.
    answers = [answer for _, answer in pairs][-1 if template == THINKING else 0 :]
    assert runs(theirs, ids, mask) == [lead + trim(answer) + end for answer in answers]
    text = render(theirs, template, messages)
    assert theirs.decode(ids) == text
    # Of what messages say, nothing is a special token.
    harmless = [message | {"content": "a"} for message in messages]
    special = {tok.token_to_id(token) for token in SPECIAL}
    assert [i for i in ids if i in special] == [
        i for i in tok.encode_chat(harmless)[0] if i in special
    ]
    if any(token in message["content"] for token in SPECIAL for message in messages):
        return
    # But for tokens that reach from a prompt into its response, all are transformers'.
    encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    cuts = {
        len(render(theirs, template, messages[:number], add_generation_prompt=True))
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    if not any(a < cut < b for cut in cuts for a, b in encoded["offset_mapping"]):
        assert ids == encoded["input_ids"]


def render(theirs, template, messages, **settings):
    """What transformers writes, on the day on which all conversations take place."""
    template = re.sub(
        r"strftime_now\('(.*?)'\)",
        lambda call: repr(tokenizer._TODAY.strftime(call[1])),
        template,
    )
    return theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, **settings
    )


def runs(theirs, ids, mask):
    """The text of each run of tokens that contribute to the loss."""
    grouped = itertools.groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
    return [theirs.decode([i for i, _ in run]) for is_loss, run in grouped if is_loss]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(7))
def test_thinking_is_content_as_any_other(plain, theirs, template):
    """A template may remove it from earlier turns, and a chat still continues."""
    thought = "<think>\nTwo and two.\n</think>\n\nIt is 4."
    messages = [ASK, ANSWER | {"content": thought}]
    tok = dataclasses.replace(plain, chat_template=template)
    lead, _, end = TEMPLATES[template]
    lead = "" if template == THINKING else lead
    for conversation in (messages, [*messages, THANK, ANSWER | {"content": thought}]):
        ids, mask = tok.encode_chat(conversation)
        text = render(theirs, template, conversation)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        parts = runs(theirs, ids, mask)
        assert set(parts) == {lead + thought + end}
        assert len(parts) == (1 if template == THINKING else len(conversation) // 2)
    prompt, _ = tok.encode_chat([*messages, THANK], add_generation_prompt=True)
    assert prompt == ids[: len(prompt)]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(7))
def test_turns_without_loss_are_counted(plain, template):
    tok = dataclasses.replace(plain, chat_template=template)
    turns = [ASK, ANSWER, THANK, CLOSE]
    given = [ASK, ANSWER | {"weight": 0}, THANK, CLOSE]
    records = [Record({"messages": m}, "f:1") for m in (turns, turns, turns[:2], given)]
    found = tally.Tally()
    formats.encode(records, "chat", tok, tally=found)
    rewrites = template == THINKING
    assert found.counts()["without_loss"] == ({"rewritten": 2} if rewrites else {})
    assert any("2), such as f:1" in line for line in found.lines()) == rewrites
    pair = {"prompt": [ASK], "chosen": turns[1:], "rejected": "No."}
    found = tally.Tally()
    formats.encode([Record(pair, "f:1")], "chat_preference", tok, tally=found)
    assert found.counts()["without_loss"] == ({"rewritten": 1} if rewrites else {})


_FAMILIES = ["llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "qwen2_5", "qwen3"]
_FAMILIES += ["qwen3_instruct_2507", "phi3", "cohere2"]


@pytest.mark.parametrize("family", _FAMILIES)
def test_published_templates(tmp_path, family):
    """Those that TRL carries, word for word, in conversations of several turns."""
    found = importlib.util.find_spec("trl")
    if found is None:
        pytest.skip("trl is not installed")
    [folder] = found.submodule_search_locations
    file = pathlib.Path(folder) / "chat_templates" / f"{family}.jinja"
    if not file.exists():
        pytest.skip(f"trl has no template {family}")
    template = file.read_text()
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen": "<|im_end|>"}
    end |= {"phi3": "<|end|>", "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"}
    [end] = (token for name, token in end.items() if family.startswith(name))
    special = [
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|end_header_id|>",
        "<|start_header_id|>",
    ]
    special += ["<start_of_turn>", "<|user|>", "<|assistant|>", "<|START_RESPONSE|>"]
    special += ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", end]
    tok = tokenizer.load(byte_level(tmp_path, special, NAMES, True, ["<think>"]))
    tok = dataclasses.replace(tok, chat_template=template)
    theirs = transformers_of(tok, tmp_path / "saved")
    for messages in CONVERSATIONS:
        if family == "gemma" and messages[0] == SYSTEM:
            with pytest.raises(InputError, match="System role not supported"):
                tok.encode_chat(messages)
            continue
        ids, mask = tok.encode_chat(messages)
        encoded = theirs.apply_chat_template(messages, date_string="26 Jul 2024")
        assert ids == encoded["input_ids"]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        lead = "<|START_RESPONSE|>" if family == "cohere2" else ""
        if family == "qwen3":
            lead, answers = "<think>\n\n</think>\n\n", answers[-1:]
        said = [part.removeprefix(lead) for part in runs(theirs, ids, mask)]
        assert said == [answer + end for answer in answers]
        prompt, _ = tok.encode_chat(messages[:-1], add_generation_prompt=True)
        assert ids[: len(prompt)] == prompt
