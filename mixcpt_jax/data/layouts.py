"""Recognises which fields of a record hold its texts, in the layouts that data sets share.

A layout is a field map with a name. A format reads a record by the one layout whose fields
the record has; a second layout that holds other text makes it ambiguous. The setting
`fields` of a source decides instead wherever it names a field.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mixcpt_jax.core.errors import InputError


class Layout(NamedTuple):
    """A field map.

    Attributes:
      name: for the table of sources.
      fields: our field -> the record's, all of which a record of this layout has.
      also: the same for fields that a record may have.
    """

    name: str
    fields: Mapping[str, str]
    also: Mapping[str, str] = {}


_DOCUMENTS = tuple(
    Layout(name, {"text": name})
    for name in ("content", "body", "document", "article", "markdown")
)
_DIALOGUES = (
    Layout("messages", {"messages": "messages"}),
    Layout("ShareGPT", {"messages": "conversations"}),
    Layout("conversation", {"messages": "conversation"}),
    Layout("alpaca", {"instruction": "instruction", "output": "output"}),
    Layout(
        "Dolly",
        {"instruction": "instruction", "output": "response"},
        {"input": "context"},
    ),
    Layout("prompt and response", {"prompt": "prompt", "response": "response"}),
    Layout("prompt and completion", {"prompt": "prompt", "response": "completion"}),
    Layout(
        "OpenOrca",
        {"prompt": "question", "response": "response"},
        {"system": "system_prompt"},
    ),
    Layout("question and answer", {"prompt": "question", "response": "answer"}),
    Layout("query and response", {"prompt": "query", "response": "response"}),
    Layout("problem and solution", {"prompt": "problem", "response": "solution"}),
)
_ANSWERS = {"chosen": "chosen", "rejected": "rejected"}
_PAIRS = (
    Layout("preference pairs", {"prompt": "prompt"} | _ANSWERS),
    Layout("preference pairs", {"prompt": "question"} | _ANSWERS),
    Layout("preference pairs", {"prompt": "instruction"} | _ANSWERS),
    Layout("ShareGPT pairs", {"prompt": "conversations"} | _ANSWERS),
    Layout("pairs of conversations", _ANSWERS),
)
# Format -> its layouts; the first of several with the same text counts.
LAYOUTS = {
    "document": _DOCUMENTS,
    "instruction": _DIALOGUES,
    "chat": _DIALOGUES,
    "preference": _PAIRS,
    "chat_preference": _PAIRS,
}
# A dialogue has one of these.
_QUESTIONS = {"messages", "instruction", "prompt"}
# Types of the fields that may hold messages.
_KINDS = {
    "messages": (list, dict),
    **dict.fromkeys(("prompt", "response", "chosen", "rejected"), (str, list, dict)),
}
# Keys of a message, and the roles that have other names elsewhere.
MESSAGE_KEYS = (("role", "content"), ("from", "value"))
ROLE_OF = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "developer": "system",
}
# The turns of a conversation written as one text, as in HH-RLHF.
_IS_TRANSCRIPT = re.compile(r"\s*Human:.*?\n\nAssistant:", re.DOTALL)
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")


def recognise(
    values: Mapping[str, Any],
    format: str,
    fields: Mapping[str, str],
    place: str,
) -> tuple[dict[str, str | None], str]:
    """Our field -> the record's, and what was recognised, as text.

    Args:
      values: the fields of a record.
      format: that will read it.
      fields: the map in the config, which decides for the fields that it names.
      place: where the record is from.

    Returns:
      The map; None stands for a field that another layout would use. If no layout fits,
      `fields` and ''.

    Raises:
      InputError: two layouts fit, and each has text that the other lacks.
    """
    if format == "document" and fields.get("text", "text") in values:
        return dict(fields), ""
    layouts = LAYOUTS.get(format, ())
    needed = {ours for layout in layouts for ours in layout.fields}
    decided = {ours: theirs for ours, theirs in fields.items() if ours in needed}
    fit = [
        layout
        for layout in layouts
        if decided.items() <= layout.fields.items() and _fits(layout, values)
    ]
    fit = _without_copies(fit, values)
    if len(fit) > 1:
        choices = " or ".join(
            f"{layout.name} ({_said(layout.fields)})" for layout in fit
        )
        raise InputError(
            f"{place}: can be read as {choices}; choose one by "
            f'--config.sources.NAME.fields="{dict(fit[0].fields)}"'
        )
    # The formats of dialogues prefer messages to a question, whatever the layout.
    used = (fit[0].fields if fit else decided).keys()
    is_dialogue = layouts is _DIALOGUES and not used.isdisjoint(_QUESTIONS)
    others = dict.fromkeys(_QUESTIONS - used if is_dialogue else ())
    if not fit:
        return others | dict(fields), ""
    [layout] = fit
    also = {
        ours: theirs
        for ours, theirs in layout.also.items()
        if theirs in values and ours not in values
    }
    names = layout.fields | also | dict(fields)
    return others | names, f"{layout.name} ({_said(names)})"


def other_formats(values: Mapping[str, Any], format: str) -> str:
    """The formats of another kind that can read a record, as a hint, or ''."""
    for plain, chat in (("preference", "chat_preference"), ("instruction", "chat")):
        fit = [layout for layout in LAYOUTS[chat] if _fits(layout, values)]
        if fit and format not in (plain, chat):
            return (
                f"it has the fields of {fit[0].name}, which format={plain!r} and "
                f"format={chat!r} read"
            )
    return ""


def transcript(text: str) -> list[dict[str, str]] | None:
    """The messages of a text such as "Human: Why?\\n\\nAssistant: So.", None of others.

    An assistant's last turn without text, which a prompt may end with, is left out.
    """
    if not _IS_TRANSCRIPT.match(text):
        return None
    _, *pieces = _TURN.split(text)
    messages = [
        {"role": "user" if role == "Human" else "assistant", "content": content.strip()}
        for role, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def keys_of(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a message's role and content; None if it has none of the usual."""
    return next((keys for keys in MESSAGE_KEYS if set(keys) <= message.keys()), None)


def content(message: Any) -> Any:
    """The content of a message, or the value itself if it is no object."""
    if not isinstance(message, dict):
        return message
    _, key = keys_of(message) or MESSAGE_KEYS[0]
    return message.get(key)


def role(name: Any) -> Any:
    """The role by its usual name."""
    return ROLE_OF.get(name, name) if isinstance(name, str) else name


def _fits(layout: Layout, values: Mapping[str, Any]) -> bool:
    for ours, theirs in layout.fields.items():
        value = values.get(theirs)
        if not isinstance(value, _KINDS.get(ours, str)) or not any(_leaves(value)):
            return False
    return True


def _without_copies(layouts: list[Layout], values: Mapping[str, Any]) -> list[Layout]:
    """Leaves out layouts whose texts another one has, the first if they have the same."""
    texts = [
        {leaf for name in layout.fields.values() for leaf in _leaves(values[name])}
        for layout in layouts
    ]
    return [
        layout
        for number, layout in enumerate(layouts)
        if not any(
            texts[number] < other or (texts[number] == other and earlier < number)
            for earlier, other in enumerate(texts)
        )
    ]


def _leaves(value: Any) -> Iterator[str]:
    """The texts in a value, without surrounding blanks; those with content."""
    if isinstance(value, str):
        yield from filter(None, [value.strip()])
    elif isinstance(value, (list, dict)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _leaves(entry)


def _said(names: Mapping[str, str]) -> str:
    return ", ".join(
        ours if ours == theirs else f"{ours}={theirs}" for ours, theirs in names.items()
    )
