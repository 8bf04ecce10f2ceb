"""Records to examples: the tokens of a text and which of them are loss tokens.

Continual pre-training reads everything as plain text: no chat template, no role names, and
a loss on every token. Format alignment comes next and reads conversations: the tokenizer's
chat template renders them, and the loss is on the assistant's turns.
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

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import fields as fields_lib
from mixcpt_jax.data import layouts, long_texts, readers
from mixcpt_jax.data.fields import FIELDS, PREFERENCE_SIDES, SEPARATOR
from mixcpt_jax.data.readers import OnBad
from mixcpt_jax.data.sources import Record
from mixcpt_jax.data.tally import Tally


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Token sequences, concatenated in flat arrays.

    Attributes:
      tokens: int32 [total].
      loss_mask: bool [total]; whether `tokens[i]` is a loss token when it is the target.
      offsets: int64 [examples + 1]; example `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    Pickling writes the arrays to temporary files that live as long as this object, and
    copies map them: worker processes share one corpus in memory.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    @classmethod
    def collect(
        cls, pairs: Iterable[tuple[Sequence[int], Sequence[bool]]]
    ) -> "Examples":
        """Joins (tokens, loss mask) pairs, one pair per example."""
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
        """A hash of the tokens, 16 hex digits."""
        return hashlib.blake2b(self.tokens.tobytes(), digest_size=8).hexdigest()

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """`tokens[begin:end]` and `loss_mask[begin:end]`."""
        return self.tokens[begin:end], self.loss_mask[begin:end]

    def take(
        self, numbers: np.ndarray, lengths: np.ndarray | None = None
    ) -> "Examples":
        """Selects examples by index, truncated to these lengths if given."""
        lengths = self.lengths[numbers] if lengths is None else lengths
        parts = [
            slice(start, start + length)
            for start, length in zip(self.offsets[numbers], lengths, strict=True)
        ]
        return Examples.collect((self.tokens[p], self.loss_mask[p]) for p in parts)

    @functools.cached_property
    def num_loss_tokens(self) -> int:
        """Number of targets in the loss mask; an example's first token is not one."""
        first = self.offsets[:-1][self.lengths > 0]
        return int(self.loss_mask.sum()) - int(self.loss_mask[first].sum())

    @property
    def is_continuation(self) -> bool:
        """Whether some targets are only context, without a loss."""
        return self.num_loss_tokens < int(np.maximum(self.lengths - 1, 0).sum())

    @functools.cached_property
    def _folder(self) -> str:
        folder = tempfile.mkdtemp(prefix="mixcpt-tokens-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        try:
            for field in dataclasses.fields(self):
                np.save(f"{folder}/{field.name}.npy", getattr(self, field.name))
        except OSError as error:
            raise InputError(
                f"{folder}: the tokens for worker processes cannot be written there "
                f"({error}); make room in that folder, set TMPDIR to another one, or set "
                "data.num_workers=0"
            ) from error
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
    tally: Tally | None = None,
    on_bad_record: str = "refuse",
) -> Examples:
    """Encodes records.

    Plain texts become [BOS if the tokenizer adds it] + text + [end]; all tokens except BOS
    are loss tokens. Conversations become exactly what the tokenizer's chat template
    renders; the loss tokens are the assistant's content and the token that ends its turn,
    except in turns whose `weight` is 0.

    Args:
      records: see `sources.read`; they are read once and not kept.
      format: how to write a record, from the fields in `fields.FIELDS`:
        'document': its `text`;
        'instruction': the messages of 'chat', separated by blank lines, without roles;
        'preference': `prompt` and the answer of `preference_side`, joined the same way;
        'cloze': `context` and `target` with nothing between; only the target's tokens are
        loss tokens and no end follows, see `encode_continuations`;
        'chat': `messages`, a list of `{role, content}` whose role is system, user or
        assistant and whose content is a text or a list of text parts, after the `system`
        message if there is one; or the questions and answers of `history`, `instruction`
        and `input`, where present, and `output`, or `prompt` and `response`;
        'chat_preference': two examples per record, see `chat_pair`. Pairs of equal answers
        are dropped and counted.
      tokenizer: has `encode_batch`, `add_bos`, `bos_id` and `end_of_document_id`; for
        'chat' `encode_chat`.
      fields: our field name -> the source's name for it, where they differ and
        `layouts.recognise` does not find it.
      preference_side: 'chosen', 'rejected', or 'both' for two examples per record.
      tally: counts findings; if None, dropped records and characters are logged.
      on_bad_record: 'refuse', or 'skip' to leave out and count bad records, or 'by_kind'
        to do so for those of documents only.

    Raises:
      InputError: an unknown format, side or field name; a record that lacks a field, or
        whose field is not a string or is blank (`input` and a system message may be), or
        that has one of `fields.REFUSED`; a conversation without an assistant's turn, or
        one that the chat template cannot write.
    """
    settings = format, fields or {}, preference_side
    check_settings(*settings)
    ours = tally or Tally()
    on_bad = readers.handler(on_bad_record, ours.skip)
    checked = _checked(records, settings, ours, on_bad)
    match format:
        case "chat" | "chat_preference" | "cloze":
            encode_one = {"chat": _chat, "chat_preference": _pair, "cloze": _cloze}
            examples = _one_by_one(checked, encode_one[format], tokenizer, ours, on_bad)
        case _:
            examples = _tokenize(checked, tokenizer, ours)
    collected = Examples.collect(examples)
    if tally is None:
        ours.warn("records", ("left_out", "lost", "spelt"))
    return collected


def chat_pair(
    record: Record, tokenizer, fields: Mapping[str, str] | None = None
) -> Pair:
    """Encodes a preference between two answers to one prompt.

    Args:
      record: `prompt` is a user's message or a list of messages; `chosen` and
        `rejected` are the assistant's message or lists of messages that end with one,
        with or without the prompt's messages before them, see `fields.pair`. The loss is
        on every turn of the assistant after the prompt.
      tokenizer: has `encode_chat`.
      fields: our field name -> the source's name for it, where they differ.

    Raises:
      InputError: see `encode`, format 'chat', and `fields.pair`.
    """
    content = read(record, "chat_preference", fields, "both")
    arrays = []
    for example in _pair(content, tokenizer, record.place):
        arrays += map(np.asarray, example, (np.int32, bool))
    return Pair(*arrays)


class Content(NamedTuple):
    """The content of a record, read in its format.

    Attributes:
      texts: all texts, in order, one per field or message.
      parts: as `fields` reads the format.
      unread: names of the fields that are not in the texts.
      layout: the layout that was recognised, as text, or ''.
      left_out: why a good record gives no example, or ''.
    """

    texts: list[str]
    parts: Any
    unread: list[str]
    layout: str = ""
    left_out: str = ""


def read(
    record: Record, format: str, fields: Mapping[str, str] | None, side: str
) -> Content:
    """Reads the content of a record; arguments as for `encode`.

    Raises:
      InputError: see `encode`.
    """
    check_settings(format, fields or {}, side)
    reading = fields_lib.Reading(record, fields, format)
    left_out = ""
    match format:
        case "document":
            texts = parts = fields_lib.document(reading)
        case "cloze":
            texts = parts = fields_lib.cloze(reading)
        case "preference":
            messages, answers = parts = fields_lib.preference(reading, side)
            texts = [*_contents(messages), *answers]
        case "instruction" | "chat":
            parts = fields_lib.conversation(reading)
            texts = _contents(parts)
        case "chat_preference":
            parts = fields_lib.pair(reading)
            texts = [text for messages in parts for text in _contents(messages)]
            if not fields_lib.prefers(*parts[1:]):
                left_out = "no_preference"
    unread = reading.unread(format, texts)
    return Content(texts, parts, unread, reading.layout, left_out)


def _contents(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    return [message["content"] for message in messages]


def _checked(
    records: Iterable[Record], settings: tuple, tally: Tally, on_bad: OnBad
) -> Iterator[tuple[Content, Record]]:
    """Yields each record with its content; counts dropped records."""
    for record in records:
        try:
            content = read(record, *settings)
        except InputError as error:
            on_bad(readers.of_record(error, record))
            continue
        if content.left_out:
            tally.leave_out(content.left_out, record.place)
            continue
        tally.leave_unread(content.unread, record.place)
        tally.read(content.layout, record.encoding, record.place)
        yield content, record


def _one_by_one(checked, encode_one, tokenizer, tally: Tally, on_bad: OnBad):
    """The examples of records that are encoded one by one; one or two per record."""
    for content, record in checked:
        place = record.place
        try:
            examples = encode_one(content, tokenizer, place)
        except InputError as error:
            on_bad(readers.of_record(error, record))
            continue
        for text in content.texts:
            tally.see(text, place, tokenizer)
        tally.leave_without_loss(_num_without_loss(content, examples), place)
        tally.keep(place)
        yield from examples


def _num_without_loss(content: Content, examples) -> int:
    """How many turns have no loss tokens although they should."""
    match content.parts:
        case [str(), *_]:
            return 0
        case [list(), *answers]:
            turns = itertools.chain.from_iterable(answers)
        case turns:
            pass
    num_wanted = sum(map(fields_lib.is_loss_turn, turns))
    masks = (np.asarray(mask, np.int8) for _, mask in examples)
    return num_wanted - sum(int((np.diff(mask, prepend=0) > 0).sum()) for mask in masks)


def _tokenize(
    checked, tokenizer, tally: Tally
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The examples of plain texts, encoded in blocks."""
    start = np.array([tokenizer.bos_id] if tokenizer.add_bos else [], np.int32)
    end = np.array([tokenizer.end_of_document_id], np.int32)

    def texts() -> Iterator[str]:
        for content, record in checked:
            for text in _plain(content):
                tally.see(text, record.place, tokenizer)
                tally.keep(record.place)
                yield text

    for ids in long_texts.encode(tokenizer, texts()):
        mask = np.ones(len(start) + len(ids) + len(end), bool)
        mask[: len(start)] = False
        yield np.concatenate([start, ids, end]), mask


def _plain(content: Content) -> list[str]:
    """The text of each example of a plain format."""
    match content.parts:
        case [list(messages), list(answers)]:
            question = _contents(messages)
            return [SEPARATOR.join([*question, answer]) for answer in answers]
    return [SEPARATOR.join(content.texts)]


def _chat(content: Content, tokenizer, place: str):
    return [_encode_chat(content.parts, tokenizer, place)]


def _pair(content: Content, tokenizer, place: str):
    prompt, *answers = content.parts
    return [encode_answer(prompt, answer, tokenizer, place) for answer in answers]


def _cloze(content: Content, tokenizer, place: str):
    return list(encode_continuations([(*content.parts, place)], tokenizer))


def encode_continuations(
    continuations: Sequence[tuple[str, str, str]], tokenizer
) -> Iterator[tuple[list[int], list[bool]]]:
    """Encodes contexts with their continuations.

    This follows lm-evaluation-harness, except that line ends stay in the context. Spaces at
    the end of the context move to the target, and both are tokenized as one text. If the
    context alone has n tokens, the target's tokens are those after the first n. So a target
    has the same tokens as in running text.

    Args:
      continuations: (context, target, place of the record) of each.
      tokenizer: has `encode_batch`, `add_bos` and `bos_id`.

    Yields:
      Tokens, and a mask of the target's tokens.

    Raises:
      InputError: a target has no token of its own; the message begins with its place.
    """
    start = [tokenizer.bos_id] if tokenizer.add_bos else []
    openings = tokenizer.encode_batch([c.rstrip(" ") for c, *_ in continuations])
    wholes = tokenizer.encode_batch([c + target for c, target, _ in continuations])
    for (_, target, place), opening, ids in zip(
        continuations, openings, wholes, strict=True
    ):
        if len(ids) <= len(opening):
            raise InputError(
                f"{place}: the target {target!r} has no token of its own after its "
                "context; let it begin with a space or a new word"
            )
        given = len(start) + len(opening)
        yield start + ids, [False] * given + [True] * (len(ids) - len(opening))


def plain_text(
    record: Record,
    format: str,
    fields: Mapping[str, str] | None = None,
    preference_side: str = "chosen",
) -> str:
    """The whole content of a record as one text; arguments as for `encode`.

    Raises:
      InputError: see `encode`.
    """
    content = read(record, format, fields, preference_side)
    if format == "cloze":
        return "".join(content.texts)
    return SEPARATOR.join(_plain(content) if format == "preference" else content.texts)


class Passages(NamedTuple):
    """The texts of a record, to find other records with the same texts.

    Attributes:
      wholes: its whole text, with and without the system message: a document, a cloze
        with its target, a question with its answer, a conversation; of a pair the prompt
        with each answer.
      parts: texts within it that have a loss: each answer, and a conversation up to each
        answer except the last.
    """

    wholes: list[str]
    parts: list[str]


def passages(
    record: Record,
    format: str,
    fields: Mapping[str, str] | None = None,
    preference_side: str = "chosen",
) -> Passages:
    """The texts of a record, the same in every format that can hold them.

    An instruction has the passages of a conversation or preference of the same content.

    Raises:
      InputError: see `encode`.
    """
    parts = read(record, format, fields, preference_side).parts
    match format:
        case "document" | "cloze":
            return Passages(["".join(parts)], [])
        case "instruction" | "chat":
            prompt, answers = [], [parts]
        case "chat_preference":
            prompt, *answers = parts
        case "preference":
            prompt, texts = parts
            answers = [[{"role": "assistant", "content": text}] for text in texts]
    found = [_passages_of([*prompt, *answer], len(prompt)) for answer in answers]
    return Passages(
        [text for passages in found for text in passages.wholes],
        [text for passages in found for text in passages.parts],
    )


def _passages_of(messages: list[dict[str, Any]], first: int) -> Passages:
    """The passages of a conversation whose loss begins at message `first`."""
    wholes, parts = [], []
    for spoken in (messages, [m for m in messages if m["role"] != "system"]):
        contents = _contents(spoken)
        wholes.append(SEPARATOR.join(contents))
        begin = first - (len(messages) - len(spoken))
        for number, message in enumerate(spoken):
            if number >= begin and fields_lib.is_loss_turn(message):
                parts.append(message["content"])
                parts.append(SEPARATOR.join(contents[: number + 1]))
    return Passages(wholes, [part for part in parts if part not in wholes])


def said_in(
    record: Record, format: str, fields: Mapping[str, str] | None = None
) -> str:
    """The content of the fields that a format reads, of any type.

    It is the same for 'instruction' and 'chat', and for 'preference' and
    'chat_preference', and empty if no field is there.
    """
    kin = {"instruction": "chat", "preference": "chat_preference"}.get(format, format)
    try:
        reading = fields_lib.Reading(record, fields, kin)
    except InputError:  # it can be read in two ways, so it is not used
        return ""
    texts = []
    for name in FIELDS[kin]:
        value = record.fields.get(reading.name(name) or name)
        if isinstance(value, list):
            value = SEPARATOR.join(str(layouts.content(entry)) for entry in value)
        if value:
            texts.append(str(value))
    return SEPARATOR.join(texts)


def encode_answer(
    prompt: list[dict[str, str]], answer: list[dict[str, str]], tokenizer, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a conversation with a loss on `answer` only.

    Returns:
      Tokens of both, int32 [tokens], and the loss mask, bool [tokens]: the assistant's
      tokens in `answer`, with the one that ends each turn.

    Raises:
      InputError: the chat template cannot write it; begins with `place`.
    """
    ids, mask = _encode_chat([*prompt, *answer], tokenizer, place)
    # The assistant's turns within the prompt are context, without a loss.
    opening, _ = _encode_chat(prompt, tokenizer, place, True)
    mask[: len(opening)] = [False] * len(opening)
    return np.array(ids, np.int32), np.array(mask, bool)


def encode_response(
    prompt: list[dict[str, Any]], response: str, tokenizer, place: str
) -> tuple[list[int], str]:
    """Encodes a conversation up to the end of the assistant's response.

    Returns:
      The tokens, and the response as the chat template writes it.

    Raises:
      InputError: the chat template cannot write it; begins with `place`.
    """
    messages = [*prompt, {"role": "assistant", "content": response}]
    try:
        return tokenizer.encode_response(messages)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def prompt_and_response(
    record: Record, format: str, fields: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Splits a record into the messages of a prompt and the assistant's response.

    Joined by `SEPARATOR`, the contents of the messages and the response are the plain text
    that `encode` writes for an instruction or a preference.

    Args:
      record: see `encode`.
      format: 'instruction'; 'preference', whose response is the chosen one; or 'chat',
        whose response is the assistant's last message with a loss.
      fields: our field name -> the source's name for it, where they differ.

    Raises:
      InputError: see `encode`; also if no message with content precedes the response.
    """
    check_settings(format, fields or {}, "chosen")
    if format not in ("instruction", "preference", "chat"):
        raise InputError(
            f"format {format!r} has no prompt with a response; use 'instruction', "
            "'preference' or 'chat'"
        )
    parts = read(record, format, fields, "chosen").parts
    if format == "preference":
        prompt, [response] = parts
        return prompt, response
    messages = list(parts)
    while not fields_lib.is_loss_turn(messages[-1]):
        messages.pop()
    *prompt, response = messages
    if not any(message["content"].strip() for message in prompt):
        raise InputError(
            f"{record.place}: no message comes before the assistant's last one; drop the "
            "record"
        )
    return prompt, response["content"]


def read_prompt(record: Record, tally: Tally | None = None) -> list[dict[str, Any]]:
    """The conversation to continue: `messages`, or `prompt` as a user's message.

    A `system` message and a `history` come before it.

    Args:
      record: what is read.
      tally: counts unread fields.

    Raises:
      InputError: both are missing, or the conversation is malformed or ends with the
        assistant.
    """
    reading = fields_lib.Reading(record)
    messages = fields_lib.prompt(reading)
    unread = reading.unread("chat", _contents(messages))
    if tally is not None:
        tally.leave_unread(unread, record.place)
    return messages


def _encode_chat(
    messages: list[dict[str, Any]], tokenizer, place: str, prompt: bool = False
) -> tuple[list[int], list[bool]]:
    known = getattr(tokenizer, "message_keys", ("role", "content"))
    for number, message in enumerate(messages):
        if unknown := sorted(message.keys() - set(known)):
            raise InputError(
                f"{place}: messages[{number}] has {unknown[0]!r}, which this tokenizer "
                "cannot write; drop the record"
            )
    try:
        return tokenizer.encode_chat(messages, add_generation_prompt=prompt)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def check_settings(format: str, fields: Mapping, preference_side: str) -> None:
    """Raises InputError if a setting of a source is wrong, see `encode`."""
    if format not in FIELDS:
        raise InputError(f"format {format!r} is unknown; use one of {sorted(FIELDS)}")
    of_kinds = {
        key: names for key, names in fields.items() if isinstance(names, Mapping)
    }
    if unknown := sorted(of_kinds.keys() - set(readers.RECORDS)):
        raise InputError(
            f"fields: {unknown[0]!r} is no kind of file whose records have fields; use "
            f"some of {list(readers.RECORDS)}"
        )
    ours = fields.keys() - of_kinds.keys()
    if unknown := sorted(ours.union(*of_kinds.values()) - set(FIELDS[format])):
        raise InputError(
            f"fields: {unknown[0]!r} is not a field of format {format!r}; "
            f"use some of {list(FIELDS[format])}"
        )
    if preference_side not in PREFERENCE_SIDES:
        raise InputError(
            f"preference_side {preference_side!r} is unknown; "
            f"use one of {list(PREFERENCE_SIDES)}"
        )
