"""Reads the fields of a record in its format, and notes what else it holds.

Each function takes a `Reading` of one record and returns the texts or messages of one
format. A reading remembers which fields were read. Other fields that are in `REFUSED` raise
an error, because ignoring them would change the meaning of the text; the rest are `unread`,
and the source reports their count.
"""

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import layouts, readers
from mixcpt_jax.data.readers import Record

_INSTRUCTION = (
    "instruction", "input", "output", "prompt", "response", "system", "history",
)  # fmt: skip
_PREFERENCE = ("prompt", "chosen", "rejected", "system", "history")
# Format -> the fields that it reads, by these names or those that `fields` maps them to.
FIELDS = {
    "document": ("text",),
    "instruction": ("messages", *_INSTRUCTION),
    "preference": _PREFERENCE,
    "cloze": ("context", "target"),
    "chat": ("messages", *_INSTRUCTION),
    "chat_preference": _PREFERENCE,
}
ROLES = ("system", "user", "assistant")
PREFERENCE_SIDES = ("chosen", "rejected", "both")
# Between a question and its answer, as between two paragraphs.
SEPARATOR = "\n\n"

_NO_TEXT = "only text is trained on; drop the record"
_NO_TOOLS = "write it into the content as text, or drop the record"
_NO_THOUGHTS = (
    "write it into the content as the model should write it, or drop the field"
)
# Field of a record or key of a message -> the remedy if it is not empty. Ignoring it would
# change the meaning of the text.
REFUSED = {
    "tools": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "reasoning_content": _NO_THOUGHTS,
    "reasoning": _NO_THOUGHTS,
    "thinking": _NO_THOUGHTS,
    "refusal": "make it the content, or drop the record",
    "image": _NO_TEXT,
    "images": _NO_TEXT,
    "audio": _NO_TEXT,
    "audios": _NO_TEXT,
    "video": _NO_TEXT,
    "videos": _NO_TEXT,
    "chat_template_kwargs": "name a template that needs none (model.chat_template)",
    "train_detail": "give whole turns a `weight` of 0 or 1",
    "training_detail": "give whole turns a `weight` of 0 or 1",
}
# Formats in which these fields are refused; in others they are unread.
_DIALOGUES = ("instruction", "preference", "chat", "chat_preference")
# Of these, the formats that write plain text, in which every token has a loss.
_PLAIN = ("instruction", "preference")
# Keys of a message that say whether its tokens are loss tokens: not with 0 or false.
_WEIGHTS = (
    "weight", "train", "training", "trainable", "loss", "loss_weight",
)  # fmt: skip
# Types of the parts of a content that hold `text`.
_TEXT_PARTS = ("text", "input_text", "output_text")
# An id is not content; `selection` is what the job "select" wrote about the record.
_SILENT = ("id", "selection")

Message = dict[str, Any]


class Reading:
    """The fields of a record by our names, and which of them were read.

    Attributes:
      place: where the record is from.
      layout: the layout that was recognised, as text, or ''.
    """

    def __init__(
        self,
        record: Record,
        fields: Mapping[str, str] | None = None,
        format: str = "",
    ):
        """Recognises the layout of the record, see `layouts.recognise`.

        Args:
          record: to read.
          fields: our field -> the source's name for it, where they differ; "a.b" is the
            value `b` in the object `a`. Under the name of a reader, such a map is for its
            records only. Files that are one text have no fields to map.
          format: that will read it; '': no layout is recognised.

        Raises:
          InputError: the layout is ambiguous.
        """
        self.place = record.place
        self._format = format
        named = _of_kind(fields or {}, record.kind)
        self._values = _unnested(record.fields, named.values())
        self._names, self.layout = layouts.recognise(
            self._values, format, named, record.place
        )
        self._read: set[str] = set()
        self._in_messages: set[str] = set()

    def name(self, field: str) -> str | None:
        """The source's name of a field; None if the layout has no such field."""
        return self._names.get(field, field)

    def has(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(self.name(field)) is not None

    def get(self, field: str) -> Any:
        """The value of a field, None if it is not there."""
        self._read.add(self.name(field))
        return self._values.get(self.name(field))

    def text(self, field: str, also: str = "") -> str:
        """A field that must be a string and not blank.

        Raises:
          InputError: it is missing, not a string, or blank.
        """
        name = self.name(field)
        if name not in self._values:
            hint = layouts.other_formats(self._values, self._format)
            raise InputError(
                f"{self.place}: no field {name or field!r} (found: {self.found()}"
                f"{hint and f'; {hint}'}); map it, as in "
                "--config.sources.NAME.fields=\"{'text': 'body'}\""
            )
        value = self.get(field)
        check_text(value, f"field {name!r}", self.place, also=also)
        return value

    def optional_text(self, field: str) -> str:
        """An optional field; '' if it is missing, null or blank."""
        if not self.has(field):
            return ""
        value = self.get(field)
        check_text(value, f"field {self.name(field)!r}", self.place, may_be_blank=True)
        return value if value.strip() else ""

    def found(self) -> str:
        """The names of the record's fields, for an error."""
        return ", ".join(sorted(self._values)) or "none"

    def fail(self, problem: str) -> InputError:
        return InputError(f"{self.place}: {problem}")

    def messages(self, field: str) -> list[Message]:
        """A field that is a list of messages, one message, or an object of columns.

        Returns:
          One dict per message: `role` and `content`; `weight` 0 if the message has no
          loss; `parts` if `content` is joined from parts.

        Raises:
          InputError: it is not a list of messages, or a message has a key that is
            `REFUSED`.
        """
        name, value = self.name(field), self.get(field)
        if isinstance(value, dict):
            value = _rows(value)
        if not isinstance(value, list) or not value:
            found = "empty" if value == [] else f"of type {type(value).__name__}"
            raise self.fail(
                f"field {name!r} is {found}, must be a list of "
                '{"role": ..., "content": ...}'
            )
        return [self._message(m, f"{name}[{i}]") for i, m in enumerate(value)]

    def _message(self, message: Any, where: str) -> Message:
        keys = layouts.keys_of(message) if isinstance(message, dict) else None
        if keys is None:
            found = (
                f"has the keys {sorted(message)}"
                if isinstance(message, dict)
                else f"is of type {type(message).__name__}"
            )
            raise self.fail(f"{where} {found}, must be an object with role and content")
        self._refuse(message, f"{where}.")
        given, content, said = message[keys[0]], message[keys[1]], {}
        role = layouts.role(given)
        if role not in ROLES:
            raise self.fail(f"{where}.{keys[0]} is {given!r}; use one of {list(ROLES)}")
        if isinstance(content, list):
            said["parts"] = self._parts(content, f"{where}.{keys[1]}")
            content = "\n".join(said["parts"])
        check_text(content, f"{where}.{keys[1]}", self.place, role == "system")
        others = message.keys() - {*keys, *_WEIGHTS, *_SILENT}
        self._note(message, others)
        if not self._is_trained(message, where):
            said["weight"] = 0
            if self._format in _PLAIN:
                self._in_messages.add("messages.weight")
        return {"role": role, "content": content} | said

    def _parts(self, parts: list, where: str) -> list[str]:
        """The text parts of a content in OpenAI's form."""
        texts = []
        for number, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind not in _TEXT_PARTS:
                raise self.fail(
                    f"{where}[{number}] is a part of type {kind!r}, must be 'text'; "
                    f"{_NO_TEXT}"
                )
            text = part.get("text")
            check_text(text, f"{where}[{number}].text", self.place, may_be_blank=True)
            self._note(part, part.keys() - {"type", "text"}, "content.")
            texts.append(text)
        return texts

    def _is_trained(self, message: Mapping[str, Any], where: str) -> bool:
        given = [message[key] for key in _WEIGHTS if message.get(key) is not None]
        for value in given:
            if not isinstance(value, (bool, int, float)) or value not in (0, 1):
                raise self.fail(
                    f"{where}: a weight of {value!r}, must be 0 or 1 (for other weights "
                    "make a source of its own, with sources.NAME.weight)"
                )
        return all(given)

    def _note(self, values: Mapping[str, Any], keys, prefix: str = "") -> None:
        self._in_messages |= {
            f"messages.{prefix}{key}" for key in keys if not _is_empty(values[key])
        }

    def _refuse(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Raises InputError if one of the unread values is `REFUSED`."""
        for key, remedy in REFUSED.items():
            is_read = not prefix and key in self._read
            value = values.get(key)
            if not is_read and value is not False and not _is_empty(value):
                raise self.fail(f"{prefix}{key} is not written into the text; {remedy}")

    def unread(self, format: str, texts: list[str]) -> list[str]:
        """The names of the fields that were not read; call this last.

        Omits fields that are empty, fields that are ids, and fields whose value the texts
        contain anyway.

        Args:
          format: of the record.
          texts: what was read.

        Raises:
          InputError: one of them is `REFUSED`.
        """
        if format in _DIALOGUES:
            self._refuse(self._values)
            if not self._is_desired():
                raise self.fail(
                    "label is false: the answer is undesired; drop the record"
                )
            weight = self._values.get("weight")
            if "weight" not in self._read and weight is not None and weight != 1:
                raise self.fail(
                    f"weight is {weight!r}: records of one source have equal weight; drop "
                    "the field, or make a source of the records of this weight"
                )
        said = {text.strip() for text in texts}
        others = self._values.keys() - self._read - set(_SILENT)
        names = [
            str(name)
            for name in others
            if not _is_empty(value := self._values[name])
            and not (isinstance(value, str) and value.strip() in said)
        ]
        return sorted(names) + sorted(self._in_messages)

    def _is_desired(self) -> bool:
        """TRL marks undesired answers by a label of false."""
        return "label" in self._read or self._values.get("label") is not False


def document(reading: Reading) -> list[str]:
    """The text."""
    return [reading.text("text")]


def cloze(reading: Reading) -> list[str]:
    """The context and the target."""
    return [reading.text(name) for name in FIELDS["cloze"]]


def preference(reading: Reading, side: str) -> tuple[list[Message], list[str]]:
    """The messages before an answer, and the answers of a side, as plain texts."""
    sides = PREFERENCE_SIDES[:2] if side == "both" else (side,)
    if _has_messages(reading):
        prompt, *answers = pair(reading)
        texts = [SEPARATOR.join(m["content"] for m in answer) for answer in answers]
        said = dict(zip(PREFERENCE_SIDES, texts, strict=False))
        return prompt, [said[name] for name in sides]
    prompt = reading.text("prompt")
    answers = [reading.text(name) for name in sides]
    # The other side is left out on purpose, so do not report it as unread.
    others = [reading.get(name) for name in PREFERENCE_SIDES[:2]]
    _check_apart(reading, prompt, others)
    return _before(reading, [{"role": "user", "content": prompt}]), answers


def _has_messages(reading: Reading) -> bool:
    """Whether one of the texts of a pair is a list of messages or a transcript."""
    values = [reading.get(name) for name in ("prompt", *PREFERENCE_SIDES[:2])]
    return any(
        isinstance(value, (list, dict))
        or (isinstance(value, str) and layouts.transcript(value) is not None)
        for value in values
    )


def conversation(reading: Reading) -> list[Message]:
    """The messages of a conversation; the loss is on the assistant's."""
    if not reading.has("messages"):
        return _question_and_answer(reading)
    name = reading.name("messages")
    messages = reading.messages("messages")
    if not any(is_loss_turn(message) for message in messages):
        raise reading.fail(
            f"field {name!r} has no message of the assistant, so it has no loss "
            "tokens; drop the record"
        )
    if not _is_empty(reading.get("history")):
        raise reading.fail(
            f"has both {name!r} and {reading.name('history')!r}; join them into one"
        )
    return _before(reading, messages)


def _question_and_answer(reading: Reading) -> list[Message]:
    """The messages of a record with an instruction or a prompt, and its answer."""
    question, answer, other = "instruction", "output", "response"
    if reading.has("prompt") and not reading.has("instruction"):
        question, answer, other = "prompt", "response", "output"
    elif not reading.has("instruction"):
        names = dict.fromkeys(map(reading.name, ("messages", "instruction", "prompt")))
        *first, last = (repr(name) for name in names if name is not None)
        raise reading.fail(
            f"no field {', '.join(first)}{' or ' if first else ''}{last} (found: "
            f"{reading.found()}); map one, as in "
            "--config.sources.NAME.fields=\"{'prompt': 'question'}\""
        )
    asked = _messages_or_text(reading, question, "user")
    # Many instruction sets have a blank `input` in every record.
    if extra := reading.optional_text("input"):
        last = asked[-1]["content"]
        asked[-1] = {"role": "user", "content": SEPARATOR.join([last, extra])}
    is_other = reading.has(other) and not reading.has(answer)
    answered = _messages_or_text(reading, other if is_other else answer, "assistant")
    if not any(map(is_loss_turn, answered)):
        raise reading.fail(
            f"field {reading.name(answer)!r} has no answer; drop the record"
        )
    return [*_before(reading, asked), *answered]


def prompt(reading: Reading) -> list[Message]:
    """The messages of a conversation to continue, from `messages` or `prompt`."""
    if reading.has("messages"):
        messages = reading.messages("messages")
    else:
        messages = [{"role": "user", "content": reading.text("prompt")}]
    _check_end(reading, "messages", messages, "user")
    return _before(reading, messages)


def is_loss_turn(message: Mapping[str, Any]) -> bool:
    """Whether the message is the assistant's and has a loss."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def pair(reading: Reading) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of a prompt, and those that the chosen and rejected answers add.

    An answer that begins with a message of the user or the system, or with the prompt's own
    messages, is a whole conversation; the prompt in it is not repeated. If `prompt` is
    missing, or is only the last question of two whole conversations, the prompt is their
    common beginning, up to the user's last message in it.

    Raises:
      InputError: the end of the prompt in an answer is not clear, system messages differ,
        or an answer does not end with an assistant's message.
    """
    given = None
    if reading.has("prompt"):
        given = _messages_or_text(reading, "prompt", "user")
    sides = [
        _messages_or_text(reading, side, "assistant") for side in PREFERENCE_SIDES[:2]
    ]
    are_whole = [side[0]["role"] != "assistant" for side in sides]
    systems, turns = zip(*map(_split_system, sides), strict=True)
    shared = _shared_prompt(*turns) if all(are_whole) else []
    if given is None and not shared:
        reading.text("prompt", "a list or ")
        raise reading.fail(
            f"{reading.name('chosen')!r} and {reading.name('rejected')!r} do not begin "
            f"with the same question; give it as {reading.name('prompt')!r}"
        )
    system, prompt = _split_system(_before(reading, given or shared))
    if shared and not _begins_with(shared, prompt) and _ends_with(shared, prompt):
        prompt = shared
    answers = []
    for name, rest, is_whole in zip(PREFERENCE_SIDES, turns, are_whole, strict=False):
        if _begins_with(rest, prompt):
            rest = rest[len(prompt) :]
        elif is_whole or _repeats(rest, prompt):
            raise reading.fail(
                f"field {reading.name(name)!r} has a prompt that differs from "
                f"{reading.name('prompt')!r}; let it begin with the same messages, or give "
                "the answer alone"
            )
        if not any(map(is_loss_turn, rest)):
            raise reading.fail(
                f"field {reading.name(name)!r} has no answer of weight 1 after the "
                "prompt; drop the record"
            )
        answers.append(rest)
    _check_apart(reading, prompt[-1]["content"], [a[0]["content"] for a in answers])
    is_one = (
        system or _content(systems[0]) == _content(systems[1]) or not all(are_whole)
    )
    if not is_one or len({*map(_content, (system, *systems))} - {""}) > 1:
        raise reading.fail("has different system messages; keep one of them")
    return [*(system or systems[0] or systems[1]), *prompt], *answers


def prefers(chosen: list[Message], rejected: list[Message]) -> bool:
    """Whether two answers differ in more than whitespace."""
    return [_key(m) for m in chosen] != [_key(m) for m in rejected]


def _messages_or_text(reading: Reading, field: str, role: str) -> list[Message]:
    """A field that is a list of messages, a transcript, or the text of one message.

    Raises:
      InputError: its last message is not of the role.
    """
    if isinstance(reading.get(field), (list, dict)):
        messages = reading.messages(field)
    else:
        text = reading.text(field, "a list or ")
        messages = layouts.transcript(text) or [{"role": role, "content": text}]
        for message in messages:
            name = f"a turn of field {reading.name(field)!r}"
            check_text(message["content"], name, reading.place)
    _check_end(reading, field, messages, role)
    return messages


def _check_end(
    reading: Reading, field: str, messages: Sequence[Message], role: str
) -> None:
    """Raises InputError if the last message is not of the role."""
    if (last := messages[-1]["role"]) != role:
        raise reading.fail(
            f"field {reading.name(field)!r} ends with a message of role {last!r}; end it "
            f"with the {role}'s"
        )


def _shared_prompt(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The common beginning of two conversations, up to the user's last message in it."""
    same = [a for a, b in zip(chosen, rejected, strict=False) if _key(a) == _key(b)]
    while same and not (
        same[-1]["role"] == "user"
        and _begins_with(chosen, same)
        and _begins_with(rejected, same)
    ):
        same.pop()
    return same


def _begins_with(messages: list[Message], prompt: list[Message]) -> bool:
    return [_key(m) for m in messages[: len(prompt)]] == [_key(m) for m in prompt]


def _ends_with(messages: list[Message], end: list[Message]) -> bool:
    return _begins_with(messages[-len(end) :], end)


def _repeats(answer: list[Message], prompt: list[Message]) -> bool:
    """Whether the answer repeats the last question of the prompt."""
    return _key(prompt[-1]) in map(_key, answer)


def _key(message: Message) -> tuple[str, str]:
    content = unicodedata.normalize("NFC", message["content"])
    return message["role"], " ".join(content.split())


def _content(system: list[Message]) -> str:
    return _key(system[0])[1] if system else ""


def _split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """The system message at the beginning, as a list of one or none, and the rest."""
    has_system = messages[0]["role"] == "system"
    return messages[:has_system], messages[has_system:]


def _check_apart(reading: Reading, prompt: str, answers: list[Any]) -> None:
    """Raises InputError if both answers are strings that begin with the prompt."""
    prompt = prompt.strip()
    if all(
        isinstance(answer, str)
        and answer.strip().startswith(prompt)
        and answer.strip()[len(prompt) :][:1].isspace()
        for answer in answers
    ):
        raise reading.fail(
            "both answers begin with the prompt, which would be written twice; remove it "
            "from them"
        )


def _before(reading: Reading, messages: list[Message]) -> list[Message]:
    """The record's `system` and `history`, then the messages."""
    value = reading.get("history")
    if not _is_empty(value):
        name = reading.name("history")
        if not isinstance(value, list):
            raise reading.fail(
                f"field {name!r} is of type {type(value).__name__}, must be a list of "
                "[question, answer]"
            )
        turns = [_exchange(reading, e, f"{name}[{i}]") for i, e in enumerate(value)]
        messages = [*itertools.chain(*turns), *messages]
    system = reading.optional_text("system")
    if not system:
        return messages
    system = [{"role": "system", "content": system}]
    theirs, others = _split_system(messages)
    if _content(theirs) not in ("", _content(system)):
        raise reading.fail(
            f"field {reading.name('system')!r} is not the system message of its "
            "conversation; keep one of them"
        )
    return [*system, *others]


def _exchange(reading: Reading, value: Any, where: str) -> list[Message]:
    if not isinstance(value, list) or len(value) != 2:
        raise reading.fail(f"{where} is not of the form [question, answer]; correct it")
    for number, text in enumerate(value):
        check_text(text, f"{where}[{number}]", reading.place)
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant"), value, strict=True)
    ]


def _of_kind(fields: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The map of fields for the records of one reader."""
    if kind in readers.TEXTS:
        return {}
    names = {ours: name for ours, name in fields.items() if isinstance(name, str)}
    return names | dict(fields.get(kind, {}))


def _unnested(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Moves values in objects, named such as "a.b", to the top."""
    for name in names:
        outer, _, inner = name.partition(".")
        if name in values or not isinstance(values.get(outer), dict):
            continue
        found = _unnested(values[outer], [inner])
        if inner in found:
            rest = {key: value for key, value in found.items() if key != inner}
            values = values | {outer: rest, name: found[inner]}
    return values


def _rows(value: dict[str, Any]) -> list[Any]:
    """The messages of an object of columns, or the only message."""
    columns = value.values()
    if not columns or not all(isinstance(column, list) for column in columns):
        return [value]
    lengths = set(map(len, columns))
    if len(lengths) > 1:
        return [value]
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _is_empty(value: Any) -> bool:
    """Whether a value has no content, such as null in every row of a table."""
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, (list, dict)):
        entries = value.values() if isinstance(value, dict) else value
        return all(map(_is_empty, entries))
    return value is None


def check_text(
    value: Any, what: str, place: str, may_be_blank: bool = False, also: str = ""
) -> None:
    """Checks that a value is text that can be encoded.

    Raises:
      InputError: it is not a string, has half of a surrogate pair, or is blank where it
        must not be.
    """
    if not isinstance(value, str):
        raise InputError(
            f"{place}: {what} is of type {type(value).__name__}, must be {also}a string"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: {what} has half of a surrogate pair, which is not text; drop the "
            "record"
        ) from None
    if not value.strip() and not may_be_blank:
        raise InputError(f"{place}: {what} is blank; drop the record")
