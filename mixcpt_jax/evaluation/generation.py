"""Text generation with a cache of keys and values.

Prompts are padded on the right to one of few lengths, so few programs are compiled. A
program reads the prompts, then generates one token per row at a time, until every row has
a stop token or `max_new_tokens` tokens.

Each token reads all weights, and under `fsdp` also gathers them from all devices. So
decoding is fastest on a mesh whose `tensor` axis is as large as the heads allow.

The text of a row depends on its prompt, the seed and its number among the prompts. Apart
from rounding, it does not depend on other rows, the padding or the mesh.

Shape suffixes: B batch rows, P padded prompt length, M maximum number of new tokens,
V vocabulary, C candidates for the next token, D hidden size.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.models.tokenizer import Tokenizer
from mixcpt_jax.runtime import sharding

# The smallest padded length of prompts, and of the cache of a stream; larger ones double.
_MIN_PROMPT_LENGTH = 32
_MIN_ROOM = 512
# Marks a token whose logits are not finite.
_NOT_FINITE = -1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled from its logits.

    Attributes:
      temperature: divides the logits; 0: greedy decoding.
      top_k: samples from the `top_k` most likely tokens only; None: from all.
      top_p: of these, samples from the smallest set of most likely tokens whose
        probabilities sum to this share (nucleus sampling, Holtzman et al., arXiv
        1904.09751).

    Raises:
      InputError: a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        for name, bounds, holds in (
            ("temperature", ">= 0 and finite", 0 <= self.temperature < math.inf),
            ("top_k", ">= 1 or None", self.top_k is None or self.top_k >= 1),
            ("top_p", "> 0 and <= 1", 0 < self.top_p <= 1),
        ):
            if not holds:
                raise InputError(f"{name}={getattr(self, name)}: must be {bounds}")


def sample(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: SamplingParams
) -> jax.Array:
    """Samples a token for each row with the row's own key, `[B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1)
    draw = jax.vmap(jax.random.categorical)
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k is None and sampling.top_p == 1:
        return draw(keys_B, logits_BxV)
    vocab_size = logits_BxV.shape[1]
    num_candidates = min(sampling.top_k or vocab_size, vocab_size)
    logits_BxC, tokens_BxC = jax.lax.top_k(logits_BxV, num_candidates)
    if sampling.top_p < 1:
        shares_BxC = jax.nn.softmax(logits_BxC)
        more_likely_BxC = jnp.cumsum(shares_BxC, axis=-1) - shares_BxC
        logits_BxC = jnp.where(more_likely_BxC < sampling.top_p, logits_BxC, -jnp.inf)
    drawn_B = draw(keys_B, logits_BxC)
    return jnp.take_along_axis(tokens_BxC, drawn_B[:, None], axis=1)[:, 0]


class State(NamedTuple):
    """The state of decoding between two tokens, on the devices.

    Attributes:
      step: number of new tokens of each row, int32.
      tokens_BxM: the new tokens, followed by room for the rest.
      is_done_B: the row has a stop token, or is padding of the batch.
      cache: keys and values of each row's prompt and new tokens, except the last token.
      lengths_B: number of tokens of each prompt.
      keys_B: random key of each row.
    """

    step: jax.Array
    tokens_BxM: jax.Array
    is_done_B: jax.Array
    cache: transformer.Cache
    lengths_B: jax.Array
    keys_B: jax.Array


class Decoding(NamedTuple):
    """The two functions of `make_decoding`."""

    begin: Callable[..., State]
    extend: Callable[..., State]


def make_decoding(
    config: transformer.ModelConfig,
    vocab_size: int,
    dtype=jnp.float32,
    lora: lora_lib.Lora | None = None,
) -> Decoding:
    """Decoding as pure functions, to be jitted with static `max_new_tokens`, `sampling`.

    Args:
      config: the architecture.
      vocab_size: ids from this one on are padding of the vocabulary and are never sampled.
      dtype: of the computation.
      lora: the adapters in the parameters.

    Returns:
      `begin(params, cache, rests_BxP, starts_B, lengths_B, rows_B, seed, stop_ids,
      max_new_tokens, sampling) -> State`: reads prompts of `lengths_B` tokens and samples
      a token for each. The cache holds their first `starts_B` tokens; `rests_BxP` are the
      others, padded on the right. A row of length 0 is padding of the batch. A row's key
      is made from `seed` and its number in `rows_B`.
      `extend(params, state, until, stop_ids, sampling) -> State`: continues until each
      row has `until` tokens, or all rows have a stop token. Ignore the tokens after the
      first stop token of a row.
    """
    decode = transformer.make_decode(config, dtype, lora)

    def sample_next(params, hidden_BxD, keys_B, step, sampling):
        logits_BxV = transformer.logits(params, hidden_BxD, config.final_soft_cap)
        is_broken_B = ~jnp.all(jnp.isfinite(logits_BxV), axis=-1)
        is_token_V = jnp.arange(config.vocab_size) < vocab_size
        logits_BxV = jnp.where(is_token_V[None], logits_BxV, -jnp.inf)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        tokens_B = sample(logits_BxV, step_keys_B, sampling)
        return jnp.where(is_broken_B, _NOT_FINITE, tokens_B)

    def is_stop(tokens_B, stop_ids):
        return jnp.any(tokens_B[:, None] == stop_ids[None], axis=1)

    def begin(
        params,
        cache,
        rests_BxP,
        starts_B,
        lengths_B,
        rows_B,
        seed,
        stop_ids,
        max_new_tokens: int,
        sampling: SamplingParams,
    ):
        batch, rest_length = rests_BxP.shape
        rests_BxP = sharding.constrain(rests_BxP, "batch", "length")
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)
        positions_BxP = starts_B[:, None] + jnp.arange(rest_length)[None]
        hidden_BxPxD, cache = decode(params, cache, rests_BxP, positions_BxP)
        last_B = jnp.maximum(lengths_B - starts_B - 1, 0)
        hidden_BxD = jnp.take_along_axis(hidden_BxPxD, last_B[:, None, None], axis=1)
        first_B = sample_next(params, hidden_BxD[:, 0], keys_B, 0, sampling)
        tokens_BxM = jnp.zeros((batch, max_new_tokens), jnp.int32)
        return State(
            jnp.int32(1),
            tokens_BxM.at[:, 0].set(first_B),
            is_stop(first_B, stop_ids) | (lengths_B == 0),
            cache,
            lengths_B,
            keys_B,
        )

    def extend(params, state: State, until, stop_ids, sampling: SamplingParams):
        def is_unfinished(state):
            return (state.step < until) & ~jnp.all(state.is_done_B)

        def add_token(state):
            step, tokens_BxM = state.step, state.tokens_BxM
            before_Bx1 = jax.lax.dynamic_slice_in_dim(tokens_BxM, step - 1, 1, axis=1)
            positions_Bx1 = (state.lengths_B + step - 1)[:, None]
            hidden_Bx1xD, cache = decode(params, state.cache, before_Bx1, positions_Bx1)
            next_B = sample_next(
                params, hidden_Bx1xD[:, 0], state.keys_B, step, sampling
            )
            return state._replace(
                step=step + 1,
                tokens_BxM=tokens_BxM.at[:, step].set(next_B),
                is_done_B=state.is_done_B | is_stop(next_B, stop_ids),
                cache=cache,
            )

        return jax.lax.while_loop(is_unfinished, add_token, state)

    return Decoding(begin, extend)


def make_generate(
    config: transformer.ModelConfig,
    vocab_size: int,
    dtype=jnp.float32,
    lora: lora_lib.Lora | None = None,
) -> Callable[..., jax.Array]:
    """Decoding as one program; arguments and jit as for `make_decoding`.

    Parameters of another dtype are cast to `dtype` once; the copy lives as long as the
    program runs.

    Returns:
      `generate(params, prompts_BxP, lengths_B, rows_B, seed, stop_ids, max_new_tokens,
      sampling) -> tokens_BxM`, replicated over all hosts.
    """
    begin, extend = make_decoding(config, vocab_size, dtype, lora)

    def generate(
        params,
        prompts_BxP,
        lengths_B,
        rows_B,
        seed,
        stop_ids,
        max_new_tokens: int,
        sampling: SamplingParams,
    ):
        batch, prompt_length = prompts_BxP.shape
        params = transformer.cast(params, dtype)
        cache = transformer.init_cache(
            config, batch, prompt_length + max_new_tokens, dtype
        )
        starts_B = jnp.zeros_like(lengths_B)
        state = begin(
            params,
            cache,
            prompts_BxP,
            starts_B,
            lengths_B,
            rows_B,
            seed,
            stop_ids,
            max_new_tokens,
            sampling,
        )
        state = extend(params, state, max_new_tokens, stop_ids, sampling)
        return sharding.constrain(state.tokens_BxM, None, None)

    return generate


class Sampler:
    """Generates text; compiles once per shape of a batch and `SamplingParams`."""

    def __init__(
        self,
        model_config: transformer.ModelConfig,
        tokenizer: Tokenizer,
        compute_dtype="float32",
        lora: lora_lib.Lora | None = None,
        batch_size: int = 16,
    ):
        """
        Args:
          model_config: the architecture.
          tokenizer: the model's.
          compute_dtype: see `make_generate`.
          lora: the adapters in the parameters.
          batch_size: maximum number of prompts per batch.
        """
        self._config = model_config
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._generate = jax.jit(
            make_generate(model_config, tokenizer.vocab_size, compute_dtype, lora),
            static_argnames=("max_new_tokens", "sampling"),
        )

    def chat(
        self,
        params: transformer.Params,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        max_new_tokens: int,
        sampling: SamplingParams = SamplingParams(),
        seed: int = 0,
    ) -> list[str]:
        """The assistant's next turn in each conversation.

        Args:
          params: the parameters, with any sharding.
          conversations: lists of messages, see `Tokenizer.encode_chat`.
          max_new_tokens: longer answers are cut off.
          sampling: of each token.
          seed: of the random keys.

        Raises:
          InputError: the template refuses a conversation, or a prompt does not fit in
            the context.
        """
        prompts = [
            self._tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
            for messages in conversations
        ]
        stop_ids = _turn_ends(self._tokenizer)
        answers = self.generate(
            params, prompts, max_new_tokens, stop_ids, sampling, seed
        )
        return [self._tokenizer.decode(answer) for answer in answers]

    def complete(
        self,
        params: transformer.Params,
        texts: Sequence[str],
        max_new_tokens: int,
        sampling: SamplingParams = SamplingParams(),
        seed: int = 0,
    ) -> list[str]:
        """Continues each text to the end of its document; otherwise like `chat`."""
        prompts = encode_prompts(self._tokenizer, texts)
        stop_ids = self._tokenizer.document_ends
        continuations = self.generate(
            params, prompts, max_new_tokens, stop_ids, sampling, seed
        )
        return decode_continuations(self._tokenizer, prompts, continuations)

    def generate(
        self,
        params: transformer.Params,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        sampling: SamplingParams,
        seed: int = 0,
        first_row: int = 0,
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to the first that is in `stop_ids`.

        `first_row` is the number of the first prompt among all that share `seed`.

        Raises:
          InputError: a prompt is empty or does not fit in the context, or logits are not
            finite.
        """
        room = _check_room(prompts, self._config, max_new_tokens)
        batch = whole_batch(min(self._batch_size, len(prompts) or 1))
        results = []
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            padded_BxP, lengths_B = _pad(part, batch, room)
            tokens_BxM = self._generate(
                params,
                padded_BxP,
                lengths_B,
                first_row + first + np.arange(batch, dtype=np.int32),
                seed,
                np.array(sorted(stop_ids), np.int32),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
            )
            for new_M in np.asarray(tokens_BxM)[: len(part)].tolist():
                results.append(_until_stop(new_M, stop_ids))
        return results


class Stream:
    """Yields tokens while they are generated; compiles once per padded prompt length.

    The keys and values of the last prompts and their new tokens stay on the devices, in a
    cache that grows by doubling. The prefix that a prompt shares with the last text of its
    row is not read again.
    """

    def __init__(
        self,
        params: transformer.Params,
        model_config: transformer.ModelConfig,
        tokenizer: Tokenizer,
        compute_dtype="float32",
        lora: lora_lib.Lora | None = None,
        batch_size: int = 1,
        tokens_per_call: int = 1,
    ):
        """
        Args:
          params: the parameters, with any sharding; cast to `compute_dtype`.
          model_config: the architecture.
          tokenizer: the model's.
          compute_dtype: see `make_decoding`; also of the cache.
          lora: the adapters in the parameters.
          batch_size: maximum number of prompts per call.
          tokens_per_call: number of tokens per row that are yielded at a time.
        """
        cast = functools.partial(transformer.cast, dtype=compute_dtype)
        target = jax.eval_shape(cast, params)
        is_cast = jax.tree.map(lambda x, y: x.dtype == y.dtype, params, target)
        self._params = (
            params if all(jax.tree.leaves(is_cast)) else jax.jit(cast)(params)
        )
        self._config = model_config
        self._tokens_per_call = tokens_per_call
        self._batch = whole_batch(batch_size)
        begin, extend = make_decoding(
            model_config, tokenizer.vocab_size, compute_dtype, lora
        )
        self._begin = jax.jit(
            begin,
            static_argnames=("max_new_tokens", "sampling"),
            donate_argnames="cache",
        )
        self._extend = jax.jit(
            extend, static_argnames="sampling", donate_argnames="state"
        )
        self._init_cache = jax.jit(
            lambda room: transformer.init_cache(
                model_config, self._batch, room, compute_dtype
            ),
            static_argnums=0,
        )
        self._widen = jax.jit(_widen, static_argnums=1)
        self.forget()

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        sampling: SamplingParams,
        seed: int = 0,
    ) -> Iterator[list[list[int]]]:
        """The new tokens of each prompt, up to the first that is in `stop_ids`.

        Apart from rounding, they are those of `Sampler.generate`. The iterator may be
        closed at any time.

        Args:
          prompts: at most `batch_size`.
          max_new_tokens: maximum per row; fewer if the context is full.
          stop_ids, sampling, seed: as for `Sampler.generate`.

        Yields:
          Each row's new tokens; none if the row has ended.

        Raises:
          InputError: a prompt is empty or fills the context, or logits are not finite.
        """
        _check_room(prompts, self._config, 1)
        longest = max(map(len, prompts))
        limit = min(max_new_tokens, self._config.max_positions - longest)
        cache, known = self._take(longest + limit)
        # The last token of a prompt is always read: its hidden state gives the next.
        starts = [
            min(_num_shared(prompt, ids), len(prompt) - 1)
            for prompt, ids in zip(prompts, known, strict=False)
        ]
        rests = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        rests_BxP, _ = _pad(rests, self._batch, self._config.max_positions)
        padding = [0] * (self._batch - len(prompts))
        stops = np.array(sorted(stop_ids), np.int32)
        state = self._begin(
            self._params,
            cache,
            rests_BxP,
            np.array(starts + padding, np.int32),
            np.array([len(prompt) for prompt in prompts] + padding, np.int32),
            np.arange(self._batch, dtype=np.int32),
            seed,
            stops,
            max_new_tokens=min(max_new_tokens, self._config.max_positions),
            sampling=sampling,
        )
        seen, ended = 0, [False] * len(prompts)
        while True:
            step, tokens_BxM, is_done_B = jax.device_get(
                (state.step, state.tokens_BxM, state.is_done_B)
            )
            written = tokens_BxM[: len(prompts), :step].tolist()
            self._cache = state.cache
            self._known = [
                [*prompt, *new[:-1]]
                for prompt, new in zip(prompts, written, strict=True)
            ]
            news = []
            for row, tokens in enumerate(written):
                new = [] if ended[row] else tokens[seen:]
                until_stop = _until_stop(new, stop_ids)
                ended[row] |= len(until_stop) < len(new)
                news.append(until_stop)
            yield news
            seen = int(step)
            if is_done_B.all() or seen >= limit:
                return
            self.forget()  # the next call donates the cache
            until = min(seen + self._tokens_per_call, limit)
            state = self._extend(self._params, state, until, stops, sampling=sampling)

    def forget(self) -> None:
        """Clears the cache."""
        self._cache: transformer.Cache | None = None
        self._known: list[list[int]] = []

    def _take(self, room: int) -> tuple[transformer.Cache, list[list[int]]]:
        """A cache with room for `room` tokens per row, and the tokens of its rows."""
        cache, known = self._cache, self._known
        self.forget()
        slots = max(_MIN_ROOM, 1 << (room - 1).bit_length())
        slots = min(slots, self._config.max_positions)
        if cache is None:
            cache = self._init_cache(slots)
        elif cache["key"].shape[2] < slots:
            cache = self._widen(cache, slots)
        return cache, known + [[]] * (self._batch - len(known))


def _until_stop(tokens: Sequence[int], stop_ids: set[int]) -> list[int]:
    """The tokens up to the first that is in `stop_ids`.

    Raises:
      InputError: a token was sampled from logits that are not finite.
    """
    until_stop = list(itertools.takewhile(lambda i: i not in stop_ids, tokens))
    if _NOT_FINITE in until_stop:
        raise InputError(
            "the logits of a token are not finite: the model's training diverged, or its "
            "activations overflow the compute dtype; use float32 or other weights"
        )
    return until_stop


def detokenize(
    tokenizer: Tokenizer, news: Iterable[Sequence[int]], before: Sequence[int] = ()
) -> Iterator[str]:
    """Decodes tokens as they arrive; never yields part of a character.

    Args:
      tokenizer: of the tokens.
      news: the tokens, in parts.
      before: the tokens of the text that they continue; a first token may add a space
        before it.
    """
    ids = list(before)
    shown = len(tokenizer.decode(ids))
    text = ""
    for new in news:
        ids += new
        text = tokenizer.decode(ids)
        # An incomplete character decodes to the replacement character.
        if len(text) > shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


class Chat:
    """A conversation with a model; keeps its messages."""

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        sampling: SamplingParams,
        seed: int = 0,
    ):
        self._tokenizer = tokenizer
        settings = max_new_tokens, _turn_ends(tokenizer), sampling, seed
        self._generate = functools.partial(_generate_one, stream, settings)
        self.reset()

    def reset(self) -> None:
        """Clears the messages."""
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece; if it is interrupted, its first pieces are kept.

        Raises:
          InputError: the template refuses the conversation, or it fills the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, _ = self._tokenizer.encode_chat(messages, add_generation_prompt=True)
        answer = ""
        try:
            for piece in detokenize(self._tokenizer, self._generate(prompt)):
                answer += piece
                yield piece
        finally:
            # Templates may refuse an empty message.
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]


class Completion:
    """Continues texts independently of each other; otherwise like `Chat`."""

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        sampling: SamplingParams,
        seed: int = 0,
    ):
        self._tokenizer = tokenizer
        settings = max_new_tokens, tokenizer.document_ends, sampling, seed
        self._generate = functools.partial(_generate_one, stream, settings)

    def reset(self) -> None:
        """Does nothing: a completion keeps nothing."""

    def say(self, text: str) -> Iterator[str]:
        """The continuation of the text, piece by piece.

        Raises:
          InputError: the text is empty, or fills the context.
        """
        (prompt,) = encode_prompts(self._tokenizer, [text])
        return detokenize(self._tokenizer, self._generate(prompt), prompt)


def _generate_one(
    stream: Stream, settings: tuple, prompt: list[int]
) -> Iterator[list[int]]:
    return (new for (new,) in stream([prompt], *settings))


def _widen(cache: transformer.Cache, room: int) -> transformer.Cache:
    def pad(x_BxNxSxGK):
        slots = room - x_BxNxSxGK.shape[2]
        return jnp.pad(x_BxNxSxGK, ((0, 0), (0, 0), (0, slots), (0, 0)))

    return jax.tree.map(pad, cache)


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def _check_room(
    prompts: Sequence[Sequence[int]],
    config: transformer.ModelConfig,
    max_new_tokens: int,
) -> int:
    """The maximum length of a prompt; checks the prompts."""
    room = config.max_positions - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise InputError(
                f"prompt {number}: has {len(prompt)} tokens; must have 1 to {room}, "
                f"as the context has {config.max_positions} and "
                f"max_new_tokens={max_new_tokens}"
            )
    return room


def whole_batch(rows: int) -> int:
    """The smallest batch of at least `rows` rows that the mesh divides evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape.get(axis, 1) for axis in sharding.batch_axes())
    return -(-rows // ways) * ways


def encode_prompts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of plain texts to complete, with BOS if the tokenizer adds it."""
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    return [bos + ids for ids in tokenizer.encode_batch(texts)]


def decode_continuations(
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    continuations: Sequence[list[int]],
) -> list[str]:
    """The text that each continuation adds to its prompt.

    Decodes together with the prompt: a first token may add a space before it.
    """
    decode = tokenizer.decode
    return [
        decode(prompt + new)[len(decode(prompt)) :]
        for prompt, new in zip(prompts, continuations, strict=True)
    ]


def _turn_ends(tokenizer: Tokenizer) -> set[int]:
    return tokenizer.document_ends | {tokenizer.end_of_turn_id}


def _pad(
    prompts: Sequence[Sequence[int]], batch: int, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[batch, P]`, with P a power of 2 or `room`, and their lengths."""
    longest = max(_MIN_PROMPT_LENGTH, *map(len, prompts))
    padded_BxP = np.zeros((batch, min(1 << (longest - 1).bit_length(), room)), np.int32)
    lengths_B = np.zeros(batch, np.int32)
    for row, prompt in enumerate(prompts):
        padded_BxP[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    return padded_BxP, lengths_B
