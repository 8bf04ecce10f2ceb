"""The vocabulary in a GGUF file, rebuilt as byte-level BPE or a sentencepiece model."""

import collections
import math
from typing import Any

import gguf
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models.headers import Header
from mixcpt_jax.models.vocabulary import JsonModel, SentencePieceModel

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> pre_tokenizers.PreTokenizer:
    pattern = tokenizers.Regex(f"{_WORDS}|{numbers}|{_REST}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer | None:
    """The text split before BPE merges, named by GGUF's `tokenizer.ggml.pre`."""
    match name:
        case "gpt-2":
            return pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "smollm":
            return pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        case "llama-bpe":
            return _split(r"\p{N}{1,3}")
        case "qwen2":
            return _split(r"\p{N}")


def special_id(header: Header, key: str, vocabulary, default=None) -> int | None:
    return header.integer(key, default, least=0, most=len(vocabulary) - 1)


def read_tokens(header: Header, kind: str) -> list[tuple[str, int]]:
    """Each token with its type."""
    tokens = header.many("tokens", lambda t: isinstance(t, str), "a list of strings")
    kinds = tuple(map(int, gguf.TokenType))
    types = header.many(
        "token_type",
        kinds.__contains__,
        f"a list of integers from {min(kinds)} to {max(kinds)}",
    )
    if len(types) != len(tokens) or not tokens:
        raise InputError(
            f"{header.file}: {header.prefix}token_type has {len(types)} items for the "
            f"{len(tokens)} of {header.prefix}tokens; download the file again"
        )
    if len(set(tokens)) < len(tokens):
        counts = collections.Counter(tokens)
        (twice, count), *_ = counts.most_common(1)
        raise InputError(
            f"{header.file}: {header.prefix}tokens has {twice!r} {count} times; use the "
            "model's own tokenizer.json instead"
        )
    return list(zip(tokens, types, strict=True))


def make_bpe(header: Header, vocabulary, leading_id: int | None) -> JsonModel:
    pre = header.text("pre", None)
    pre_tokenizer = _pre_tokenizer(pre)
    if pre_tokenizer is None:
        raise InputError(
            f"{header.file}: tokenizer.ggml.pre is {pre!r}; supported: gpt-2, smollm, "
            "llama-bpe, qwen2. Use the model's own tokenizer.json instead"
        )
    ids = {token: i for i, (token, _) in enumerate(vocabulary)}

    def is_merge(merge: Any) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else ()
        return len(parts) == 2 and {*parts, "".join(parts)} <= ids.keys()

    merges = header.many("merges", is_merge, "a list of pairs of its tokens")
    model = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[tuple(merge.split(" ")) for merge in merges],
            ignore_merges=pre == "llama-bpe",
        )
    )
    model.pre_tokenizer = pre_tokenizer
    model.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        model.normalizer = normalizers.NFC()
    for token, kind in vocabulary:
        added = tokenizers.AddedToken(token, normalized=False)
        if kind == gguf.TokenType.CONTROL:
            model.add_special_tokens([added])
        elif kind == gguf.TokenType.USER_DEFINED:
            model.add_tokens([added])
    if leading_id is not None:
        bos = vocabulary[leading_id][0]
        model.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, leading_id)]
        )
    return JsonModel(model.to_str())


def make_sentencepiece(
    header: Header, vocabulary, bos_id, eos_id, pad_id
) -> SentencePieceModel:
    scores = header.many(
        "scores",
        lambda s: isinstance(s, int | float) and math.isfinite(s),
        "a list of finite numbers",
    )
    if len(scores) != len(vocabulary):
        raise InputError(
            f"{header.file}: {header.prefix}scores has {len(scores)} items for the "
            f"{len(vocabulary)} of {header.prefix}tokens; download the file again"
        )
    proto = sentencepiece_model_pb2.ModelProto()
    for (token, kind), score in zip(vocabulary, scores, strict=True):
        if kind == gguf.TokenType.USER_DEFINED:
            # GGUF spells them as in texts; sentencepiece searches for them after spaces are
            # marked.
            token = token.replace(" ", "▁")
        # The two formats use the same numbers for token types.
        proto.pieces.add(piece=token, score=score, type=kind)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(vocabulary)
    trainer.byte_fallback = True
    trainer.bos_id, trainer.eos_id, trainer.pad_id = (
        -1 if token_id is None else token_id for token_id in (bos_id, eos_id, pad_id)
    )
    trainer.unk_id = special_id(header, "unknown_token_id", vocabulary, 0)
    trainer.unk_piece = vocabulary[trainer.unk_id][0]
    # Gemma's files mark it as a control token; sentencepiece would then have no such token.
    proto.pieces[
        trainer.unk_id
    ].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNKNOWN
    if bos_id is not None:
        trainer.bos_piece = vocabulary[bos_id][0]
    if eos_id is not None:
        trainer.eos_piece = vocabulary[eos_id][0]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = header.flag("add_space_prefix", True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    try:
        # llama.cpp puts a space before each text after a special token.
        return SentencePieceModel(proto.SerializeToString(), legacy=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{header.file}: {header.prefix}tokens is not a sentencepiece vocabulary "
            f"({error}); use the model's own tokenizer.model instead"
        ) from error
