"""Which few general samples go to format alignment: all of it that needs no model.

Samples are filtered (`candidates`), ranked by what the model after continual
pre-training makes of each response, once after the plain prompt and once in the chat
template (`rank`), and written in that order (`write`).

Shapes: C candidates.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import filters
from mixcpt_jax.data import formats as format_lib
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.data.sources import Record

# Method -> the forms in which the model has to score a sample.
FORMS = {
    "random": (),
    "perplexity": ("plain",),
    "format_alignment": ("plain", "chat"),
}
METHODS = tuple(FORMS)
REASONS = (
    "unusable",
    "no_preference",
    "short_response",
    "too_short",
    "too_long",
    "duplicate",
    "near_duplicate",
    "beyond_limit",
)
# What is found about a record stands under this key of its line.
FIELD = "selection"

# Nats per token: nearer to 0, half precision no longer tells a probability from 1.
_LEAST_NLL = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Samples to choose from, in the order of their source.

    Attributes:
      records: [C].
      plain: C examples: [BOS if the tokenizer adds it and the chat form begins with it]
        + the plain prompt + the response, as the chat template writes it. Its tokens
        alone count, and of them those that the chat form has too.
      chat: C examples: the same in the chat template. The same tokens count: not the
        template's, such as an empty `<think>` block or the end of the turn, nor a first
        word that blanks of the template make other tokens of.
      digests: a hash of each one's normalised text, [C], all different.
      filtered: reason why records were left out -> how many.
    """

    records: list[Record]
    plain: Examples
    chat: Examples
    digests: list[bytes]
    filtered: dict[str, int]


class Measured(NamedTuple):
    """A model's view of the responses; None for a form that was not scored.

    Attributes:
      plain_nll_C, chat_nll_C: negative log-likelihood summed over a response's tokens,
        nats.
      plain_count_C, chat_count_C: how many tokens those are.
    """

    plain_nll_C: np.ndarray | None = None
    plain_count_C: np.ndarray | None = None
    chat_nll_C: np.ndarray | None = None
    chat_count_C: np.ndarray | None = None


class Row(NamedTuple):
    """One candidate's place.

    Attributes:
      candidate: its number among the candidates.
      origin: where the record says it comes from; empty if it does not.
      rank: 1 is the best.
      score: see `scores`.
      perplexity: of the response after the plain prompt, per token.
      plain_nll, chat_nll: of the response, nats per token.
      response_tokens: of the plain form. These four are None where the form was not
        scored.
      selected: the rank is within `keep`, and its origin within the quota.
    """

    candidate: int
    origin: str
    rank: int
    score: float
    perplexity: float | None
    plain_nll: float | None
    chat_nll: float | None
    response_tokens: int | None
    selected: bool


class Ranking(NamedTuple):
    """Candidates by rank.

    Attributes:
      candidates, method, keep: what was ranked, how, and how many are wanted.
      rows: [C], by rank.
      num_selected: less than `keep` if there are no more or the quota admits no more.
      num_held_back: candidates that the quota kept out of the first `keep`.
    """

    candidates: Candidates
    method: str
    keep: int
    rows: list[Row]
    num_selected: int
    num_held_back: int


def candidates(
    records: Iterable[Record],
    format: str,
    tokenizer,
    fields: Mapping[str, str] | None = None,
    *,
    max_tokens: int,
    min_tokens: int = 1,
    min_response_tokens: int = 1,
    near_duplicates: float = 0.8,
    on_bad_record: str = "refuse",
    max_candidates: int = 0,
    seed: int = 0,
) -> Candidates:
    """Reads, filters and encodes the samples to choose from.

    Left out are, in this order, with `on_bad_record='skip'` records that are `unusable`,
    because they lack what they need or the chat template refuses them; preferences with
    `no_preference`, whose rejected answer is blank or the chosen one; those with a
    `short_response`; records that are `too_short` or `too_long`; `duplicate`, whose
    prompt and response are an earlier one's but for case and white space;
    `near_duplicate`; and, of what remains, those `beyond_limit`. The earliest of several
    duplicates stays.

    Args:
      records: see `sources.read`; they are read once.
      format: what they are in continual pre-training: 'instruction', 'preference' or
        'chat'; see `formats.prompt_and_response`.
      tokenizer: has `encode_batch`, `encode_chat`, `encode_response`,
        `model.encode_next`, `add_bos` and `bos_id`.
      fields: our field name -> the source's name for it, where they differ.
      max_tokens, min_tokens: bounds of the chat form's length, inclusive; of a
        preference, of the longer side's.
      min_response_tokens: of the response, those that count. Ratios of one or two tokens'
        NLLs are mostly noise, and extreme ones.
      on_bad_record: 'refuse' or 'skip'.
      max_candidates: how many remain at most, those that 'random' with this `seed` would
        select first; 0: no limit.
      near_duplicates: from this Jaccard similarity of the sets of word 5-grams on, as
        MinHash estimates it (see `filters.Seen`), a record is a near duplicate; 0: none is.

    Raises:
      InputError: see `formats.prompt_and_response` and `formats.chat_pair`; a field
        `selection` that no earlier selection wrote; no record is left.
    """
    filtered = dict.fromkeys(REASONS, 0)
    kept, texts, chats, digests = [], [], [], []
    seen = filters.Seen(near_duplicates)
    for record in records:
        _check_field_is_free(record)
        try:
            prompt, response = format_lib.prompt_and_response(record, format, fields)
            if format != "preference":
                answer = [{"role": "assistant", "content": response}]
                ids, _ = format_lib.encode_answer(
                    prompt, answer, tokenizer, record.place
                )
                length = len(ids)
            elif _prefers(record, response, fields or {}):
                pair = format_lib.chat_pair(record, tokenizer, fields)
                ids = pair.chosen
                length = max(len(pair.chosen), len(pair.rejected))
            else:
                filtered["no_preference"] += 1
                continue
            opening, written = format_lib.encode_response(
                prompt, response, tokenizer, record.place
            )
        except InputError:
            if on_bad_record == "refuse":
                raise
            filtered["unusable"] += 1
            continue
        answer_ids = tokenizer.model.encode_next(written, after_mark=False)
        count = _num_shared(opening[::-1], answer_ids[::-1])
        question = "".join(
            message["content"] + format_lib.SEPARATOR
            for message in prompt
            if message["content"].strip()
        )
        if count < max(min_response_tokens, 1):
            filtered["short_response"] += 1
        elif length < min_tokens:
            filtered["too_short"] += 1
        elif length > max_tokens:
            filtered["too_long"] += 1
        else:
            text = question + response
            words = text.casefold().split()
            findings = filters.Findings(
                "",
                filters.digest(text),
                filters.min_hash(words) if near_duplicates else None,
            )
            if reason := seen.reason(findings):
                filtered[reason] += 1
                continue
            digests.append(findings.digest)
            kept.append(record)
            begins_with_bos = tokenizer.add_bos and opening[0] == tokenizer.bos_id
            texts.append((question, written, answer_ids, count, begins_with_bos))
            # A template's blanks behind the response may be one token with its end.
            is_prefix = list(ids[: len(opening)]) == opening
            chats.append(_ending(ids if is_prefix else opening, len(opening), count))
    if not kept:
        raise InputError(
            f"no sample is left to select from; left out are {filtered}; widen the bounds"
        )
    # What "random" would select first, in the order of the source.
    keys = _keys(digests, seed)
    first = sorted(range(len(kept)), key=keys.__getitem__)[: max_candidates or None]
    filtered["beyond_limit"] = len(kept) - len(first)
    kept, texts, chats, digests = (
        [column[i] for i in sorted(first)] for column in (kept, texts, chats, digests)
    )
    plain = Examples.collect(_encode_plain(texts, tokenizer))
    return Candidates(kept, plain, Examples.collect(chats), digests, filtered)


def scores(
    candidates: Candidates, measured: Measured, method: str, seed: int = 0
) -> np.ndarray:
    """The score of each candidate, float64 [C].

    'perplexity': of the response after the plain prompt, per token; the lowest are
    selected. 'format_alignment': NLL per token of the response in the chat template,
    divided by its NLL per token after the plain prompt; the highest are selected: the
    model knows the content and not the format. This ratio is our own choice, after a
    proposal in the public reviews of the Mix-CPT paper; the paper has a score of this
    name, whose form we do not know. NLLs below 0.001 nats count as 0.001, so that the
    ratio of two certainties is 1. 'random': a hash of seed and content, uniform in
    [0, 1); the lowest are selected.

    Raises:
      InputError: an unknown method, or scores that it needs are missing; a perplexity
        or a ratio that is not finite.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; use one of {list(METHODS)}")
    nll = _per_token(candidates, measured)
    if missing := [form for form in FORMS[method] if form not in nll]:
        raise InputError(f"method {method!r}: needs scores of {' and '.join(missing)}")
    if method == "perplexity":
        return np.exp(nll["plain"])
    if method == "format_alignment":
        plain_C, chat_C = (np.maximum(nll[form], _LEAST_NLL) for form in FORMS[method])
        return chat_C / plain_C
    heads = [int.from_bytes(key[:6]) for key in _keys(candidates.digests, seed)]
    return np.array(heads) / 2**48


def rank(
    candidates: Candidates,
    measured: Measured,
    method: str,
    keep: int,
    seed: int = 0,
    origin_field: str = "",
    origin_share: float = 1.0,
) -> Ranking:
    """Orders the candidates by score, equals by a hash of seed and content.

    At most `ceil(origin_share * keep)` of the selected are of one origin. Those held
    back for that come behind the selected, with all others, in the order of scores.
    Where the quota leaves fewer than `keep`, so few are selected.

    Args:
      candidates, measured: what to rank, and the model's view of it.
      method, seed: see `scores`.
      keep: how many to select.
      origin_field: field of a record that says where it comes from.
      origin_share: greatest share of one origin; 1: no quota.

    Raises:
      InputError: see `scores`; `keep` or `origin_share` is not above 0; there is a
        quota and a record without `origin_field`.
    """
    if keep < 1 or not 0 < origin_share <= 1:
        raise InputError(
            f"keep={keep}, origin_share={origin_share}: 1 or more, and a share above 0 "
            "and at most 1 are wanted"
        )
    score_C = scores(candidates, measured, method, seed)
    cost_C = -score_C if method == "format_alignment" else score_C
    keys = _keys(candidates.digests, seed)
    origins = [_origin(r, origin_field, origin_share < 1) for r in candidates.records]
    # Rounded first, because 0.07 * 100 is a little more than 7.
    quota = math.ceil(round(origin_share * keep, 9))
    selected, others, taken, num_held_back = [], [], collections.Counter(), 0
    for number in sorted(range(len(keys)), key=lambda i: (cost_C[i], keys[i])):
        has_room = origin_share == 1 or taken[origins[number]] < quota
        if len(selected) < keep and has_room:
            selected.append(number)
            taken[origins[number]] += 1
        else:
            num_held_back += len(selected) < keep
            others.append(number)
    nll = _per_token(candidates, measured)
    plain_C, chat_C = (
        nll[form].tolist() if form in nll else [None] * len(keys)
        for form in ("plain", "chat")
    )
    is_scored = "plain" in nll
    rows = [
        Row(
            candidate=number,
            origin=origins[number],
            rank=place,
            score=float(score_C[number]),
            perplexity=math.exp(plain_C[number]) if is_scored else None,
            plain_nll=plain_C[number],
            chat_nll=chat_C[number],
            response_tokens=int(measured.plain_count_C[number]) if is_scored else None,
            selected=place <= len(selected),
        )
        for place, number in enumerate(selected + others, 1)
    ]
    return Ranking(candidates, method, keep, rows, len(selected), num_held_back)


def write(path: epath.PathLike, ranking: Ranking) -> None:
    """Writes the records by rank as JSON lines, the file whole or not at all.

    A line is the record's own fields behind `selection`, the numbers of its `Row` to six
    digits; what was not scored is left out. So the source's `fields` fit this file too,
    read as format 'chat' or, from preferences, 'chat_preference'. Its first `keep` lines
    are what to train on: where fewer are selected, the file ends with them, lest others
    make up for them.
    """
    is_short = ranking.num_selected < ranking.keep
    lines = []
    for row in ranking.rows[: ranking.num_selected if is_short else None]:
        ours = {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in row._asdict().items()
            if name not in ("candidate", "origin") and value is not None
        }
        fields = ranking.candidates.records[row.candidate].fields
        line = {FIELD: ours} | {k: v for k, v in fields.items() if k != FIELD}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    # Half of a surrogate pair is no UTF-8; JSON spells it as Python's escapes do.
    content = "".join(lines).encode("utf-8", "backslashreplace")
    paths.replace(epath.Path(path), content)


def summary(ranking: Ranking) -> dict[str, Any]:
    """Counts and quantiles of the scores, ready for JSON.

    `read` is `candidates` plus the counts in `filtered`; `missing` is what `selected`
    falls short of `keep`; origins come in the order of their size.
    """
    filtered = ranking.candidates.filtered
    selected = ranking.rows[: ranking.num_selected]
    chosen = collections.Counter(row.origin for row in selected)
    origins = collections.Counter(row.origin for row in ranking.rows).most_common()
    return {
        "method": ranking.method,
        "read": len(ranking.rows) + sum(filtered.values()),
        "filtered": dict(filtered),
        "candidates": len(ranking.rows),
        "keep": ranking.keep,
        "selected": len(selected),
        "missing": ranking.keep - len(selected),
        "held_back": ranking.num_held_back,
        "origins": {
            name: {"candidates": count, "selected": chosen[name]}
            for name, count in origins
        },
        "scores": {
            "candidates": _quantiles(ranking.rows),
            "selected": _quantiles(selected),
        },
    }


def _prefers(record: Record, chosen: str, fields: Mapping[str, str]) -> bool:
    # Continual pre-training on the chosen side takes such records as they are.
    rejected = record.fields.get(fields.get("rejected", "rejected"))
    return not isinstance(rejected, str) or rejected.strip() not in ("", chosen.strip())


def _encode_plain(texts: list[tuple[str, str, list[int], int, bool]], tokenizer):
    """Tokens and mask of each (prompt, response, its tokens, how many count, BOS)."""
    wholes = tokenizer.encode_batch(
        [prompt + response for prompt, response, *_ in texts]
    )
    for (prompt, _, answer, count, bos), whole in zip(texts, wholes, strict=True):
        given = whole[: -len(answer)]
        # Continual pre-training cuts up the text as a whole, in which a blank line may
        # be other tokens than at the end of a prompt. Only where a token would reach
        # over the border is the prompt encoded by itself.
        if given + answer != whole:
            [given] = tokenizer.encode_batch([prompt])
        tokens = [tokenizer.bos_id] * bos + given + answer
        yield _ending(tokens, len(tokens), count)


def _ending(ids: Sequence[int], stop: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the mask of `count` of them before `stop`."""
    mask = np.zeros(len(ids), bool)
    mask[stop - count : stop] = True
    return np.array(ids, np.int32), mask


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = zip(ids, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _per_token(candidates: Candidates, measured: Measured) -> dict[str, np.ndarray]:
    """Form -> NLL per token of each response, float64 [C]; of the forms scored."""
    nll, size = {}, len(candidates.records)
    for form, sums_C, count_C in (
        ("plain", measured.plain_nll_C, measured.plain_count_C),
        ("chat", measured.chat_nll_C, measured.chat_count_C),
    ):
        if sums_C is None:
            continue
        with np.errstate(all="ignore"):
            nll_C = np.asarray(sums_C, np.float64) / np.asarray(count_C, np.float64)
            is_finite_C = np.isfinite(np.exp(nll_C)) & np.isfinite(nll_C / _LEAST_NLL)
        for number in np.flatnonzero(~is_finite_C.reshape(size))[:1]:
            raise InputError(
                f"{candidates.records[number].place}: the response has an NLL of "
                f"{nll_C[number]} nats per token in its {form} form, which makes no "
                "finite score; check the model"
            )
        nll[form] = nll_C
    return nll


def _keys(digests: list[bytes], seed: int) -> list[bytes]:
    prefix = f"{seed} ".encode()
    return [hashlib.blake2b(prefix + digest).digest() for digest in digests]


def _origin(record: Record, name: str, is_needed: bool) -> str:
    if is_needed and name not in record.fields:
        raise InputError(
            f"{record.place}: no field {name!r} to tell origins by; set origin_field, "
            "or origin_share to 1"
        )
    return str(record.fields.get(name, ""))


def _quantiles(rows: list[Row]) -> dict[str, float]:
    names = ("min", "p25", "median", "p75", "max")
    values = np.quantile([row.score for row in rows], np.linspace(0, 1, len(names)))
    return dict(zip(names, values.tolist(), strict=True))


def _check_field_is_free(record: Record) -> None:
    value = record.fields.get(FIELD)
    if FIELD in record.fields and not (isinstance(value, dict) and "rank" in value):
        raise InputError(
            f"{record.place}: has a field {FIELD!r}, where the result would be written; "
            "rename it"
        )
