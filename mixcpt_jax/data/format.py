"""Records to examples: the tokens of a text and which of them are learnt.

Continual pre-training reads everything as plain text: no chat template, no role
names, a loss on every token. Format alignment comes after it and reads conversations,
which the tokenizer's chat template writes and of which the assistant's turns are learnt.
"""

import dataclasses
import functools
import hashlib
import itertools
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixcpt_jax.data.sources import Record
from mixcpt_jax.errors import InputError

FIELDS = {
    "document": ("text",),
    "instruction": ("instruction", "input", "output", "prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
    "cloze": ("context", "target"),
    "chat": ("messages", "instruction", "input", "output", "prompt", "response"),
    "chat_preference": ("prompt", "chosen", "rejected"),
}
ROLES = ("system", "user", "assistant")
PREFERENCE_SIDES = ("chosen", "rejected", "both")

# What stands between a question and its answer, as between two paragraphs.
SEPARATOR = "\n\n"
_TEXTS_PER_BLOCK = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Token sequences end to end in flat arrays.

    Attributes:
      tokens: int32 [total].
      loss_mask: bool [total]; whether `tokens[i]` is learnt when it is the target.
      offsets: int64 [examples + 1]; example `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    When pickled, the arrays go to a temporary file that lives as long as this object,
    and the copy maps it: worker processes share one corpus in memory.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def collect(
        cls, pairs: Iterable[tuple[Sequence[int], Sequence[bool]]]
    ) -> "Examples":
        """Gathers (tokens, loss mask) pairs, one pair an example."""
        tokens, masks, lengths = [], [], [0]
        for ids, mask in pairs:
            tokens.append(np.asarray(ids, np.int32))
            masks.append(np.asarray(mask, bool))
            lengths.append(len(ids))
        return cls(
            tokens=np.concatenate([np.empty(0, np.int32), *tokens]),
            loss_mask=np.concatenate([np.empty(0, bool), *masks]),
            offsets=np.cumsum(lengths, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return np.diff(self.offsets)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits: a hash of the tokens."""
        return hashlib.blake2b(self.tokens.tobytes(), digest_size=8).hexdigest()

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """`tokens[begin:end]` and `loss_mask[begin:end]`."""
        return self.tokens[begin:end], self.loss_mask[begin:end]

    @functools.cached_property
    def num_learnt(self) -> int:
        """Targets that are learnt: masked-in tokens, save the first of each example."""
        first = self.offsets[:-1][self.lengths > 0]
        return int(self.loss_mask.sum()) - int(self.loss_mask[first].sum())

    @property
    def is_continuation(self) -> bool:
        """Whether some targets are given and others are to be found."""
        return self.num_learnt < int(np.maximum(self.lengths - 1, 0).sum())

    @functools.cached_property
    def _folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="mixcpt-tokens-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for field in dataclasses.fields(self):
            np.save(f"{folder}/{field.name}.npy", getattr(self, field.name))
        return folder

    def __reduce__(self):
        return _open_examples, (self._folder,)


def _open_examples(folder: str) -> Examples:
    return Examples(
        **{
            field.name: np.load(f"{folder}/{field.name}.npy", mmap_mode="r")
            for field in dataclasses.fields(Examples)
        }
    )


class Pair(NamedTuple):
    """A preference: two conversations that begin with the same prompt.

    Attributes:
      chosen, rejected: int32 [tokens], prompt and all.
      chosen_mask, rejected_mask: bool, same shapes; the assistant's tokens after the
        prompt.
    """

    chosen: np.ndarray
    chosen_mask: np.ndarray
    rejected: np.ndarray
    rejected_mask: np.ndarray


def encode(
    records: Iterable[Record],
    format: str,
    tokenizer,
    fields: Mapping[str, str] | None = None,
    preference_side: str = "chosen",
) -> Examples:
    """Turns records into examples.

    Plain texts become [BOS if the tokenizer adds it] + text + [end], all learnt but BOS.
    Conversations become what the tokenizer's chat template makes of them and no more;
    learnt is what the assistant writes, the token that ends its turn with it.

    Args:
      records: see `sources.read`; they are read once and not kept.
      format: what a record is written as:
        'document': its `text`;
        'instruction': `instruction`, `input` if there is one, and `output`, or
        `prompt` and `response`, with a blank line between;
        'preference': `prompt` and the answer of `preference_side`, likewise;
        'cloze': `context` and `target` with nothing between, of which the target is
        learnt and no token ends it, see `encode_continuations`;
        'chat': `messages`, a list of `{role, content}` whose role is system, user or
        assistant (other keys are not read), or else the fields of 'instruction' as a
        user's message and the assistant's;
        'chat_preference': two examples a record, see `chat_pair`.
      tokenizer: has `encode_batch`, `add_bos`, `bos_id` and `end_of_document_id`; for
        'chat' `encode_chat`.
      fields: our field name -> the source's name for it, where they differ.
      preference_side: 'chosen', 'rejected', or 'both' for two examples a record.

    Raises:
      InputError: an unknown format, side or field name; a record that lacks a field,
        or whose field is not a string or is blank (`input` and a system message may
        be); a conversation without an assistant's turn, or which the chat template
        cannot write.
    """
    fields = dict(fields or {})
    _check_settings(format, fields, preference_side)
    if format == "chat_preference":
        pairs = (chat_pair(record, tokenizer, fields) for record in records)
        return Examples.collect(side for pair in pairs for side in (pair[:2], pair[2:]))
    if format == "chat":
        return Examples.collect(
            _encode_chat(_conversation(record, fields), tokenizer, record.place)
            for record in records
        )
    if format == "cloze":
        return Examples.collect(
            encode_continuations(
                [
                    (*_context_and_target(record, fields), record.place)
                    for record in records
                ],
                tokenizer,
            )
        )
    texts = (
        text
        for record in records
        for text in _texts(record, format, fields, preference_side)
    )
    return Examples.collect(_tokenize(texts, tokenizer))


def chat_pair(
    record: Record, tokenizer, fields: Mapping[str, str] | None = None
) -> Pair:
    """Encodes a preference between two ways on from one prompt.

    Args:
      record: `prompt` is a user's message or a list of messages; `chosen` and
        `rejected` are the assistant's message or lists of messages that end with one,
        with or without the prompt's messages before them. Every turn of the assistant
        after the prompt counts.
      tokenizer: has `encode_chat`.
      fields: our field name -> the source's name for it, where they differ.

    Raises:
      InputError: see `encode`, format 'chat'; also if the prompt ends with the
        assistant's message.
    """
    fields = dict(fields or {})
    _check_settings("chat_preference", fields, "both")
    prompt, *answers = _read_pair(record, fields)
    arrays = []
    for answer in answers:
        arrays += encode_answer(prompt, answer, tokenizer, record.place)
    return Pair(*arrays)


def plain_text(
    record: Record,
    format: str,
    fields: Mapping[str, str] | None = None,
    preference_side: str = "chosen",
) -> str:
    """All that is written in a record, in one text; arguments as for `encode`.

    Raises:
      InputError: see `encode`.
    """
    fields = dict(fields or {})
    _check_settings(format, fields, preference_side)
    if format == "chat":
        parts = [turn["content"] for turn in _conversation(record, fields)]
    elif format == "chat_preference":
        turns = itertools.chain.from_iterable(_read_pair(record, fields))
        parts = [turn["content"] for turn in turns]
    elif format == "cloze":
        parts = ["".join(_context_and_target(record, fields))]
    else:
        parts = _texts(record, format, fields, preference_side)
    return SEPARATOR.join(parts)


def _read_pair(record: Record, fields: dict) -> list[list[dict[str, str]]]:
    """The messages of the prompt, and those that the two answers add."""

    def read(name: str, role: str) -> list[dict[str, str]]:
        name = fields.get(name, name)
        if isinstance(record.fields.get(name), list):
            return _read_messages(record, name)
        return [{"role": role, "content": _read_field(record, name, "a list or ")}]

    prompt = read("prompt", "user")
    if prompt[-1]["role"] == "assistant":
        raise InputError(
            f"{record.place}: field {fields.get('prompt', 'prompt')!r} ends with the "
            "assistant's message; end it with the user's"
        )
    answers = []
    for side in PREFERENCE_SIDES[:2]:
        answer = read(side, "assistant")
        if answer[-1]["role"] != "assistant":
            raise InputError(
                f"{record.place}: field {fields.get(side, side)!r} ends with a message "
                f"of role {answer[-1]['role']!r}; end it with the assistant's"
            )
        if answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        answers.append(answer)
    return [prompt, *answers]


def encode_answer(
    prompt: list[dict[str, str]], answer: list[dict[str, str]], tokenizer, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a conversation of which `answer` alone is learnt.

    Returns:
      Tokens of both, int32 [tokens], and the mask, bool [tokens]: the assistant's
      tokens in `answer`, the one that ends each turn with them.

    Raises:
      InputError: the chat template cannot write it; begins with `place`.
    """
    ids, mask = _encode_chat([*prompt, *answer], tokenizer, place)
    # The assistant's turns within the prompt are given, as all of the prompt is.
    opening, _ = _encode_chat(prompt, tokenizer, place, True)
    mask[: len(opening)] = [False] * len(opening)
    return np.array(ids, np.int32), np.array(mask, bool)


def prompt_and_response(
    record: Record, format: str, fields: Mapping[str, str] | None = None
) -> tuple[list[dict[str, str]], str]:
    """A record as the messages of a prompt and the assistant's response to it.

    The contents of the messages and the response, joined by `SEPARATOR`, are the plain
    text that `encode` makes of an instruction or a preference.

    Args:
      record: see `encode`.
      format: 'instruction'; 'preference', whose response is the chosen one; or 'chat',
        whose response is the assistant's last message.
      fields: our field name -> the source's name for it, where they differ.

    Raises:
      InputError: see `encode`; also if no message with a content comes before the
        response.
    """
    fields = dict(fields or {})
    _check_settings(format, fields, "chosen")
    if format in ("instruction", "preference"):
        if format == "instruction":
            *question, response = _instruction(record, fields)
        else:
            names = (fields.get(name, name) for name in ("prompt", "chosen"))
            *question, response = (_read_field(record, name) for name in names)
        return [{"role": "user", "content": SEPARATOR.join(question)}], response
    if format != "chat":
        raise InputError(
            f"format {format!r} has no prompt with a response; use 'instruction', "
            "'preference' or 'chat'"
        )
    messages = _conversation(record, fields)
    while messages[-1]["role"] != "assistant":
        messages.pop()
    *prompt, response = messages
    if not any(message["content"].strip() for message in prompt):
        raise InputError(
            f"{record.place}: nothing comes before the assistant's last message; drop "
            "the record"
        )
    return prompt, response["content"]


def read_prompt(record: Record) -> list[dict[str, str]]:
    """The conversation to answer: `messages`, or `prompt` as a user's message.

    Raises:
      InputError: neither is there, or it is malformed or ends with the assistant.
    """
    if "messages" not in record.fields:
        return [{"role": "user", "content": _read_field(record, "prompt")}]
    messages = _read_messages(record, "messages")
    if messages[-1]["role"] == "assistant":
        raise InputError(
            f"{record.place}: field 'messages' ends with the assistant's message; end "
            "it with the user's"
        )
    return messages


def _encode_chat(
    messages: list[dict[str, str]], tokenizer, place: str, prompt: bool = False
) -> tuple[list[int], list[bool]]:
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=prompt)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _conversation(record: Record, fields: dict) -> list[dict[str, str]]:
    name = fields.get("messages", "messages")
    if name in record.fields:
        messages = _read_messages(record, name)
        if all(message["role"] != "assistant" for message in messages):
            raise InputError(
                f"{record.place}: field {name!r} has no message of the assistant, so "
                "there is nothing to learn; drop the record"
            )
        return messages
    if not any(_has(record, fields, name) for name in ("instruction", "prompt")):
        found = ", ".join(sorted(record.fields)) or "none"
        raise InputError(
            f"{record.place}: no field {name!r}, 'instruction' or 'prompt' (found: "
            f"{found}); map one, as in "
            "--config.sources.NAME.fields=\"{'prompt': 'question'}\""
        )
    *question, answer = _instruction(record, fields)
    return [
        {"role": "user", "content": SEPARATOR.join(question)},
        {"role": "assistant", "content": answer},
    ]


def _read_messages(record: Record, name: str) -> list[dict[str, str]]:
    value = record.fields[name]
    if not isinstance(value, list) or not value:
        found = "empty" if value == [] else f"of type {type(value).__name__}"
        raise InputError(
            f"{record.place}: field {name!r} is {found}, a list of "
            '{"role": ..., "content": ...} is wanted'
        )
    messages = []
    for number, message in enumerate(value):
        where = f"{name}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            found = (
                f"has the keys {sorted(message)}"
                if isinstance(message, dict)
                else f"is of type {type(message).__name__}"
            )
            raise InputError(
                f"{record.place}: {where} {found}, an object with role and content is "
                "wanted"
            )
        role = message["role"]
        if role not in ROLES:
            raise InputError(
                f"{record.place}: {where}.role is {role!r}; use one of {list(ROLES)}"
            )
        _check_text(
            message["content"], f"{where}.content", record.place, role == "system"
        )
        messages.append({"role": role, "content": message["content"]})
    return messages


def _tokenize(texts: Iterator[str], tokenizer) -> Iterator[tuple[list, np.ndarray]]:
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    end = [tokenizer.end_of_document_id]
    while block := list(itertools.islice(texts, _TEXTS_PER_BLOCK)):
        for ids in tokenizer.encode_batch(block):
            mask = np.ones(len(start) + len(ids) + len(end), bool)
            mask[: len(start)] = False
            yield start + ids + end, mask


def encode_continuations(
    continuations: Sequence[tuple[str, str, str]], tokenizer
) -> Iterator[tuple[list[int], list[bool]]]:
    """Encodes contexts together with what they are continued with.

    As lm-evaluation-harness does it, but for line ends, which stay in the context: spaces
    at its end go to the target, context and target are tokenised as one text, and the
    target's tokens are those after as many as the context alone has. So a target has the
    tokens that it has in text.

    Args:
      continuations: (context, target, place of the record) of each.
      tokenizer: has `encode_batch`, `add_bos` and `bos_id`.

    Yields:
      Tokens, and which of them are the target's.

    Raises:
      InputError: a target has no token of its own; begins with its place.
    """
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    openings = tokenizer.encode_batch([c.rstrip(" ") for c, *_ in continuations])
    wholes = tokenizer.encode_batch([c + target for c, target, _ in continuations])
    for (_, target, place), opening, ids in zip(
        continuations, openings, wholes, strict=True
    ):
        if len(ids) <= len(opening):
            raise InputError(
                f"{place}: the target {target!r} has no token of its own behind its "
                "context; let it begin with a space or a new word"
            )
        given = len(start) + len(opening)
        yield start + ids, [False] * given + [True] * (len(ids) - len(opening))


def _context_and_target(record: Record, fields: dict) -> list[str]:
    return [_read_field(record, fields.get(n, n)) for n in FIELDS["cloze"]]


def _texts(record: Record, format: str, fields: dict, side: str) -> list[str]:
    def read(name: str) -> str:
        return _read_field(record, fields.get(name, name))

    if format == "document":
        return [read("text")]
    if format == "preference":
        sides = ("chosen", "rejected") if side == "both" else (side,)
        prompt = read("prompt")
        return [SEPARATOR.join([prompt, read(answer)]) for answer in sides]
    return [SEPARATOR.join(_instruction(record, fields))]


def _instruction(record: Record, fields: dict) -> list[str]:
    """What is asked, in one or two parts, and the answer."""

    def read(name: str) -> str:
        return _read_field(record, fields.get(name, name))

    if _has(record, fields, "prompt") and not _has(record, fields, "instruction"):
        return [read("prompt"), read("response")]
    parts = [read("instruction")]
    # Many instruction sets have the field in every record and leave it blank.
    if record.fields.get(fields.get("input", "input")):
        parts.append(read("input"))
    return [*parts, read("output")]


def _has(record: Record, fields: dict, name: str) -> bool:
    return fields.get(name, name) in record.fields


def _read_field(record: Record, name: str, also: str = "") -> str:
    if name not in record.fields:
        found = ", ".join(sorted(record.fields)) or "none"
        raise InputError(
            f"{record.place}: no field {name!r} (found: {found}); map it, as in "
            "--config.sources.NAME.fields=\"{'text': 'body'}\""
        )
    value = record.fields[name]
    _check_text(value, f"field {name!r}", record.place, also=also)
    return value


def _check_text(
    value: Any, what: str, place: str, may_be_blank: bool = False, also: str = ""
) -> None:
    if not isinstance(value, str):
        raise InputError(
            f"{place}: {what} is of type {type(value).__name__}, "
            f"{also}a string is wanted"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: {what} has half of a surrogate pair, which is no "
            "text; drop the record"
        ) from None
    if not value.strip() and not may_be_blank:
        raise InputError(f"{place}: {what} is blank; drop the record")


def _check_settings(format: str, fields: dict, preference_side: str) -> None:
    if format not in FIELDS:
        raise InputError(f"format {format!r} is unknown; use one of {sorted(FIELDS)}")
    if unknown := sorted(set(fields) - set(FIELDS[format])):
        raise InputError(
            f"fields: {unknown[0]!r} is not a field of format {format!r}; "
            f"use some of {list(FIELDS[format])}"
        )
    if preference_side not in PREFERENCE_SIDES:
        raise InputError(
            f"preference_side {preference_side!r} is unknown; "
            f"use one of {list(PREFERENCE_SIDES)}"
        )
