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
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixcpt_jax import model, sharding
from mixcpt_jax.errors import InputError
from mixcpt_jax.tokenizer import Tokenizer

_MIN_PROMPT_LENGTH = 32


@dataclasses.dataclass(frozen=True)
class Choice:
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


def choose(logits_BxV: jax.Array, keys_B: jax.Array, choice: Choice) -> jax.Array:
    """Draws a token of each row with the row's own key, `[B]`."""
    if choice.temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1)
    draw = jax.vmap(jax.random.categorical)
    logits_BxV = logits_BxV / choice.temperature
    if choice.top_k is None and choice.top_p == 1:
        return draw(keys_B, logits_BxV)
    vocab_size = logits_BxV.shape[1]
    num_candidates = min(choice.top_k or vocab_size, vocab_size)
    logits_BxC, tokens_BxC = jax.lax.top_k(logits_BxV, num_candidates)
    if choice.top_p < 1:
        shares_BxC = jax.nn.softmax(logits_BxC)
        likelier_BxC = jnp.cumsum(shares_BxC, axis=-1) - shares_BxC
        logits_BxC = jnp.where(likelier_BxC < choice.top_p, logits_BxC, -jnp.inf)
    drawn_B = draw(keys_B, logits_BxC)
    return jnp.take_along_axis(tokens_BxC, drawn_B[:, None], axis=1)[:, 0]


def make_generate(
    config: model.ModelConfig,
    vocab_size: int,
    dtype=jnp.float32,
    lora: model.Lora | None = None,
) -> Callable[..., jax.Array]:
    """Decoding as a pure function, to be jitted with `max_new_tokens` and `choice` static.

    Args:
      config: the architecture.
      vocab_size: ids from here on are padding of the vocabulary and never chosen.
      dtype: what is computed in, and what the cache holds. Parameters are cast to it
        once, so beside those of another dtype there is a copy for as long as this runs.
      lora: the adapters that the parameters hold.

    Returns:
      `generate(params, prompts_BxP, lengths_B, rows_B, seed, stop_ids, max_new_tokens,
      choice) -> tokens_BxM`, whole on every host. `prompts_BxP` are padded on the right;
      a row of length 0 is padding of the batch. `rows_B` and `seed` make the rows' keys.
      Behind a row's first stop token, its tokens mean nothing.
    """
    decode = model.make_decode(config, dtype, lora)

    def generate(
        params,
        prompts_BxP,
        lengths_B,
        rows_B,
        seed,
        stop_ids,
        max_new_tokens: int,
        choice: Choice,
    ):
        batch, prompt_length = prompts_BxP.shape
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        prompts_BxP = sharding.constrain(prompts_BxP, "batch", "length")
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows_B)

        def next_tokens(hidden_BxD, step):
            logits_BxV = model.logits(params, hidden_BxD, config.final_soft_cap)
            is_token_V = jnp.arange(config.vocab_size) < vocab_size
            logits_BxV = jnp.where(is_token_V[None], logits_BxV, -jnp.inf)
            step_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            return choose(logits_BxV, step_keys_B, choice)

        def is_stop(tokens_B):
            return jnp.any(tokens_B[:, None] == stop_ids[None], axis=1)

        cache = model.init_cache(config, batch, prompt_length + max_new_tokens, dtype)
        positions_BxP = jnp.broadcast_to(jnp.arange(prompt_length), prompts_BxP.shape)
        hidden_BxPxD, cache = decode(params, cache, prompts_BxP, positions_BxP)
        last_B = jnp.maximum(lengths_B - 1, 0)
        hidden_BxD = jnp.take_along_axis(hidden_BxPxD, last_B[:, None, None], axis=1)
        first_B = next_tokens(hidden_BxD[:, 0], 0)
        tokens_BxM = jnp.zeros((batch, max_new_tokens), jnp.int32)

        def goes_on(state):
            step, _, is_done_B, _ = state
            return (step < max_new_tokens) & ~jnp.all(is_done_B)

        def extend(state):
            step, tokens_BxM, is_done_B, cache = state
            before_Bx1 = jax.lax.dynamic_slice_in_dim(tokens_BxM, step - 1, 1, axis=1)
            positions_Bx1 = (lengths_B + step - 1)[:, None]
            hidden_Bx1xD, cache = decode(params, cache, before_Bx1, positions_Bx1)
            next_B = next_tokens(hidden_Bx1xD[:, 0], step)
            tokens_BxM = tokens_BxM.at[:, step].set(next_B)
            return step + 1, tokens_BxM, is_done_B | is_stop(next_B), cache

        state = (
            jnp.int32(1),
            tokens_BxM.at[:, 0].set(first_B),
            is_stop(first_B) | (lengths_B == 0),
            cache,
        )
        _, tokens_BxM, _, _ = jax.lax.while_loop(goes_on, extend, state)
        return sharding.constrain(tokens_BxM, None, None)

    return generate


class Sampler:
    """Text from parameters; compiles once per shape of a batch and `Choice`."""

    def __init__(
        self,
        model_config: model.ModelConfig,
        tokenizer: Tokenizer,
        compute_dtype="float32",
        lora: model.Lora | None = None,
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
            static_argnames=("max_new_tokens", "choice"),
        )

    def chat(
        self,
        params: model.Params,
        conversations: Sequence[Sequence[Mapping[str, Any]]],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """The assistant's next turn in each conversation.

        Args:
          params: the parameters, sharded in any way.
          conversations: lists of messages, see `Tokenizer.encode_chat`.
          max_new_tokens: where an answer is cut off that has not ended.
          temperature, top_k, top_p: see `Choice`.
          seed: of the draws.

        Raises:
          InputError: the template refuses a conversation, a prompt does not fit into
            the context, or a value is out of its range.
        """
        prompts = [
            self._tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
            for messages in conversations
        ]
        stop_ids = {*self._document_ends(), self._tokenizer.end_of_turn_id}
        choice = Choice(temperature, top_k, top_p)
        answers = self.generate(params, prompts, max_new_tokens, stop_ids, choice, seed)
        return [self._tokenizer.decode(answer) for answer in answers]

    def complete(
        self,
        params: model.Params,
        texts: Sequence[str],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """How each text goes on to the end of its document; otherwise as `chat`."""
        bos = [self._tokenizer.bos_id] if self._tokenizer.add_bos else []
        prompts = [bos + ids for ids in self._tokenizer.encode_batch(texts)]
        choice = Choice(temperature, top_k, top_p)
        continuations = self.generate(
            params, prompts, max_new_tokens, self._document_ends(), choice, seed
        )
        decode = self._tokenizer.decode
        # Not decoded alone: a first token may say whether a space goes before it.
        return [
            decode(prompt + new)[len(decode(prompt)) :]
            for prompt, new in zip(prompts, continuations, strict=True)
        ]

    def generate(
        self,
        params: model.Params,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_ids: set[int],
        choice: Choice,
        seed: int = 0,
    ) -> list[list[int]]:
        """The tokens that follow each prompt, up to the first that is in `stop_ids`.

        Raises:
          InputError: a prompt is empty or does not fit into the context.
        """
        room = self._config.max_positions - max_new_tokens
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= room:
                raise InputError(
                    f"prompt {number}: it has {len(prompt)} tokens; with "
                    f"max_new_tokens={max_new_tokens}, the model's context of "
                    f"{self._config.max_positions} takes 1 to {room}"
                )
        mesh = jax.sharding.get_abstract_mesh()
        ways = math.prod(mesh.shape.get(axis, 1) for axis in sharding.BATCH_AXES)
        batch = -(-min(self._batch_size, len(prompts) or 1) // ways) * ways
        results = []
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            padded_BxP, lengths_B = _pad(part, batch, room)
            tokens_BxM = self._generate(
                params,
                padded_BxP,
                lengths_B,
                first + np.arange(batch, dtype=np.int32),
                seed,
                np.array(sorted(stop_ids), np.int32),
                max_new_tokens=max_new_tokens,
                choice=choice,
            )
            for new_M in np.asarray(tokens_BxM)[: len(part)].tolist():
                results.append(
                    list(itertools.takewhile(lambda i: i not in stop_ids, new_M))
                )
        return results

    def _document_ends(self) -> set[int]:
        return {self._tokenizer.end_of_document_id, self._tokenizer.eos_id} - {None}


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
