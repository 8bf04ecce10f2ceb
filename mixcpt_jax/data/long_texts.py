"""Tokens of texts of any length, in memory that does not grow with the text.

While it encodes a text, a tokenizer uses hundreds of bytes per token, so long texts are
encoded in pieces. A cut must not change the tokens: it lies before whitespace, and the
tokens of the text around it must be the same with and without the cut.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

# Number of characters in a piece, in the texts encoded together, and on each side of a cut
# for the comparison of tokens.
PIECE, _BLOCK, _CONTEXT = 2**16, 2**20, 256
_TEXTS_PER_BLOCK = 1024
# Number of cuts to try before making the piece longer.
_MOST_TRIES = 32
# Try line ends first: few tokens span them.
_CUTS = (re.compile(r"(?<=\S)(?=\n)"), re.compile(r"(?<=\S)(?=\s)"))


def encode(tokenizer, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Encodes plain texts.

    Args:
      tokenizer: has `encode_batch`; if it has no `encode_rest`, every text is encoded
        whole.
      texts: read lazily.

    Yields:
      The tokens of each text, int32, the same as `encode_batch` gives for the whole text.
    """
    cuts_texts = hasattr(tokenizer, "encode_rest")
    for block in _blocks(texts):
        if len(block) == 1 and cuts_texts and len(block[0]) > PIECE:
            yield _in_pieces(tokenizer, block[0])
        else:
            yield from (np.array(i, np.int32) for i in tokenizer.encode_batch(block))


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups of texts to encode together; a long text forms its own group."""
    block: list[str] = []
    size = 0
    for text in texts:
        is_long = len(text) > PIECE
        if block and (
            is_long or size + len(text) > _BLOCK or len(block) == _TEXTS_PER_BLOCK
        ):
            yield block
            block, size = [], 0
        if is_long:
            yield [text]
        else:
            block.append(text)
            size += len(text)
    if block:
        yield block


def _in_pieces(tokenizer, text: str) -> np.ndarray:
    cuts = [0, *_cuts(tokenizer, text), len(text)]
    pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
    [first] = tokenizer.encode_batch([next(pieces)])
    rests = (np.array(tokenizer.encode_rest(piece), np.int32) for piece in pieces)
    return np.concatenate([np.array(first, np.int32), *rests])


def _cuts(tokenizer, text: str) -> Iterator[int]:
    """The positions at which to cut a text, about every `PIECE` characters."""
    start = 0
    while len(text) - start > PIECE:
        tries = _tries(text, start)
        start = next((cut for cut in tries if _is_safe(tokenizer, text, cut)), None)
        if start is None:
            return
        yield start


def _tries(text: str, start: int) -> Iterator[int]:
    """Cuts to try, best first; each try searches twice as far as the previous one."""
    end = start + PIECE
    reach = PIECE // 2
    while True:
        low, high = max(start + PIECE // 2, end - reach), min(end, len(text))
        for pattern in _CUTS:
            found = (match.start() for match in pattern.finditer(text, low, high))
            yield from itertools.islice(found, _MOST_TRIES)
        if high == len(text):
            return
        end, reach = end + reach, 2 * reach


def _is_safe(tokenizer, text: str, cut: int) -> bool:
    before = text[max(cut - _CONTEXT, 0) : cut]
    after = text[cut : cut + _CONTEXT]
    whole, left = tokenizer.encode_batch([before + after, before])
    return list(whole) == [*left, *tokenizer.encode_rest(after)]
