"""Text to token ids and back: `tokenizer.json`, sentencepiece and GGUF, one interface.

Plain text is data, and data is untrusted: `encode` never turns a special token's
spelling inside a text, such as `<|im_end|>`, into that token. `encode_with_special`, which
is for the output of a chat template, does. `encode_chat` turns the template's own text into
special tokens and encodes the messages as plain text.

Data workers are processes that import this file and receive tokenizers by pickle, so it
does not import jax.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

import tokenizers
from etils import epath
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.core.small_files import MOST_BYTES_OF_VOCABULARY
from mixcpt_jax.data import hub
from mixcpt_jax.models import companions, gguf_vocabulary, headers, template_sandbox
from mixcpt_jax.models.companions import Added, Companions
from mixcpt_jax.models.gguf_file import gguf_header, open_gguf
from mixcpt_jax.models.vocabulary import JsonModel, SentencePieceModel

# The date in training conversations; it is the default of Llama 3's templates.
_TODAY = datetime(2024, 7, 26)

# The order matters: Gemma, which has <eos>, also has </s> as an HTML tag.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")

# A minimal conversation that shows how a template writes a turn.
_EXCHANGE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hi"},
)

_END_OF_TURN = "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For vocabularies without `<|im_end|>`.
CHATML_WITH_EOS = CHATML.replace("'<|im_end|>\n'", "eos_token + '\n'")
_BOS = "{{ bos_token }}"
# The largest vocabularies have about 250,000 tokens.
_MOST_IDS = 2**24


class _Turn(NamedTuple):
    """A response as generation would write it: the last turn of a conversation.

    Attributes:
      prompt: the preceding messages, with a generation prompt.
      text: these messages and the response.
      content_stop: the end of the response's content in `text`.
      stops: the ends of the tokens that end the turn and may contribute to the loss;
        empty if the response cannot contribute.
      problem: why the response cannot contribute; not set if `text` does not begin with
        `prompt`.
    """

    prompt: str
    text: str
    content_stop: int = 0
    stops: Sequence[int] = ()
    problem: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary, the encoding of text, and the model's conventions.

    Attributes:
      bos_id, eos_id, pad_id: ids of the special tokens; None if the vocabulary has no such
        token.
      add_bos: whether the model expects the BOS token before each document.
      chat_template: the model's Jinja template, None if it has none.
      companions: the contents of the files beside it.
    """

    model: JsonModel | SentencePieceModel
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool
    chat_template: str | None
    companions: Companions = dataclasses.field(default_factory=Companions)

    # The keys that a message may have; `content` holds its `parts`, one per line.
    message_keys: ClassVar[tuple[str, ...]] = ("role", "content", "parts", "weight")

    @property
    def vocab_size(self) -> int:
        """An upper bound: every id is below this."""
        return self.model.vocab_size

    @property
    def end_of_document_id(self) -> int:
        """The token that ends a document in pre-training; a chat model's EOS ends a turn.

        Raises:
          InputError: the vocabulary has no such token.
        """
        for token in END_OF_DOCUMENT:
            token_id = self.token_to_id(token)
            if token_id is not None:
                return token_id
        if self.eos_id is None:
            raise InputError(
                f"tokenizer: no token ends a document: none of {END_OF_DOCUMENT} is in "
                "the vocabulary and tokenizer_config.json names no eos_token"
            )
        return self.eos_id

    @property
    def template(self) -> str:
        """The Jinja template of conversations: the model's own, or else ChatML.

        ChatML begins with BOS if the model's plain texts do. If the vocabulary lacks
        `<|im_end|>`, EOS ends a turn instead; if it lacks `<|im_start|>`, this is encoded
        as text.
        """
        if self.chat_template is not None:
            return self.chat_template
        has_end = self.token_to_id(_END_OF_TURN) is not None or self.eos_id is None
        chatml = CHATML if has_end else CHATML_WITH_EOS
        return _BOS + chatml if self.add_bos else chatml

    def with_template(self, template: str) -> "Tokenizer":
        """A copy with a template that was not published with the model.

        BOS is put first if the model's plain texts begin with it and the template's text
        does not.
        """
        copy = dataclasses.replace(self, chat_template=template)
        if not self.add_bos or self.bos_id is None:
            return copy
        try:
            text = copy.apply_chat_template([{"role": "user", "content": "Hi"}])
        except InputError:  # It is reported when a conversation needs the template.
            return copy
        if text.startswith(self.model.id_to_token(self.bos_id)):
            return copy
        return dataclasses.replace(self, chat_template=_BOS + template)

    @functools.cached_property
    def end_of_turn_id(self) -> int:
        """The last token that the assistant writes in a turn.

        Raises:
          InputError: the template does not end turns with a token.
        """
        ids, loss_mask = self.encode_chat(_EXCHANGE)
        return [i for i, is_target in zip(ids, loss_mask, strict=True) if is_target][-1]

    @property
    def has_turns(self) -> bool:
        """Whether the template ends the assistant's turns with a token."""
        try:
            return self.end_of_turn_id is not None
        except InputError:
            return False

    @property
    def stop_ids(self) -> set[int]:
        """The tokens that end generation: those that end a document or a turn."""
        turns = {self.end_of_turn_id} if self.has_turns else set()
        return self.document_ends | turns

    @property
    def document_ends(self) -> set[int]:
        """The tokens that end a document, and those that the files list as ends."""
        return {self.end_of_document_id, self.eos_id, *self.companions.ends} - {None}

    @property
    def fingerprint(self) -> str:
        """A hash, 16 hex digits, of everything that affects an encoding."""
        _, model = self.model.__reduce__()
        special = (self.bos_id, self.eos_id, self.pad_id)
        parts = repr((*model, *special, self.add_bos, self.chat_template))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Encodes plain text: adds nothing, and never produces special tokens."""
        return self.model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many plain texts at once, which is faster."""
        return self.model.encode_batch(texts)

    def encode_rest(self, text: str) -> list[int]:
        """Encodes plain texts that continue others, so no space is put before them."""
        return self.model.encode_next(text, after_mark=False)

    def encode_with_special(self, text: str) -> list[int]:
        """Encodes text from a chat template: special tokens in the text become tokens."""
        return self.model.encode_with_special(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special tokens are left out."""
        return self.model.decode(ids)

    def token_to_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    @property
    def special_tokens(self) -> frozenset[str]:
        """The spellings that are tokens in a chat template and plain text elsewhere."""
        return self.model.special_tokens

    def loses(self, character: str) -> bool:
        """Whether the encoding drops a character or makes it the unknown token."""
        unknown = self.model.unknown_id
        if unknown is not None and unknown in self.encode(character):
            return True
        # Put it between two other characters, because vocabularies may trim the ends of a
        # text.
        return self.decode(self.encode(f"a{character}a")) == self._two

    @functools.cached_property
    def _two(self) -> str:
        return self.decode(self.encode("aa"))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation as the model was trained to read it.

        Templates write the BOS token themselves if the model expects one.

        Args:
          messages: dicts with `role` and `content`.
          add_generation_prompt: end with the opening of an assistant's turn.

        Raises:
          InputError: the template is malformed or refuses the messages.
        """
        return self._render(messages, add_generation_prompt)

    def _render(self, messages, add_generation_prompt: bool, **variables) -> str:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        try:
            return _compiled(self.template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **{
                    f"{name}_token": self.model.id_to_token(token_id)
                    for name, token_id in ids.items()
                    if token_id is not None
                },
                **variables,
            )
        except Exception as error:  # A template can raise anything.
            reason = " ".join(str(error).split())
            raise InputError(
                f"chat template: {reason}; fix the messages or the template"
            ) from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encodes a conversation and says which tokens of it contribute to the loss.

        In every assistant's turn, these are the tokens after the generation prompt, up to
        and including the special tokens that end the turn. A template may write a turn
        differently once other turns follow (Qwen3's omits thinking). The model would not
        generate that text, so none of its tokens contribute.

        The tokens are those of transformers' `apply_chat_template`, with two exceptions.
        The text of messages is plain: only the template's own text becomes special
        tokens, BOS among them. And the prompt of each response is encoded separately, as in
        generation, and the response continues it. So the tokens of `messages[:n]` with a
        generation prompt are a prefix of the tokens of `messages`, if response `n`
        contributes.

        Templates that print today's date print `_TODAY`, so that tokens do not change
        from day to day.

        Args:
          messages: dicts with `role` and `content`, and perhaps a `weight`; an
            assistant's turn of weight 0 does not contribute.
          add_generation_prompt: end with the opening of an assistant's turn.

        Returns:
          (ids, whether the token contributes to the loss).

        Raises:
          InputError: the template is malformed or refuses the messages; no response can
            contribute, and `add_generation_prompt` is False; or a message contains the
            spelling of a token that begins or ends turns, and the tokenizer cannot encode
            it as text.
        """
        given = {
            n for n, message in enumerate(messages) if message.get("weight", 1) == 0
        }
        guard, hole, messages = self._guarded(messages)
        self._check_turn_tokens(messages, guard)
        text = self._render_stable(messages, add_generation_prompt)
        loss_spans, problems = [], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number in given:
                continue
            turn = self._last_turn(messages[: number + 1], guard, hole)
            kept = [stop for stop in turn.stops if text.startswith(turn.text[:stop])]
            if kept:
                loss_spans.append((len(turn.prompt), kept[-1]))
            else:
                problems.append(turn.problem or _rewriting(number, turn, text))
        if problems and not loss_spans and not add_generation_prompt:
            raise InputError(f"chat template: {problems[0].replace(guard, '')}")
        return self._encode_parts(text, guard, loss_spans)

    def encode_response(
        self, messages: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], str]:
        """Encodes a conversation up to the end of its last message's content.

        Args:
          messages: see `encode_chat`; the last one is the assistant's.

        Returns:
          The tokens, without those that end the turn; and the content of the last message
          as the template writes it, which may be trimmed.

        Raises:
          InputError: see `encode_chat`.
        """
        content = messages[-1]["content"]
        guard, hole, messages = self._guarded(messages)
        self._check_turn_tokens(messages, guard)
        turn = self._last_turn(messages, guard, hole)
        if not turn.stops:
            problem = turn.problem or _rewriting(len(messages) - 1, turn, turn.text)
            raise InputError(f"chat template: {problem.replace(guard, '')}")
        text = turn.text[: turn.content_stop]
        ids, _ = self._encode_parts(text, guard, [(len(turn.prompt), len(text))])
        written = text[len(turn.prompt) :].replace(guard, "")
        trimmed = (content, content.rstrip(), content.lstrip(), content.strip())
        return ids, next((c for c in trimmed if written.endswith(c)), written)

    def _render_stable(self, messages, add_generation_prompt: bool) -> str:
        return self._render(
            messages, add_generation_prompt, strftime_now=_TODAY.strftime
        )

    def _guarded(self, messages) -> tuple[str, str, list[dict[str, Any]]]:
        """Breaks special-token spellings in messages; only the template's own remain.

        Returns:
          (guard, hole, messages): two characters that occur nowhere else, and messages in
          which `guard` follows the first character of each such spelling.
        """
        known = {*self.template}.union(*(message["content"] for message in messages))
        unused = (c for c in map(chr, range(0xFDD0, 0x110000)) if c not in known)
        guard, hole = next(unused), next(unused)

        def broken(content: str) -> str:
            return self._special_spelling.sub(lambda first: first[0] + guard, content)

        messages = [
            {"role": message["role"], "content": broken(message["content"])}
            for message in messages
        ]
        return guard, hole, messages

    @functools.cached_property
    def _special_spelling(self) -> re.Pattern:
        """Matches the first character wherever a text spells a special token."""
        pattern = "|".join(
            f"{re.escape(token[0])}(?={re.escape(token[1:])})"
            for token in self.special_tokens
            if token.strip()
        )
        return re.compile(pattern or "(?!)")

    def _last_turn(self, messages, guard: str, hole: str) -> "_Turn":
        """The last message, which is the assistant's, as generation would write it."""
        *before, message = messages
        prompt = self._render_stable(before, True)
        text = self._render_stable(messages, False)
        holed = self._render_stable([*before, message | {"content": hole}], False)
        lead, *endings = holed.split(hole)
        turn, here = _Turn(prompt, text), f"messages[{len(before)}]"
        if len(endings) != 1:
            return turn._replace(
                problem=f"it does not write the content of {here} exactly once; use "
                "another template"
            )
        [ending] = endings
        stop = len(text) - len(ending)
        said = "".join(message["content"].split())
        if not (text.endswith(ending) and "".join(text[:stop].split()).endswith(said)):
            return turn._replace(
                problem=f"it changes the content of {here}; fix the messages or use a "
                "template that writes them as they are"
            )
        if not text[:stop].startswith(prompt):
            return turn
        opening = lead[len(prompt) :]
        if opening.strip() and prompt == self._render_stable(before, False):
            return turn._replace(
                problem=f"it ignores add_generation_prompt, yet writes {opening!r} before "
                "a response; let it write that when add_generation_prompt is true"
            )
        stops = []
        for start, end, _ in self._find_marks(text, guard, [stop, len(text)]):
            # Further ones follow the first without a gap.
            if not stops or start == stops[-1]:
                stops.append(end)
        if not stops:
            return turn._replace(
                problem="no special token ends the assistant's turn (found "
                f"{ending!r} after its content), so the model would never learn to "
                "stop; set model.chat_template to a template that writes a token of the "
                "vocabulary there, such as eos_token"
            )
        return turn._replace(content_stop=stop, stops=stops)

    def _check_turn_tokens(self, messages, guard: str) -> None:
        for message in messages:
            content = message["content"]
            marks = self._find_marks(content, guard, [0, len(content)])
            for *_, token_id in marks:
                if token_id in self._turn_tokens:
                    raise InputError(
                        f"a message contains {self.model.id_to_token(token_id)!r}, "
                        "which the chat template uses and the tokenizer cannot encode as "
                        "text; drop the record or mark the token as special in the "
                        "tokenizer"
                    )

    @functools.cached_property
    def _turn_tokens(self) -> frozenset[int]:
        """The tokens that begin and end the assistant's turns."""
        guard, hole, messages = self._guarded(_EXCHANGE)
        try:
            before, prompt = (
                self._render_stable(messages[:1], p) for p in (False, True)
            )
            turn = self._last_turn(messages, guard, hole)
        except InputError:  # It is reported when a conversation needs the template.
            return frozenset()
        opening = self._find_marks(prompt, guard, [len(before), len(prompt)])[:1]
        ending = self._find_marks(turn.text, guard, [turn.content_stop, len(turn.text)])
        ending = [mark for mark in ending if mark[1] in turn.stops]
        return frozenset(token_id for *_, token_id in opening + ending)

    def _find_marks(self, text: str, guard: str, edges) -> list[tuple[int, int, int]]:
        """The template's tokens between edges of a text: (start, stop, id), in order."""
        pattern, ids = self.model.marks
        return [
            (*match.span(), ids[match[0] if match[0] in ids else match[0].strip()])
            for start, stop in itertools.pairwise(edges)
            for match in pattern.finditer(text, start, stop)
            if not text.startswith(guard, match.end())
        ]

    def _encode_parts(self, text: str, guard: str, loss_spans):
        """The ids of a text, and whether each lies within a span of `loss_spans`."""
        cuts = [start for start, _ in loss_spans]
        marks = self._find_marks(text, guard, sorted({0, len(text), *cuts}))
        known = {start: token_id for start, _, token_id in marks}
        after_mark = {stop for _, stop, _ in marks}
        ids, mask = [], []
        edges = {0, len(text), *known, *after_mark, *cuts}
        for start, stop in itertools.pairwise(sorted(edges)):
            plain = text[start:stop].replace(guard, "")
            if start in known:
                part = [known[start]]
            elif start == 0:
                part = self.model.encode(plain)
            else:
                part = self.model.encode_next(plain, start in after_mark)
            ids += part
            mask += [any(a <= start < b for a, b in loss_spans)] * len(part)
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise InputError(
                "chat template: it begins with the BOS token twice; remove one"
            )
        return ids, mask

    def save(self, folder: str) -> None:
        """Writes the files from which transformers' AutoTokenizer builds its own.

        The files that were beside a loaded vocabulary are written too, see `companions`.
        """
        target = epath.Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        says = {
            **self.model.save(target),
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
        }
        ids = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        for name, token_id in ids.items():
            is_none = token_id is None
            says[f"{name}_token"] = (
                None if is_none else self.model.id_to_token(token_id)
            )
        self.companions.save(target, says, self.chat_template)


def load(path: str, chat_template: str = "") -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a folder with `tokenizer.json` or `tokenizer.model`, or a `.json`, `.model`
        or `.gguf` file, also on the Hub, see `data.hub`. The files beside it are read
        too, see `companions`.
      chat_template: a file with a Jinja template to use instead of the tokenizer's own, see
        `Tokenizer.with_template`; empty: none.

    Raises:
      InputError: a file is missing, malformed or of an unsupported kind.
    """
    loaded = _load(path)
    if chat_template:
        file = paths.require_file(hub.local_model(chat_template))
        return loaded.with_template(companions.read_template(file))
    templates = loaded.companions.templates
    if templates and loaded.chat_template is None:
        raise InputError(
            f"{path}: has chat templates named {', '.join(sorted(templates))} and no "
            "default; set model.chat_template to a file with one of them"
        )
    return loaded


def _load(path: str) -> Tokenizer:
    path = hub.local_model(path)
    resolved = paths.resolve(path)
    if resolved.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        files = [resolved / name for name in names if (resolved / name).exists()]
        if not files:
            raise InputError(f"{path}: holds none of {', '.join(names)}")
        file = files[0]
    else:
        file = paths.require_file(path)
    match file.suffix:
        case ".json":
            return _load_json(file)
        case ".model":
            return _load_sentencepiece(file)
        case ".gguf":
            return _load_gguf(file)
    raise InputError(f"{path}: a tokenizer file ends in .json, .model or .gguf")


def _require_vocabulary(tokenizer: Tokenizer, file: epath.Path) -> Tokenizer:
    """Checks that ids are below a bound and those that end generation are tokens."""
    if tokenizer.vocab_size > _MOST_IDS:
        raise InputError(
            f"{file}: has ids up to {tokenizer.vocab_size - 1:,}, supported are ids below "
            f"{_MOST_IDS:,}; {headers.AGAIN}"
        )
    for token_id in tokenizer.companions.ends:
        if token_id >= tokenizer.vocab_size:
            raise InputError(
                f"{companions.ends_file(file.parent)}: eos_token_id is {token_id}; "
                f"{file.name} has ids up to {tokenizer.vocab_size - 1}"
            )
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, where: str) -> None:
    """Checks that every token that a text can become has an embedding.

    The embedding may be padded. Special tokens may lack an embedding if no text is encoded
    to them, such as Gemma 3's image tokens. BOS and EOS must have one.

    Raises:
      InputError: the tokenizer produces ids that the model does not have.
    """
    needed = {tokenizer.bos_id, tokenizer.eos_id} - {None}
    for token_id in range(model_vocab_size, tokenizer.vocab_size):
        token = tokenizer.model.id_to_token(token_id)
        if token_id in needed or token not in {None, *tokenizer.special_tokens}:
            raise InputError(
                f"{where}: the tokenizer has {tokenizer.vocab_size} tokens, such as "
                f"{token!r}, the model embeds {model_vocab_size}; use the tokenizer the "
                "model was trained with"
            )


def shared_size(ours: Tokenizer, theirs: Tokenizer, own: str, other: str) -> int:
    """The number of tokens of two tokenizers that have the same ones.

    llama.cpp's files name a row without a token `[PAD` and its id; it counts as padding.

    Args:
      ours, theirs: the model's and the teacher's.
      own, other: their paths, for the message.

    Raises:
      InputError: names the first id with different tokens, and both sizes.
    """

    def tokens(tokenizer: Tokenizer) -> list[str | None]:
        found = map(tokenizer.model.id_to_token, range(tokenizer.vocab_size))
        found = [None if t == f"[PAD{i}]" else t for i, t in enumerate(found)]
        while found and found[-1] is None:
            found.pop()
        return found

    one, two = tokens(ours), tokens(theirs)
    pairs = enumerate(itertools.zip_longest(two, one))
    if found := next(((i, pair) for i, pair in pairs if pair[0] != pair[1]), None):
        token_id, pair = found
        token, expected = (text_lib.value(repr(t)) for t in pair)
        raise InputError(
            f"{other}: the teacher's {len(two)} tokens are not the {len(one)} of the model "
            f"in {own}: token {token_id} is {token} instead of {expected}; use a teacher "
            "with the model's vocabulary"
        )
    return len(one)


def _load_json(file: epath.Path) -> Tokenizer:
    beside = companions.read(file)
    source = small_files.read_text(file, headers.AGAIN, MOST_BYTES_OF_VOCABULARY)
    try:
        model = JsonModel(source)
    except Exception as error:  # The library raises nothing more specific.
        raise InputError(
            f"{file}: not a tokenizer.json ({text_lib.value(str(error))}); {headers.AGAIN}"
        ) from error
    if beside.added:
        model = JsonModel(_with_added_json(source, beside, file))
    own = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    return _with_companions(model, beside, own, file)


def _load_sentencepiece(file: epath.Path) -> Tokenizer:
    beside = companions.read(file)
    published = small_files.read_bytes(file, headers.AGAIN, MOST_BYTES_OF_VOCABULARY)
    legacy = beside.config.get("legacy") is True
    try:
        model = SentencePieceModel(published, legacy)
        own = {
            "bos_token": model.bos_id,
            "eos_token": model.eos_id,
            "pad_token": model.pad_id,
        }
        extended = _with_added_pieces(published, beside, file)
        if extended != published:
            model = SentencePieceModel(extended, legacy, published)
    except (RuntimeError, ValueError, DecodeError) as error:
        raise InputError(f"{file}: not a sentencepiece model ({error})") from error
    return _with_companions(model, beside, own, file)


def _with_companions(
    model: JsonModel | SentencePieceModel,
    beside: Companions,
    own: dict[str, int | None],
    file: epath.Path,
) -> Tokenizer:
    """A tokenizer from a vocabulary and the files beside it.

    Args:
      own: the special tokens that the model itself has.
    """
    ids = dict(own)
    for name, token in beside.special_tokens().items():
        ids[name] = None if token is None else model.token_to_id(token)
        if token is not None and ids[name] is None:
            raise InputError(
                f"{companions.place_of(file, beside, name)}: {name} is {token!r}, which "
                f"is not in the vocabulary of {file.name}"
            )
    for name, tokens in beside.other_tokens().items():
        for token in tokens:
            if model.token_to_id(token) is None:
                raise InputError(
                    f"{companions.place_of(file, beside, name)}: {name} has {token!r}, "
                    f"which is not in the vocabulary of {file.name}; remove it, or add it "
                    "to the vocabulary and its row to the weights"
                )
    bos_id, eos_id, pad_id = ids.values()
    add_bos = beside.config.get("add_bos_token")
    if add_bos is None and isinstance(model, JsonModel):
        add_bos = bos_id is not None and model.starts_with(bos_id)
    elif add_bos is None:
        add_bos = bos_id is not None
    place = f"{companions.place_of(file, beside, 'bos_token')}: bos_token"
    _check_has_bos(place, add_bos, bos_id)
    template = beside.templates.get("default")
    loaded = Tokenizer(model, bos_id, eos_id, pad_id, add_bos, template, beside)
    return _require_vocabulary(loaded, file)


def _with_added_json(source: str, beside: Companions, file: epath.Path) -> str:
    """A `tokenizer.json` with the tokens that the files beside it add or flag."""
    shape = {"added_tokens": [{"id": int}]}
    raw = small_files.parse(source, str(file), shape, headers.AGAIN, is_ours=False)
    known = {token["id"]: token for token in raw["added_tokens"]}
    is_whole = "added_tokens_decoder" in beside.config
    given = {
        token_id: token
        for token_id, token in sorted(beside.added.items())
        # The older file does not store flags for tokens that are in the vocabulary.
        if token_id not in known or is_whole
    }
    if all(
        token_id in known
        and known[token_id]["content"] == token.content
        and all(known[token_id][name] == flag for name, flag in token.flags.items())
        for token_id, token in given.items()
    ):
        return source
    model = tokenizers.Tokenizer.from_str(source)
    for token_id, token in given.items():
        flags = token.flags
        add = model.add_special_tokens if flags.pop("special") else model.add_tokens
        add([tokenizers.AddedToken(token.content, **flags)])
        if model.token_to_id(token.content) != token_id:
            raise _disagrees(
                file, token_id, token, f"id {model.token_to_id(token.content)}"
            )
    return model.to_str()


def _with_added_pieces(source: bytes, beside: Companions, file: epath.Path) -> bytes:
    """A sentencepiece model with the tokens that the files beside it add or flag."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(source)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    puts_space = beside.config.get("legacy") and proto.normalizer_spec.add_dummy_prefix
    for token_id, token in sorted(beside.added.items()):
        strips = token.lstrip or token.rstrip or token.single_word
        if strips or (puts_space and not token.special):
            raise InputError(
                f"{file.parent}: added token {token.content!r} changes the text around "
                "it, which sentencepiece does not support; save it as tokenizer.json by "
                "`AutoTokenizer.from_pretrained(old).save_pretrained(new)`"
            )
        # Sentencepiece searches for them after spaces are marked.
        spelt = token.content.replace(" ", "▁")
        if ids.setdefault(spelt, len(proto.pieces)) != token_id:
            raise _disagrees(file, token_id, token, f"id {ids[spelt]}")
        if token_id == len(proto.pieces):
            proto.pieces.add(piece=spelt, score=0.0, type=kinds.NORMAL)
        piece = proto.pieces[token_id]
        if piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            piece.type = kinds.CONTROL if token.special else kinds.USER_DEFINED
    return proto.SerializeToString() if beside.added else source


def _disagrees(file: epath.Path, token_id: int, token: Added, found: str) -> InputError:
    return InputError(
        f"{file.parent}: added token {token.content!r} has id {token_id} in the files "
        f"beside {file.name}, where it has or would get {found}; use the files of one "
        "tokenizer"
    )


def _rewriting(number: int, turn: _Turn, text: str) -> str:
    """Describes how a conversation's text differs from a turn as generation writes it."""
    is_prompt = not text.startswith(turn.prompt)
    what, shorter = ("prompt", turn.prompt) if is_prompt else ("turn", turn.text)
    pairs = enumerate(zip(shorter, text, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), len(text))
    here = slice(at, at + 40)
    return (
        f"the {what} of messages[{number}] is not how the whole conversation begins: "
        f"{shorter[here]!r} against {text[here]!r}; use a template that rewrites no "
        "earlier turns"
    )


def _load_gguf(file: epath.Path) -> Tokenizer:
    header = gguf_header(open_gguf(file), file)
    kind = header.text("tokenizer.ggml.model")
    header.require("tokenizer.ggml.model", ("gpt2", "llama"))
    template = header.text("tokenizer.chat_template", None)
    header = header.within("tokenizer.ggml.")
    pre = header.text("pre", None)
    vocabulary = gguf_vocabulary.read_tokens(header, kind)
    bos_id, eos_id, pad_id = (
        gguf_vocabulary.special_id(header, f"{name}_token_id", vocabulary)
        for name in ("bos", "eos", "padding")
    )
    # llama.cpp's defaults for files without the key.
    add_bos = header.flag("add_bos_token", kind == "llama" or pre == "llama-bpe")
    if bos_id is None and header.get("add_bos_token") is None:
        add_bos = False
    _check_has_bos(f"{file}: tokenizer.ggml.bos_token_id", add_bos, bos_id)
    if kind == "gpt2":
        model = gguf_vocabulary.make_bpe(
            header, vocabulary, bos_id if add_bos else None
        )
    else:
        model = gguf_vocabulary.make_sentencepiece(
            header, vocabulary, bos_id, eos_id, pad_id
        )
    return Tokenizer(model, bos_id, eos_id, pad_id, add_bos, template)


def _check_has_bos(place: str, add_bos: bool, bos_id: int | None) -> None:
    if add_bos and bos_id is None:
        raise InputError(
            f"{place} is missing, and add_bos_token is true; name the token, or set "
            "add_bos_token to false"
        )


_compiled = functools.lru_cache(template_sandbox.Template)
