"""Selects a few general samples for format alignment; does not run a model.

`candidates` filters the samples. `rank` orders them by a score, such as one computed from
the model's loss on each response after the plain prompt and in the chat template. `write`
writes them in that order.

Shapes: C candidates.
"""

import collections
import dataclasses
import hashlib
import itertools
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

# Method -> the forms of a sample that the model has to score.
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
    "too_long",
    "duplicate",
    "near_duplicate",
    "beyond_limit",
)
# Key of a line under which the fields of its `Row` are stored.
FIELD = "selection"

# Nats per token: below, half precision cannot distinguish a probability from 1.
_LEAST_NLL = 1e-3


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """Samples to choose from, in the order of their source.

    Attributes:
      records: [C].
      plain: C examples: [BOS if the tokenizer adds it and the chat form begins with it]
        + the plain prompt + the response, as the chat template writes it. The loss tokens
        are the response's tokens that the chat form shares.
      chat: C examples: the same in the chat template, with the same loss tokens. These
        exclude the template's own tokens, such as an empty `<think>` block or the end of
        the turn, and a first word that tokenizes differently because of the template's
        whitespace.
      digests: a hash of each one's normalized text, [C]; all are different.
      filtered: reason -> number of records left out.
    """

    records: list[Record]
    plain: Examples
    chat: Examples
    digests: list[bytes]
    filtered: dict[str, int]


class Measured(NamedTuple):
    """A model's scores of the responses; None for a form that was not scored.

    Attributes:
      plain_nll_C, chat_nll_C: negative log-likelihood summed over the response's loss
        tokens, nats.
      plain_count_C, chat_count_C: the number of those tokens.
    """

    plain_nll_C: np.ndarray | None = None
    plain_count_C: np.ndarray | None = None
    chat_nll_C: np.ndarray | None = None
    chat_count_C: np.ndarray | None = None


class Row(NamedTuple):
    """One candidate's rank.

    Attributes:
      candidate: its number among the candidates.
      origin: its source as named in the record; empty if it is not named.
      rank: 1 is the best.
      score: see `scores`.
      perplexity: of the response after the plain prompt, per token.
      plain_nll, chat_nll: of the response, nats per token.
      response_tokens: of the plain form. These four are None if not scored.
      selected: the rank is within `keep`, and its origin within the quota.
    """

    candidate: int
    origin: str
    rank: int
    score: float
    perplexity: float | None = None
    plain_nll: float | None = None
    chat_nll: float | None = None
    response_tokens: int | None = None
    selected: bool = False


class Ranking(NamedTuple):
    """Candidates by rank.

    Attributes:
      candidates, method, keep: what was ranked, how, and how many to select.
      rows: [C], by rank.
      num_selected: less than `keep` if there are too few candidates or the quota allows no
        more.
      num_held_back: candidates that the quota excluded from the first `keep`.
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
    min_response_tokens: int = 1,
    near_duplicates: float = 0.8,
    on_bad_record: str = "refuse",
    max_candidates: int = 0,
    seed: int = 0,
) -> Candidates:
    """Reads, filters and encodes the samples to choose from.

    Drops, in this order: with `on_bad_record='skip'`, `unusable` records, which lack a
    field or which the chat template refuses; preferences with `no_preference`, whose
    rejected answer is blank or equal to the chosen one; records with a `short_response`;
    records that are `too_long`; a `duplicate` or `near_duplicate` of an earlier record;
    and, of the rest, those `beyond_limit`.

    Args:
      records: see `sources.read`; they are read once.
      format: of the records in continual pre-training: 'instruction', 'preference' or
        'chat'; see `formats.prompt_and_response`.
      tokenizer: has `encode_batch`, `encode_chat`, `encode_response`,
        `model.encode_next`, `add_bos` and `bos_id`.
      fields: our field name -> the source's name for it, where they differ.
      max_tokens: the maximum length of the chat form; for a preference, of the longer side.
      min_response_tokens: the minimum number of loss tokens in the response. NLL ratios
        over one or two tokens are mostly noise, and extreme.
      near_duplicates: the minimum Jaccard similarity of the word 5-grams of near
        duplicates, as MinHash estimates it (see `filters.Seen`); 0: the rule is off.
      on_bad_record: 'refuse' or 'skip'.
      max_candidates: the maximum number of records to keep, those that 'random' with this
        `seed` would select first; 0: no limit.

    Raises:
      InputError: see `formats.prompt_and_response` and `formats.chat_pair`; a record has a
        field `selection` that the job "select" did not write; no record is left.
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
            # The template's whitespace after the response may form one token with its end.
            is_prefix = list(ids[: len(opening)]) == opening
            chats.append(_ending(ids if is_prefix else opening, len(opening), count))
    if not kept:
        raise InputError(
            f"no sample is left to select from; left out are {filtered}; widen the bounds"
        )
    # Those that "random" would select first, in the order of the source.
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
    divided by its NLL per token after the plain prompt; the highest are selected, because
    there the model knows the content and not the format. We chose this ratio after a
    proposal in the public reviews of the Mix-CPT paper; the paper has a score of this name,
    but its formula is unknown to us. NLLs below 0.001 nats count as 0.001, so that the
    ratio of two certainties is 1. 'random': a hash of seed and content, uniform in [0, 1);
    the lowest are selected.

    Raises:
      InputError: an unknown method, missing scores, or a perplexity or ratio that is not
        finite.
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
    """Orders the candidates by score, and equal scores by a hash of seed and content.

    At most `ceil(origin_share * keep)` of the selected samples have the same origin. Those
    beyond the quota come after the selected ones, together with all others, ordered by
    score. If the quota leaves fewer than `keep`, fewer are selected.

    Args:
      candidates, measured: what to rank, and the model's scores.
      method, seed: see `scores`.
      keep: how many to select.
      origin_field: field of a record that names its origin.
      origin_share: maximum share of one origin; 1: no quota.

    Raises:
      InputError: see `scores`; `keep` or `origin_share` is not above 0; there is a quota
        and a record without `origin_field`.
    """
    if keep < 1 or not 0 < origin_share <= 1:
        raise InputError(
            f"keep={keep}, origin_share={origin_share}: must be >= 1, and > 0 and <= 1"
        )
    score_C = scores(candidates, measured, method, seed)
    cost_C = -score_C if method == "format_alignment" else score_C
    keys = _keys(candidates.digests, seed)
    origins = [_origin(r, origin_field, origin_share < 1) for r in candidates.records]
    # Round first, because 0.07 * 100 is slightly more than 7.
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
    scored = {f"{form}_nll": x for form, x in _per_token(candidates, measured).items()}
    if "plain_nll" in scored:
        scored["perplexity"] = np.exp(scored["plain_nll"])
        scored["response_tokens"] = measured.plain_count_C.astype(int)
    rows = [
        Row(
            candidate=number,
            origin=origins[number],
            rank=place,
            score=float(score_C[number]),
            selected=place <= len(selected),
            **{name: values_C[number].item() for name, values_C in scored.items()},
        )
        for place, number in enumerate(selected + others, 1)
    ]
    return Ranking(candidates, method, keep, rows, len(selected), num_held_back)


def write(path: epath.PathLike, ranking: Ranking) -> None:
    """Writes the records by rank as JSON lines; writes the whole file or nothing.

    A line is `selection`, with the numbers of the record's `Row` to six digits, followed by
    the record's own fields. So the source's `fields` also fit this file, read as format
    'chat' or, from preferences, 'chat_preference'. The first `keep` lines are the samples
    to train on; if fewer are selected, the file ends after them.
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
        lines.append(paths.to_json(line, ensure_ascii=False) + "\n")
    # Half of a surrogate pair is not valid UTF-8; escape it in JSON, as Python does.
    content = "".join(lines).encode("utf-8", "backslashreplace")
    paths.replace(epath.Path(path), content)


def summary(ranking: Ranking) -> dict[str, Any]:
    """Counts and quantiles of the scores, ready for JSON.

    `read` is `candidates` plus the counts in `filtered`; `missing` is `keep` minus
    `selected`; origins are ordered by size.
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
    # Continual pre-training on the chosen side also reads such records.
    rejected = record.fields.get(fields.get("rejected", "rejected"))
    return not isinstance(rejected, str) or rejected.strip() not in ("", chosen.strip())


def _encode_plain(texts: list[tuple[str, str, list[int], int, bool]], tokenizer):
    """Tokens and mask of each (prompt, response, its tokens, loss tokens, BOS)."""
    wholes = tokenizer.encode_batch(
        [prompt + response for prompt, response, *_ in texts]
    )
    for (prompt, _, answer, count, bos), whole in zip(texts, wholes, strict=True):
        given = whole[: -len(answer)]
        # Continual pre-training tokenizes the text as a whole, where a blank line may
        # become different tokens than at the end of a prompt. So the prompt is encoded
        # separately only if a token would cross the boundary.
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
    """The number of equal tokens at the beginning of two sequences."""
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
                f"{nll_C[number]} nats per token in its {form} form, so its score is not "
                "finite; check the model"
            )
        nll[form] = nll_C
    return nll


def _keys(digests: list[bytes], seed: int) -> list[bytes]:
    prefix = f"{seed} ".encode()
    return [hashlib.blake2b(prefix + digest).digest() for digest in digests]


def _origin(record: Record, name: str, is_needed: bool) -> str:
    if is_needed and name not in record.fields:
        raise InputError(
            f"{record.place}: no field {name!r} that names its origin; set origin_field, "
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
