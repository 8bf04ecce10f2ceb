"""Vocabularies: `tokenizer.json` and sentencepiece models behind one interface.

Data workers receive these objects by pickle.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import sentencepiece
import tokenizers
from etils import epath
from sentencepiece import sentencepiece_model_pb2


class JsonModel:
    """The `tokenizers` library on the contents of a `tokenizer.json`."""

    def __init__(self, source: str):
        self.source = source
        self._plain = self._build(source, special_as_text=True)
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        # Ids may have holes, so this is not the number of tokens.
        self.vocab_size = max(vocabulary.values()) + 1

    def __reduce__(self):
        return JsonModel, (self.source,)

    @staticmethod
    def _build(source: str, special_as_text: bool) -> tokenizers.Tokenizer:
        model = tokenizers.Tokenizer.from_str(source)
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = special_as_text
        return model

    @functools.cached_property
    def _special(self) -> tokenizers.Tokenizer:
        # Keep a second copy, because switching the flag back and forth is not thread-safe.
        return self._build(self.source, special_as_text=False)

    @functools.cached_property
    def _after_mark(self) -> tokenizers.Tokenizer:
        return self._without_leading_space(after_mark=True)

    @functools.cached_property
    def _after_text(self) -> tokenizers.Tokenizer:
        return self._without_leading_space(after_mark=False)

    def _without_leading_space(self, after_mark: bool) -> tokenizers.Tokenizer:
        raw = json.loads(self.source)
        steps = {
            key: _drop_leading_space(raw.get(key), after_mark)
            for key in ("normalizer", "pre_tokenizer")
        }
        if all(raw.get(key) == step for key, step in steps.items()):
            return self._plain
        return self._build(json.dumps(raw | steps), special_as_text=True)

    @functools.cached_property
    def marks(self) -> tuple[re.Pattern, dict[str, int]]:
        """See `_marks`."""
        added = self._plain.get_added_tokens_decoder()
        return _marks(
            {
                token.content: (
                    token_id,
                    (r"\s*" if token.lstrip else "")
                    + re.escape(token.content)
                    + (r"\s*" if token.rstrip else ""),
                )
                for token_id, token in added.items()
                if token.content.strip()
            }
        )

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_with_special(self, text: str) -> list[int]:
        return self._special.encode(text, add_special_tokens=False).ids

    def encode_next(self, text: str, after_mark: bool) -> list[int]:
        model = self._after_mark if after_mark else self._after_text
        return model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._plain.decode(list(ids), skip_special_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        return self._plain.id_to_token(token_id)

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        added = self._plain.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @functools.cached_property
    def unknown_id(self) -> int | None:
        """The id of a character that the vocabulary lacks; None: it is dropped."""
        model = json.loads(self.source)["model"]
        if model.get("unk_token") is not None:
            return self.token_to_id(model["unk_token"])
        return model.get("unk_id")

    def starts_with(self, token_id: int) -> bool:
        """Whether the post-processor puts this token before a text."""
        return self._plain.encode("").ids[:1] == [token_id]

    def save(self, folder: epath.Path) -> dict[str, Any]:
        """Writes its file; returns its keys of `tokenizer_config.json`."""
        (folder / "tokenizer.json").write_text(self.source)
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


class SentencePieceModel:
    """The sentencepiece library on the contents of a `tokenizer.model`.

    If the model puts a space before every text, transformers' LlamaTokenizer puts it only
    before the first text or, if `legacy`, before each text after a special token, unless
    that text begins with a space.
    """

    def __init__(
        self, source: bytes, legacy: bool = False, published: bytes | None = None
    ):
        """
        Args:
          source: the model, with added tokens as pieces.
          legacy: see above.
          published: the model without them, which an export writes.
        """
        self.source = source
        self.legacy = legacy
        self.published = published
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(source)
        self.vocab_size = self._model.get_piece_size()
        self.bos_id, self.eos_id, self.pad_id = (
            None if token_id < 0 else token_id
            for token_id in (
                self._model.bos_id(),
                self._model.eos_id(),
                self._model.pad_id(),
            )
        )

    def __reduce__(self):
        published = () if self.published is None else (self.published,)
        return SentencePieceModel, (self.source, self.legacy, *published)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_special(self, text: str) -> list[int]:
        pattern, special = self._control
        first, *rest = pattern.split(text)
        ids = self._model.encode(first)
        for part in rest:
            known = part in special
            ids += [special[part]] if known else self.encode_next(part, True)
        return ids

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        return frozenset(self._control[1])

    @property
    def unknown_id(self) -> int | None:
        """The id of a character that the vocabulary lacks; None: it is dropped."""
        token_id = self._model.unk_id()
        return None if token_id < 0 else token_id

    @functools.cached_property
    def _control(self) -> tuple[re.Pattern, dict[str, int]]:
        """A pattern of the control tokens, and their ids."""
        special = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._model.is_control(i)
        }
        pattern = "|".join(map(re.escape, special)) or "(?!)"
        return re.compile(f"({pattern})"), special

    @functools.cached_property
    def _after_text(self) -> sentencepiece.SentencePieceProcessor:
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.source)
        proto.normalizer_spec.add_dummy_prefix = False
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(proto.SerializeToString())
        return model

    @functools.cached_property
    def marks(self) -> tuple[re.Pattern, dict[str, int]]:
        """See `_marks`."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.source)
        piece = proto.SentencePiece
        return _marks(
            {
                token.piece: (i, re.escape(token.piece))
                for i, token in enumerate(proto.pieces)
                if token.type in (piece.CONTROL, piece.USER_DEFINED)
                and token.piece.strip("▁ ")
            }
        )

    def encode_next(self, text: str, after_mark: bool) -> list[int]:
        has_space = after_mark and self.legacy and not text.startswith((" ", "▁"))
        return (self._model if has_space else self._after_text).encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])

    def token_to_id(self, token: str) -> int | None:
        token_id = self._model.piece_to_id(token)
        # Sentencepiece returns the unknown token for pieces that it does not have.
        return token_id if self._model.id_to_piece(token_id) == token else None

    def id_to_token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)

    def save(self, folder: epath.Path) -> dict[str, Any]:
        """Writes its file; returns its keys of `tokenizer_config.json`."""
        content = self.source if self.published is None else self.published
        (folder / "tokenizer.model").write_bytes(content)
        proto = sentencepiece_model_pb2.ModelProto.FromString(self.source)
        if not proto.normalizer_spec.add_dummy_prefix:
            return {"tokenizer_class": "GemmaTokenizer"}
        return {"tokenizer_class": "LlamaTokenizer", "legacy": self.legacy}


def _marks(tokens: Mapping[str, tuple[int, str]]) -> tuple[re.Pattern, dict[str, int]]:
    """Finds the tokens that are split off a text before the rest is encoded.

    Args:
      tokens: spelling -> id, and the pattern that finds it.

    Returns:
      (pattern, ids): a match of the pattern is a key of ids, possibly after stripping
      surrounding whitespace.
    """
    # The pattern has no groups: they would make the search much slower.
    longest_first = sorted(tokens, key=len, reverse=True)
    pattern = "|".join(tokens[spelling][1] for spelling in longest_first)
    ids = {spelling: token_id for spelling, (token_id, _) in tokens.items()}
    return re.compile(pattern or "(?!)"), ids


def _drop_leading_space(step: dict | None, after_mark: bool) -> dict | None:
    """A copy of a step of `tokenizer.json` that puts no space before a continued text.

    Args:
      step: a normalizer or a pre-tokenizer.
      after_mark: the text follows an added token, as the library handles it; otherwise it
        continues other text.
    """
    match step:
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            steps = (_drop_leading_space(part, after_mark) for part in step[key])
            return step | {key: [part for part in steps if part is not None]}
        case {"type": "Metaspace"} if (
            not after_mark or step.get("prepend_scheme") == "first"
        ):
            step = {k: v for k, v in step.items() if k != "add_prefix_space"}
            return step | {"prepend_scheme": "never"}
        case {"type": "Prepend"} if not after_mark:
            return None
        case {"type": "ByteLevel"} if not after_mark:
            return step | {"add_prefix_space": False}
    return step
