"""What a record says is trained on, refused by name, or counted."""

import itertools
import json

import hypothesis
import pytest
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import exams, fields, formats, tally, tasks
from mixcpt_jax.data import pipeline as pipeline_lib
from mixcpt_jax.data.sources import Record


class Letters:
    """A token a character; a template that writes roles and contents."""

    add_bos, bos_id, end_of_document_id, pad_id = False, None, 0x10FFFF, None
    message_keys = ("role", "content", "parts", "weight")

    def encode_batch(self, texts):
        return [[ord(letter) for letter in text] for text in texts]

    def encode_chat(self, messages, add_generation_prompt=False):
        ids, mask = [], []
        for message in messages:
            opening, said = f"<{message['role']}>", f"{message['content']}\n"
            has_loss = fields.is_loss_turn(message)
            ids += map(ord, opening + said)
            mask += [False] * len(opening) + [has_loss] * len(said)
        if add_generation_prompt:
            ids += map(ord, "<assistant>")
            mask += [False] * len("<assistant>")
        return ids, mask


def text_of(ids):
    return "".join(map(chr, ids))


def encode(record, name, **settings):
    found = tally.Tally()
    examples = formats.encode(
        [Record(record, "f:7")], name, Letters(), tally=found, **settings
    )
    return examples, found


WORD = st.text("abcdefgh", min_size=4, max_size=8)
ROLE = st.sampled_from(fields.ROLES)
MESSAGE_KEYS = (
    "name", "tool_calls", "function_call", "tool_call_id", "reasoning_content",
    "reasoning", "thinking", "refusal", "images", "audio", "weight", "train", "channel",
)  # fmt: skip
KEYS = sorted(
    {*itertools.chain(*fields.FIELDS.values()), *fields.REFUSED}
    | {"conversations", "completion", "label", "weight", "title", "metadata", "url"}
)


@st.composite
def messages(draw, end=None):
    roles = [draw(st.sampled_from(("user", "system")))] if end else []
    roles += draw(st.lists(ROLE, max_size=3))
    roles += [end] if end else draw(st.lists(ROLE, min_size=1, max_size=1))
    out = []
    for role in roles:
        content = draw(WORD | WORD.map(lambda w: [{"type": "text", "text": w}]))
        extra = draw(st.dictionaries(st.sampled_from(MESSAGE_KEYS), WORD, max_size=1))
        out.append({"role": role, "content": content} | extra)
    return out


VALUE = (
    WORD
    | messages("assistant")
    | messages("user")
    | st.lists(st.lists(WORD, min_size=2, max_size=2), min_size=1, max_size=2)
    | st.fixed_dictionaries({"a": WORD})
)
NEEDED = {
    "document": [["text"]],
    "instruction": [["instruction", "output"], ["prompt", "response"]],
    "preference": [["prompt", "chosen", "rejected"]],
    "cloze": [["context", "target"]],
    "chat": [["messages"], ["instruction", "output"], ["prompt", "response"]],
    "chat_preference": [["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
}


@st.composite
def records(draw, name):
    needed = {}
    for key in draw(st.sampled_from(NEEDED[name])):
        is_talk = key == "messages" or name == "chat_preference"
        end = "user" if key == "prompt" else "assistant"
        needed[key] = draw(messages(end) if is_talk and draw(st.booleans()) else WORD)
    if name == "chat" and "messages" in needed:
        needed["messages"] = draw(messages("assistant"))
    others = draw(st.dictionaries(st.sampled_from(KEYS), VALUE, max_size=2))
    return others | needed


def words_of(value):
    """The words of a value, each with the keys that lead to it."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in ("role", "type"):
                yield from ((word, (key, *keys)) for word, keys in words_of(entry))
    elif isinstance(value, list):
        for entry in value:
            yield from words_of(entry)
    else:
        yield from ((word, ()) for word in str(value).split())


@pytest.mark.parametrize("name", fields.FIELDS)
@hypothesis.given(data=st.data())
def test_each_word_is_trained_on_or_counted_or_the_record_is_refused(name, data):
    record, complaint = data.draw(records(name)), ""
    try:
        examples, found = encode(record, name, preference_side="both")
    except InputError as error:
        complaint = str(error)
    if complaint:
        assert complaint.startswith("f:7: ")
        return
    if found.left_out:
        assert found.left_out == {"no_preference": 1}
        return
    text = text_of(examples.tokens)
    for word, keys in words_of(record):
        counted = {keys[0], f"messages.{keys[-1]}"} & found.unread.keys()
        assert word in text or counted, (word, keys)


@hypothesis.given(
    system=st.sampled_from(["", "Be brief.", "Be brief. "]),
    where=st.sampled_from(["prompt", "answers", "both", "field"]),
    has_prompt=st.booleans(),
    are_whole=st.booleans(),
    is_list=st.booleans(),
    blank=st.sampled_from(["", " ", "\n", "  "]),
    turns=st.integers(0, 2),
)
def test_the_prompt_of_a_pair_is_written_once(
    system, where, has_prompt, are_whole, is_list, blank, turns
):
    before = [
        {"role": role, "content": f"{role} {n}"}
        for n in range(turns)
        for role in ("user", "assistant")
    ]
    asked = {"role": "user", "content": "Why so?"}
    first = [{"role": "system", "content": system}] if system else []
    record = {"system": system} if where == "field" else {}
    in_answers = first if where in ("answers", "both") else []
    begin = [*in_answers, *before, asked] if are_whole else []
    for side, said in (("chosen", "So."), ("rejected", "No.")):
        record[side] = [*begin, {"role": "assistant", "content": said}]
    if has_prompt:
        loose = asked | {"content": asked["content"] + blank}
        ours = first if where in ("prompt", "both") else []
        record["prompt"] = [*ours, *before, loose] if is_list else loose["content"]
    try:
        pair = formats.chat_pair(Record(record, "f:7"), Letters())
    except InputError:
        assert not has_prompt
        assert not are_whole
        return
    for ids, mask, said in (
        (pair.chosen, pair.chosen_mask, "So."),
        (pair.rejected, pair.rejected_mask, "No."),
    ):
        text = text_of(ids)
        assert text.count("Why so?") == 1
        assert text.count("user 0") == bool(turns) * (
            (is_list and has_prompt) or are_whole
        )
        assert text.count("Be brief.") <= 1
        assert text_of(ids[mask]) == f"{said}\n"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Why?", "chosen": "Why? So.", "rejected": "Why? No."}, "begin with"),
        ({"prompt": "Who?", "chosen": [{"role": "user", "content": "Why?"},
          {"role": "assistant", "content": "So."}], "rejected": "No."},
         "a prompt that differs"),
        ({"prompt": [{"role": "system", "content": "A"}, {"role": "user", "content": "Q"}],
          "system": "B", "chosen": "So.", "rejected": "No."}, "is not the system message"),
        ({"chosen": "So.", "rejected": "No."}, "no field 'prompt'"),
    ],
)  # fmt: skip
def test_a_pair_that_can_be_read_in_two_ways_is_refused(record, words):
    with pytest.raises(InputError, match=words):
        formats.chat_pair(Record(record, "f:7"), Letters())


def test_messages_in_two_unicode_forms_are_one_message():
    asked, answers = "\u00e9?", ({"content": c, "role": "assistant"} for c in "xy")
    sides = [[{"role": "user", "content": "e\u0301?"}, answer] for answer in answers]
    record = {"prompt": asked, "chosen": sides[0], "rejected": sides[1]}
    pair = formats.chat_pair(Record(record, "f:7"), Letters())
    assert text_of(pair.chosen).count("?") == 1
    same = {"prompt": "Q", "chosen": "\u00e9", "rejected": "e\u0301"}
    _, found = encode(same, "chat_preference")
    assert found.left_out == {"no_preference": 1}


@pytest.mark.parametrize("off", [0, False, 0.0])
@pytest.mark.parametrize(
    "key", ["weight", "train", "training", "trainable", "loss", "loss_weight"]
)
def test_a_turn_of_weight_0_is_read_and_not_trained_on(key, off):
    talk = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "WRONG", key: off},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "right", key: 1},
    ]
    examples, _ = encode({"messages": talk}, "chat")
    assert "WRONG" in text_of(examples.tokens)
    assert text_of(examples.tokens[examples.loss_mask]) == "right\n"
    with pytest.raises(InputError, match="no message of the assistant"):
        encode({"messages": talk[:2]}, "chat")
    with pytest.raises(InputError, match=r"messages\[1\]: a weight of 0.5"):
        encode({"messages": [talk[0], talk[1] | {key: 0.5}]}, "chat")


@hypothesis.given(
    value=st.booleans() | st.integers(-1, 1) | WORD,
    key=st.sampled_from(["mask", "end_turn", "prefix", "name", "is_safe"]),
    name=st.sampled_from(sorted(NEEDED)),
)
def test_a_value_of_any_type_counts_as_a_value(value, key, name):
    record = dict.fromkeys(NEEDED[name][0], "said so") | {key: value}
    if name == "chat":
        answer = {"role": "assistant", "content": "A", key: value}
        record = {"messages": [{"role": "user", "content": "Q"}, answer], key: value}
    if name == "chat_preference":
        record["rejected"] = "otherwise"
    _, found = encode(record, name, preference_side="both")
    wanted = {key: 1} | ({f"messages.{key}": 1} if name == "chat" else {})
    assert found.unread == wanted


def test_pairs_of_equal_answers_are_left_out_wherever_pairs_are_read(tmp_path):
    sources = {}
    for name in ("trained", "measured"):
        file = tmp_path / f"{name}.jsonl"
        lines = [
            {
                "prompt": f"{name} {n}",
                "chosen": "yes",
                "rejected": ["no", "yes "][n % 3 == 0],
            }
            for n in range(12)
        ]
        file.write_text("\n".join(map(json.dumps, lines)))
        sources[name] = config_lib.source(path=str(file), format="chat_preference")
    config = config_lib.default()
    config.sources.dpo, config.eval.pairs.all = sources.values()
    config.objective.kind, config.data.overlong = "preference", "truncate"
    config.data.row_length, config.data.batch_size = 64, 2
    config.train.num_steps = 1
    data = pipeline_lib.load(config, Letters())
    assert data.report[0]["left_out"] == {"no_preference": 4}
    assert len(data.packed[0].source.examples) == 2 * 8
    assert len(data.pairs["all"].source.examples) == 2 * 8


def test_a_measured_pair_beyond_the_context_is_left_out_and_named(tmp_path, caplog):
    file = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": "long " * (30 if n == 2 else 1), "chosen": "yes", "rejected": "no"}
        for n in range(4)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = config_lib.default()
    config.job, config.data.row_length = "evaluate", 8
    config.eval.pairs.all = config_lib.source(path=str(file), format="chat_preference")
    data = pipeline_lib.load(config, Letters(), max_positions=64)
    assert len(data.pairs["all"].source.examples) == 2 * 3
    assert "1 of 4 items are longer than the model's context of 64" in caplog.text
    assert f"such as {file}:3" in caplog.text
    with pytest.raises(InputError, match=r"pairs.jsonl:3: has \d+ tokens, the model's"):
        pipeline_lib.load(config, Letters(), max_positions=8)


class Refusing(Letters):
    """Its template refuses what begins with an exclamation mark."""

    def encode_chat(self, messages, add_generation_prompt=False):
        if messages[0]["content"].startswith("!"):
            raise InputError("chat template: no")
        return super().encode_chat(messages, add_generation_prompt)


@pytest.mark.parametrize("holdout", [0, 4])
@pytest.mark.parametrize("name", ["chat", "chat_preference"])
def test_skip_leaves_out_what_the_template_refuses(tmp_path, name, holdout):
    file = tmp_path / "records.jsonl"
    answers = {"response": "A", "chosen": "A", "rejected": "B"}
    lines = [{"prompt": f"{'!' * (n % 3 == 0)}Q{n}"} | answers for n in range(12)]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = config_lib.default()
    config.sources.x = config_lib.source(path=str(file), format=name, holdout=holdout)
    config.objective.kind = "tokens" if name == "chat" else "preference"
    config.data.overlong = "truncate"
    config.data.row_length, config.data.batch_size = 64, 2
    config.train.num_steps = 1
    with pytest.raises(InputError, match=r"records.jsonl:\d+: chat template: no"):
        pipeline_lib.load(config, Refusing())
    config.sources.x.on_bad_record = "skip"
    data = pipeline_lib.load(config, Refusing())
    examples = [data.packed[0].source.examples]
    examples += [rows.source.examples for rows in (data.texts | data.pairs).values()]
    assert sum(map(len, examples)) == 8 * (1 if name == "chat" else 2)
    assert "!" not in "".join(text_of(part.tokens) for part in examples)
    left_out = data.report[0]["left_out"].get("bad_record", 0)
    assert left_out == 4 if not holdout else left_out <= 4


GOOD = {"question": "Is it?", "choices": ["yes", "no"], "answer": 0}
ANSWERS = st.one_of(
    st.integers(-2, 3),
    st.booleans(),
    st.floats(0, 1),
    st.sampled_from("AB01"),
    st.none(),
)
CHOICES = st.lists(
    st.sampled_from(["yes", "yes ", "no", " ", "", "\ud800", 3]), max_size=3
)


@hypothesis.given(
    question=st.sampled_from(["Is it?", " ", "\udc00", None]), choices=CHOICES,
    answer=ANSWERS, blank=st.booleans(), name=st.sampled_from(["e.jsonl", "e.json"]),
)  # fmt: skip
def test_an_exam_is_the_same_to_a_run_and_to_evaluate(
    tmp_path_factory, question, choices, answer, blank, name
):
    file = tmp_path_factory.getbasetemp() / name
    line = {"question": question, "choices": choices, "answer": answer}
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(line)}\n" + "\n" * blank)
    verdicts = []
    for read in (exams.read, lambda path: tasks.read(f"e:choice={path}").records):
        try:
            verdicts.append(len(read(str(file))))
        except InputError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]
    is_sound = (
        question == "Is it?"
        and len(choices) > 1
        and all(isinstance(c, str) and c.strip() and c.isascii() for c in choices)
        and type(answer) is int
        and 0 <= answer < len(choices)
        and [c.strip() for c in choices].count(choices[answer].strip()) == 1
    )
    if is_sound:
        assert verdicts[0] == 2
    else:
        assert verdicts[0].startswith(f"{file}:2: ")


class Lacking(Letters):
    """Has no token for two characters, and knows a special one."""

    special_tokens = frozenset({"<end>"})

    def loses(self, character):
        return character in "好é"


@hypothesis.given(
    texts=st.lists(
        st.lists(st.sampled_from(["a", "好", "é", "<end>", "</s>", "<b>"]), min_size=1),
        min_size=1,
    )
)
def test_what_a_vocabulary_makes_of_texts_is_counted(texts):
    documents = [
        Record({"text": " ".join(parts)}, f"f:{n}") for n, parts in enumerate(texts)
    ]
    found = tally.Tally()
    formats.encode(documents, "document", Lacking(), tally=found)
    parts = list(itertools.chain(*texts))
    lost = {c: n for c in "好é" if (n := parts.count(c))}
    spelt = {s: n for s in ("<end>", "</s>") if (n := parts.count(s))}
    assert found.counts()["lost"] == lost
    assert found.counts()["spelt"] == spelt


@pytest.mark.parametrize("format", ["document", "chat", "instruction"])
@pytest.mark.parametrize("rule", ["split", "truncate", "drop"])
def test_what_is_longer_than_a_row_is_reported_with_a_count(format, rule, tmp_path):
    """Of documents, which are made to be split, only where something is taken away."""
    is_text = format == "document"
    answers = ["a", "b" * 40, "c", "d" * 99]
    records = [
        {"text": a} if is_text else {"prompt": "q", "response": a} for a in answers
    ]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(file), format=format)
    config.data.row_length, config.data.batch_size = 32, 1
    config.data.overlong, config.train.num_steps = rule, 1
    [row] = pipeline_lib.load(config, Letters()).report
    name = {"split": "split", "truncate": "truncated", "drop": "dropped"}[rule]
    is_reported = (format, rule) != ("document", "split")
    lines = [f"samples longer than a row: {name} (2)"] if is_reported else []
    assert [line for line in tally.lines(row) if "longer" in line] == lines
    assert row[name] == 2


def test_of_many_characters_that_are_lost_each_is_counted():
    """Also those counted as others, however the texts are cut into records."""

    class Latin(Letters):
        def loses(self, character):
            return character > "\xff"

    lost = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    for texts in ([lost * 2], [lost, lost], [*lost, *lost]):
        found = tally.Tally()
        for number, text in enumerate(texts):
            found.see(f"a{text}", f"f:{number}", Latin())
        assert sum(found.lost.values()) == 600
        assert len(found.lost) <= 101


@pytest.mark.parametrize(
    "special",
    ["<end>", "PAD", "[END OF TEXT]", "### User", "[/INST]", "<|a b|>", "</s>"],
)
def test_a_special_token_of_any_form_is_counted_where_a_text_spells_it(special):
    class Vocabulary(Letters):
        special_tokens = frozenset({"<end>", special, " ", f"{special}{special}"})

    found = tally.Tally()
    found.see(f"a {special} b{special}, <b> [c] x", "f:1", Vocabulary())
    assert found.spelt == {special: 2}


def test_fields_that_are_not_read_are_reported_with_a_count(tmp_path):
    file = tmp_path / "texts.jsonl"
    lines = [
        {"text": f"t{n}", "url": "u", "title": None if n else "T"} for n in range(9)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    config = config_lib.default()
    config.sources.domain = config_lib.source(path=str(file))
    config.data.row_length, config.data.batch_size = 8, 1
    config.train.num_steps = 1
    [row] = pipeline_lib.load(config, Letters()).report
    assert row["unread"] == {"url": 9, "title": 1}
    assert tally.lines(row) == ["fields that are not read: url (9), title (1)"]
