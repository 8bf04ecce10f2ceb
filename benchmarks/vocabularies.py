"""Small tokenizers of every type, trained on the project's own texts.

One vocabulary with a dummy prefix has three forms: a sentencepiece `tokenizer.model`, and
`tokenizer.json` with the normalizer `Prepend` or the pre-tokenizer `Metaspace`. The fourth
type is byte-level BPE.
"""

import functools
import json
import pathlib

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mixcpt_jax.core import paths

TYPES = ("sentencepiece", "prepend", "metaspace", "byte-level")
_BOS, _EOS = "<s>", "</s>"


def texts() -> list[str]:
    file = paths.require_file("package:mixcpt_jax/assets/general_text.jsonl")
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def write(kind: str, folder: pathlib.Path) -> None:
    """Writes the files of a tokenizer of a type.

    All types except byte-level BPE put BOS before a text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(_sentencepiece())
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    elif kind == "byte-level":
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(
            texts(), vocab_size=600, special_tokens=[_EOS], show_progress=False
        )
        bpe.save(str(folder / "tokenizer.json"))
        config = {"eos_token": _EOS}
    else:
        _with_prefix(kind).save(str(folder / "tokenizer.json"))
        config = {"bos_token": _BOS, "eos_token": _EOS}
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@functools.cache
def _sentencepiece() -> bytes:
    trained = _Bytes()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        max_sentence_length=100_000,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return trained.content


class _Bytes:
    content = b""

    def write(self, content: bytes) -> None:
        self.content += content


def _with_prefix(kind: str) -> tokenizers.Tokenizer:
    """The sentencepiece model as a `tokenizer.json`."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(_sentencepiece())
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in vocabulary
        if not piece.startswith("<")
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"
        )
    )
    if kind == "prepend":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="always", split=False
        )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens([_BOS, _EOS])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, vocabulary[_BOS])]
    )
    return made
