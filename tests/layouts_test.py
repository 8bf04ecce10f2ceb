"""Records of one content in the layouts that data sets share are one text."""

import json

import fields_test
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import formats, layouts, readers, sources
from mixcpt_jax.data.sources import Record

ASKED, ANSWERED, WORSE, SYSTEM = "Why is it so?", "Because of that.", "No.", "Be brief."
MESSAGES = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "They."},
    {"role": "user", "content": ASKED},
    {"role": "assistant", "content": ANSWERED},
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
SHARED = [{"from": NAMES[m["role"]], "value": m["content"]} for m in MESSAGES]
COLUMNS = {key: [turn[key] for turn in SHARED] for key in ("from", "value")}
PARTS = [
    message | {"content": [{"type": "text", "text": message["content"], "image": None}]}
    for message in MESSAGES
]
PAST = {"system": SYSTEM, "history": [["Who?", "They."]]}
DIALOGUES = {
    "messages": {"messages": MESSAGES},
    "messages of parts": {"messages": PARTS},
    "developer": {"messages": [{"role": "developer", "content": SYSTEM}, *MESSAGES[1:]]},
    "ShareGPT": {"conversations": SHARED},
    "ShareGPT beside a system message": {"conversations": SHARED[1:], "system": SYSTEM},
    "ShareGPT in columns": {"conversations": COLUMNS},
    "conversation": {"conversation": MESSAGES},
    "alpaca": {"instruction": ASKED, "input": "", "output": ANSWERED} | PAST,
    "Dolly": {"instruction": ASKED, "context": "", "response": ANSWERED} | PAST,
    "OpenOrca": {
        "system_prompt": SYSTEM, "question": ASKED, "response": ANSWERED,
        "history": PAST["history"],
    },
    "question and answer": {"question": ASKED, "answer": ANSWERED} | PAST,
    "query and response": {"query": ASKED, "response": ANSWERED} | PAST,
    "problem and solution": {"problem": ASKED, "solution": ANSWERED} | PAST,
    "prompt and completion": {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
    "the same text twice": {"problem": ASKED, "solution": ANSWERED, "messages": MESSAGES},
    "nested": {"data": {"turns": SHARED}},
}  # fmt: skip
TRANSCRIPT = "\n\nHuman: Who?\n\nAssistant: They.\n\nHuman: Why is it so?\n\nAssistant:"
BEFORE, SAID = MESSAGES[1:-1], {"role": "assistant"}
BEST, WORST = SAID | {"content": ANSWERED}, SAID | {"content": WORSE}
PAIRS = {
    "UltraFeedback": {
        "prompt": ASKED, "chosen": [*BEFORE, BEST], "rejected": [*BEFORE, WORST],
        "messages": [*BEFORE, BEST], "score_chosen": 8.0,
    },
    "HH": {"chosen": f"{TRANSCRIPT} {ANSWERED}", "rejected": f"{TRANSCRIPT} {WORSE}"},
    "HH with a prompt": {"prompt": TRANSCRIPT, "chosen": ANSWERED, "rejected": WORSE},
    "ShareGPT": {
        "conversations": SHARED[1:-1],
        "chosen": {"from": "gpt", "value": ANSWERED},
        "rejected": {"from": "gpt", "value": WORSE},
    },
    "question": {"question": ASKED, "chosen": ANSWERED, "rejected": WORSE,
                 "history": PAST["history"]},
    "instruction": {"instruction": ASKED, "chosen": ANSWERED, "rejected": WORSE,
                    "history": PAST["history"]},
}  # fmt: skip


def text(record, name, **settings):
    examples, found = fields_test.encode(record, name, **settings)
    return fields_test.text_of(examples.tokens), found


@pytest.mark.parametrize("name", ["chat", "instruction"])
@pytest.mark.parametrize("layout", DIALOGUES)
def test_a_dialogue_is_the_same_in_every_layout(layout, name):
    record = DIALOGUES[layout]
    fields = {"messages": "data.turns"} if layout == "nested" else {}
    expected, _ = text(DIALOGUES["messages"], name)
    found, counted = text(record, name, fields=fields)
    assert found == expected
    assert not counted.unread
    assert sum(counted.layouts.values()) == (layout != "nested")
    passages = formats.passages(Record(record, "f:1"), name, fields)
    assert passages == formats.passages(Record({"messages": MESSAGES}, "f:1"), "chat")


@pytest.mark.parametrize("name", ["chat_preference", "preference"])
@pytest.mark.parametrize("layout", PAIRS)
def test_a_pair_is_the_same_in_every_layout(layout, name):
    settings = {"preference_side": "both"}
    plain = {"prompt": ASKED, "chosen": ANSWERED, "rejected": WORSE} | {
        "history": PAST["history"]
    }
    expected, _ = text(plain, name, **settings)
    found, counted = text(PAIRS[layout], name, **settings)
    assert found == expected
    assert sum(counted.layouts.values()) == 1


def test_a_preference_may_be_whole_conversations():
    found, _ = text(PAIRS["HH"], "preference", preference_side="rejected")
    assert found.rstrip("\U0010ffff") == f"Who?\n\nThey.\n\n{ASKED}\n\n{WORSE}"


@pytest.mark.parametrize(
    ("name", "record", "choice", "word"),
    [
        ("chat", {"messages": MESSAGES, "conversations": [
            {"from": "human", "value": "Other?"}, {"from": "gpt", "value": "Yes."}]},
         {"messages": "conversations"}, "Other?"),
        ("chat", {"messages": MESSAGES, "instruction": "Add.", "output": "Done."},
         {"instruction": "instruction"}, "Done."),
        ("instruction", {"question": "Q?", "answer": "Short.", "response": "Long."},
         {"response": "answer"}, "Short."),
        ("chat_preference", {"prompt": "One?", "question": "Two?", "chosen": "A",
                             "rejected": "B"}, {"prompt": "question"}, "Two?"),
        ("document", {"content": "one", "body": "two"}, {"text": "body"}, "two"),
    ],
)  # fmt: skip
def test_a_record_of_two_layouts_is_refused_until_fields_decides(
    name, record, choice, word
):
    with pytest.raises(InputError) as error:
        text(record, name)
    line = str(error.value)
    assert line.startswith("f:7: can be read as ")
    assert " or " in line
    assert "--config.sources.NAME.fields=" in line
    assert "\n" not in line
    found, _ = text(record, name, fields=choice)
    assert word in found


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_each_layout_is_said_with_its_fields(name):
    for layout in layouts.LAYOUTS[name]:
        record = {theirs: "text" for theirs in layout.fields.values()}
        if "messages" in layout.fields:
            record[layout.fields["messages"]] = MESSAGES
        _, said = layouts.recognise(record, name, {}, "f:1")
        assert said.startswith(f"{layout.name} (")
        assert all(theirs in said for theirs in layout.fields.values())
        if "chosen" not in record:
            _, counted = text(record, name)
            assert counted.lines(["layouts"]) == [f"read as {said} (1), such as f:7"]


@pytest.mark.parametrize(
    "fields", [{"output": "a"}, {"prompt": "q"}, {"messages": "m"}]
)
@pytest.mark.parametrize("record", [{}, {"text": "x"}, {"messages": None}])
def test_a_record_without_the_fields_that_are_named_is_refused(record, fields):
    for name in ("chat", "instruction"):
        with pytest.raises(InputError, match="f:7: no field '"):
            text(record, name, fields=fields)


def test_a_record_of_another_format_is_named():
    with pytest.raises(InputError, match="fields of ShareGPT, which format='instruct"):
        text({"conversations": SHARED}, "document")
    with pytest.raises(
        InputError, match="which format='preference' and format='chat_p"
    ):
        text(PAIRS["HH"], "document")


def test_an_array_of_json_is_read_one_object_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BUFFER_BYTES", 64)
    records = [{"text": "é" * n, "n": [n]} for n in range(40)]
    file = tmp_path / "a.json"
    for indent in (None, 2):
        file.write_text(f" {json.dumps(records, ensure_ascii=False, indent=indent)}\n")
        found = list(sources.read(str(file)))
        assert [record.fields for record in found] == records
        assert found[1].place == f"{file}: value 2"
    file.write_text("\n".join(map(json.dumps, records)))
    assert len(list(sources.read(str(file)))) == 40


def test_a_damaged_array_of_json_is_read_up_to_the_damage(tmp_path):
    file = tmp_path / "a.json"
    for content, number, words in (
        ('[{"a": 1}, {"a": 2}, {"a"', 2, "value 3 is not JSON"),
        ('[{"a": 1}, 5, {"a": 2}]', 2, "value 2: a JSON int, must be an object"),
        ("[]", 0, "has no records"),
        ("nothing", 0, "a.json:1: not JSON"),
    ):
        file.write_text(content)
        problems = []
        assert len(list(sources.read(str(file), on_bad=problems.append))) == number
        assert words in str(problems[0])
    (tmp_path / "b.txt").write_text("text")
    assert [r.fields["text"] for r in sources.read(str(tmp_path))] == ["text"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_nested_columns_are_read_from_files(tmp_path, kind):
    records = [
        DIALOGUES[name] for name in ("ShareGPT", "nested", "ShareGPT in columns")
    ]
    file = tmp_path / f"a.{kind}"
    for record, fields in zip(records, ({}, {"messages": "data.turns"}, {})):
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist([record]), file)
        else:
            file.write_text(json.dumps(record))
        [read] = sources.read(str(file))
        found, _ = text(read.fields, "chat", fields=fields)
        assert found == text(DIALOGUES["messages"], "chat")[0]


def test_what_lies_beside_a_nested_field_is_counted():
    record = {"data": {"body": "one", "title": "two"}}
    found, counted = text(record, "document", fields={"text": "data.body"})
    assert found == "one\U0010ffff"
    assert counted.unread == {"data": 1}
