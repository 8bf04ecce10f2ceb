"""Text from a model: decoding with a cache of keys and values.

Prompts are padded on the right to one of few lengths, so that little is compiled. One
program does the rest: it runs the prompts, then makes a token for each row at a time,
until every row has met a stop token or made as many as it may.

For each token all weights are read, and under `fsdp` gathered from all devices, too; a
mesh that is `tensor` as far as heads allow decodes quickest.

What a row says depends on its prompt, the seed and its number among the prompts, not on
the rows beside it, the padding or the mesh (but for rounding).

Shape suffixes: B batch rows, P padded prompt length, M new tokens at most, V vocabulary,
C candidates for the next token, D hidden size.
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

# Padded lengths of prompts, and of the cache of a stream, begin here and double.
_MIN_PROMPT_LENGTH = 32
_MIN_ROOM = 512
# Stands for a token whose logits are not finite numbers.
_BROKEN = -1


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen from its logits.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: draw from the `top_k` likeliest tokens only; None: from all.
      top_p: of these, draw from the fewest likeliest ones that have this share of their
        probability (nucleus sampling, Holtzman et al., arXiv 1904.09751).

    Raises:
      InputError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        for name, wanted, holds in (
            ("temperature", "0 or more", 0 <= self.temperature < math.inf),
            ("top_k", "1 or more, or None", self.top_k is None or self.top_k >= 1),
            ("top_p", "above 0, at most 1", 0 < self.top_p <= 1),
        ):
            if not holds:
                raise InputError(f"{name}={getattr(self, name)}: it must be {wanted}")


def choose(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: SamplingParams
) -> jax.Array:
    """Draws a token of each row with the row's own key, `[B]`."""
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
        likelier_BxC = jnp.cumsum(shares_BxC, axis=-1) - shares_BxC
        logits_BxC = jnp.where(likelier_BxC < sampling.top_p, logits_BxC, -jnp.inf)
    drawn_B = draw(keys_B, logits_BxC)
    return jnp.take_along_axis(tokens_BxC, drawn_B[:, None], axis=1)[:, 0]


class State(NamedTuple):
    """Decoding between two tokens, on the devices.

    Attributes:
      step: how many tokens each row has, int32.
      tokens_BxM: them, and behind them room for the rest.
      is_done_B: the row has met a stop token, or is padding of the batch.
      cache: keys and values of each row's prompt and tokens, but for the last of them.
      lengths_B: tokens of each prompt.
      keys_B: the rows' random keys.
    """

    step: jax.Array
    tokens_BxM: jax.Array
    is_done_B: jax.Array
    cache: transformer.Cache
    lengths_B: jax.Array
    keys_B: jax.Array


class Decoding(NamedTuple):
    """The two halves of decoding; see `make_decoding`."""

    begin: Callable[..., State]
    extend: Callable[..., State]


def make_decoding(
    config: transformer.ModelConfig,
    vocab_size: int,
    dtype=jnp.float32,
    lora: lora_lib.Lora | None = None,
) -> Decoding:
    """Decoding as pure functions, to be jitted with `max_new_tokens` and `sampling` static.

    Args:
      config: the architecture.
      vocab_size: ids from here on are padding of the vocabulary and never chosen.
      dtype: what is computed in.
      lora: the adapters that the parameters hold.

    Returns:
      `begin(params, cache, rests_BxP, starts_B, lengths_B, rows_B, seed, stop_ids,
      max_new_tokens, sampling) -> State`: reads prompts of `lengths_B` tokens, of which
      the first `starts_B` are in the cache and the rest is given, padded on the right,
      and chooses a token for each. A row of length 0 is padding of the batch. `rows_B`
      and `seed` make the rows' keys.
      `extend(params, state, until, stop_ids, sampling) -> State`: goes on to `until`
      tokens, or until all rows have met a stop token. Behind a row's first stop token,
      its tokens mean nothing.
    """
    decode = transformer.make_decode(config, dtype, lora)

    def choose_next(params, hidden_BxD, keys_B, step, sampling):
        logits_BxV = transformer.logits(params, hidden_BxD, config.final_soft_cap)
        is_broken_B = ~jnp.all(jnp.isfinite(logits_BxV), axis=-1)
        is_token_V = jnp.arange(config.vocab_size) < vocab_size
        logits_BxV = jnp.where(is_token_V[None], logits_BxV, -jnp.inf)
        step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
        return jnp.where(
            is_broken_B, _BROKEN, choose(logits_BxV, step_keys_B, sampling)
        )

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
        first_B = choose_next(params, hidden_BxD[:, 0], keys_B, 0, sampling)
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
        def goes_on(state):
            return (state.step < until) & ~jnp.all(state.is_done_B)

        def one_more(state):
            step, tokens_BxM = state.step, state.tokens_BxM
            before_Bx1 = jax.lax.dynamic_slice_in_dim(tokens_BxM, step - 1, 1, axis=1)
            positions_Bx1 = (state.lengths_B + step - 1)[:, None]
            hidden_Bx1xD, cache = decode(params, state.cache, before_Bx1, positions_Bx1)
            next_B = choose_next(
                params, hidden_Bx1xD[:, 0], state.keys_B, step, sampling
            )
            return state._replace(
                step=step + 1,
                tokens_BxM=tokens_BxM.at[:, step].set(next_B),
                is_done_B=state.is_done_B | is_stop(next_B, stop_ids),
                cache=cache,
            )

        return jax.lax.while_loop(goes_on, one_more, state)

    return Decoding(begin, extend)


def make_generate(
    config: transformer.ModelConfig,
    vocab_size: int,
    dtype=jnp.float32,
    lora: lora_lib.Lora | None = None,
) -> Callable[..., jax.Array]:
    """All of decoding in one program, to be jitted as `make_decoding`, with its arguments.

    Parameters are cast to `dtype` once, so beside those of another dtype there is a copy
    for as long as this runs.

    Returns:
      `generate(params, prompts_BxP, lengths_B, rows_B, seed, stop_ids, max_new_tokens,
      sampling) -> tokens_BxM`, whole on every host.
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
    """Text from parameters; compiles once per shape of a batch and `SamplingParams`."""

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
          lora: the adapters that the parameters hold.
          batch_size: prompts that run together at most.
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
          params: the parameters, sharded in any way.
          conversations: lists of messages, see `Tokenizer.encode_chat`.
          max_new_tokens: where an answer is cut off that has not ended.
          sampling: of each token.
          seed: of the draws.

        Raises:
          InputError: the template refuses a conversation, or a prompt does not fit into
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
        """How each text goes on to the end of its document; otherwise as `chat`."""
        prompts = _read_texts(self._tokenizer, texts)
        stop_ids = self._tokenizer.document_ends
        continuations = self.generate(
            params, prompts, max_new_tokens, stop_ids, sampling, seed
        )
        decode = self._tokenizer.decode
        # Not decoded alone: a first token may say whether a space goes before it.
        return [
            decode(prompt + new)[len(decode(prompt)) :]
            for prompt, new in zip(prompts, continuations, strict=True)
        ]

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
        """The tokens that follow each prompt, up to the first that is in `stop_ids`.

        `first_row` is the number of the first prompt among all that are drawn with `seed`.

        Raises:
          InputError: a prompt is empty or does not fit into the context, or logits are
            not finite numbers.
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
    """Tokens as they are made; compiles once per padded length of what is to be read.

    The keys and values of the last prompts and of what followed stay on the devices, in
    a cache that grows by doubling. Of a prompt that begins as its row's last text did,
    the rest alone is read.
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
          params: the parameters, sharded in any way; kept in `compute_dtype`.
          model_config: the architecture.
          tokenizer: the model's.
          compute_dtype: see `make_decoding`; also of the cache.
          lora: the adapters that the parameters hold.
          batch_size: prompts that run together at most.
          tokens_per_call: how many tokens of a row come at a time.
        """
        cast = functools.partial(transformer.cast, dtype=compute_dtype)
        wanted = jax.eval_shape(cast, params)
        is_cast = jax.tree.map(lambda x, y: x.dtype == y.dtype, params, wanted)
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
        """The tokens that follow each prompt, up to the first that is in `stop_ids`.

        They are those of `Sampler.generate`, but for rounding. An iteration that is not
        taken to its end may be closed at any time.

        Args:
          prompts: at most `batch_size`.
          max_new_tokens: where a row ends that has met no stop token; earlier if the
            context is full.
          stop_ids, sampling, seed: as for `Sampler.generate`.

        Yields:
          Each row's new tokens, none if it has ended.

        Raises:
          InputError: a prompt is empty or fills the context, or logits are not finite
            numbers.
        """
        _check_room(prompts, self._config, 1)
        longest = max(map(len, prompts))
        limit = min(max_new_tokens, self._config.max_positions - longest)
        cache, known = self._take(longest + limit)
        # The last token of a prompt is read in any case: its state chooses the next.
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
            self.forget()  # what is donated is no more, whatever comes
            until = min(seen + self._tokens_per_call, limit)
            state = self._extend(self._params, state, until, stops, sampling=sampling)

    def forget(self) -> None:
        """Drops the cache."""
        self._cache: transformer.Cache | None = None
        self._known: list[list[int]] = []

    def _take(self, room: int) -> tuple[transformer.Cache, list[list[int]]]:
        """A cache with room for so many tokens, and what each of its rows holds."""
        cache, known = self._cache, self._known
        self.forget()
        wide = max(_MIN_ROOM, 1 << (room - 1).bit_length())
        wide = min(wide, self._config.max_positions)
        if cache is None:
            cache = self._init_cache(wide)
        elif cache["key"].shape[2] < wide:
            cache = self._widen(cache, wide)
        return cache, known + [[]] * (self._batch - len(known))


def _until_stop(tokens: Sequence[int], stop_ids: set[int]) -> list[int]:
    """The tokens up to the first that is in `stop_ids`.

    Raises:
      InputError: a token was chosen from logits that are not finite numbers.
    """
    until_stop = list(itertools.takewhile(lambda i: i not in stop_ids, tokens))
    if _BROKEN in until_stop:
        raise InputError(
            "a token's logits are not finite numbers; the model's training has diverged, "
            "or its activations are too large for the dtype that is computed in: use "
            "float32 or other weights"
        )
    return until_stop


def spell(
    tokenizer: Tokenizer, news: Iterable[Sequence[int]], before: Sequence[int] = ()
) -> Iterator[str]:
    """The text of tokens that come bit by bit, never half a character.

    Args:
      tokenizer: whose tokens they are.
      news: the tokens.
      before: those of a text that they go on from; a first token may say whether a
        space goes before it.
    """
    ids = list(before)
    shown = len(tokenizer.decode(ids))
    text = ""
    for new in news:
        ids += new
        text = tokenizer.decode(ids)
        # Bytes that are no character yet are decoded as this one.
        if len(text) > shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[shown:]
            shown = len(text)
    if len(text) > shown:
        yield text[shown:]


class _Speaker:
    """Who answers one person, piece by piece."""

    def __init__(
        self,
        stream: Stream,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        sampling: SamplingParams,
        seed: int = 0,
    ):
        self._stream, self._tokenizer = stream, tokenizer
        self._settings = max_new_tokens, self._ends(), sampling, seed
        self.reset()

    def _tokens(self, prompt: list[int]) -> Iterator[list[int]]:
        """What comes after a prompt."""
        return (new for (new,) in self._stream([prompt], *self._settings))


class Chat(_Speaker):
    """A conversation that goes on: it remembers what was said."""

    def _ends(self) -> set[int]:
        return _turn_ends(self._tokenizer)

    def reset(self) -> None:
        """Forgets what was said."""
        self.messages: list[dict[str, str]] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece; of one that is not heard out, what was heard stays.

        Raises:
          InputError: the template refuses the conversation, or it fills the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, _ = self._tokenizer.encode_chat(messages, add_generation_prompt=True)
        answer = ""
        try:
            for piece in spell(self._tokenizer, self._tokens(prompt)):
                answer += piece
                yield piece
        finally:
            # Templates may refuse a turn in which nothing was said.
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]


class Completion(_Speaker):
    """Texts that go on, each for itself; otherwise as `Chat`."""

    def _ends(self) -> set[int]:
        return self._tokenizer.document_ends

    def reset(self) -> None:
        """There is nothing to forget."""

    def say(self, text: str) -> Iterator[str]:
        """How the text goes on, piece by piece.

        Raises:
          InputError: the text is empty, or fills the context.
        """
        (prompt,) = _read_texts(self._tokenizer, [text])
        return spell(self._tokenizer, self._tokens(prompt), prompt)


def _widen(cache: transformer.Cache, room: int) -> transformer.Cache:
    def pad(x_BxNxSxGK):
        slots = room - x_BxNxSxGK.shape[2]
        return jnp.pad(x_BxNxSxGK, ((0, 0), (0, 0), (0, slots), (0, 0)))

    return jax.tree.map(pad, cache)


def _num_shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


def _check_room(
    prompts: Sequence[Sequence[int]],
    config: transformer.ModelConfig,
    max_new_tokens: int,
) -> int:
    """How long a prompt may be."""
    room = config.max_positions - max_new_tokens
    for number, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise InputError(
                f"prompt {number}: it has {len(prompt)} tokens; with "
                f"max_new_tokens={max_new_tokens}, the model's context of "
                f"{config.max_positions} takes 1 to {room}"
            )
    return room


def whole_batch(rows: int) -> int:
    """The next larger batch that the mesh's devices share evenly."""
    mesh = jax.sharding.get_abstract_mesh()
    ways = math.prod(mesh.shape.get(axis, 1) for axis in sharding.BATCH_AXES)
    return -(-rows // ways) * ways


def _read_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    bos = [tokenizer.bos_id] if tokenizer.add_bos else []
    return [bos + ids for ids in tokenizer.encode_batch(texts)]


def _turn_ends(tokenizer: Tokenizer) -> set[int]:
    return tokenizer.document_ends | {tokenizer.end_of_turn_id}


def _pad(
    prompts: Sequence[Sequence[int]], batch: int, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as `[batch, P]`, P being a power of 2 or all the room, and their lengths."""
    longest = max(_MIN_PROMPT_LENGTH, *map(len, prompts))
    padded_BxP = np.zeros((batch, min(1 << (longest - 1).bit_length(), room)), np.int32)
    lengths_B = np.zeros(batch, np.int32)
    for row, prompt in enumerate(prompts):
        padded_BxP[row, : len(prompt)] = prompt
        lengths_B[row] = len(prompt)
    return padded_BxP, lengths_B
