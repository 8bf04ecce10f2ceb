"""The objectives, dense and literal: the readable reference.

Every function takes logits `[..., V]` and integer targets `[...]`, computes in float32
(float64 stays float64) and returns one loss per position, in nats. Training uses
`fused`, which computes the same numbers without holding the logits of a whole batch.

Notation of the Mix-CPT paper (arXiv 2407.10804): teacher logits `t`, student logits
`s`, gold token `y`, `a = argmax t` with the lowest index winning a tie,
`p = softmax(t)`, `q = softmax(s)`.
"""

import jax
import jax.numpy as jnp


def swap_logits(teacher_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Exchanges each position's largest teacher logit with that of the gold token.

    The gold token takes the teacher's own top confidence, everything else keeps its
    place. Where the teacher is right (`a == y`) nothing changes.

    Args:
      teacher_logits: `[..., V]`.
      targets: `[...]`, gold token ids.

    Returns:
      `[..., V]` in the dtype of `teacher_logits`.
    """
    vocab_size = teacher_logits.shape[-1]
    top = jnp.argmax(teacher_logits, axis=-1)
    is_top = jax.nn.one_hot(top, vocab_size, dtype=bool)
    is_gold = jax.nn.one_hot(targets, vocab_size, dtype=bool)
    top_logit = jnp.max(teacher_logits, axis=-1, keepdims=True)
    gold_logit = _pick(teacher_logits, targets)[..., None]
    swapped = jnp.where(is_top, gold_logit, teacher_logits)
    return jnp.where(is_gold, top_logit, swapped)


def lssd(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """Logit swap self-distillation: `KL(softmax(swap_logits(t, y)) || q)`.

    Args:
      student_logits: `[..., V]`.
      teacher_logits: `[..., V]`; no gradient flows into them.
      targets: `[...]`, gold token ids.

    Returns:
      `[...]`, nats; never negative, 0 where `q` equals the swapped teacher.
    """
    return distillation(student_logits, swap_logits(teacher_logits, targets))


def lssd_by_identity(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """`lssd` without a swapped tensor: `KL(p || q) + (p_a - p_y) (s_a - s_y)`.

    The swap touches two entries, so it moves the divergence by one product. This is
    the form that can be streamed over the vocabulary.
    """
    s, t = _at_least_float32(student_logits), _at_least_float32(teacher_logits)
    t = jax.lax.stop_gradient(t)
    p = jax.nn.softmax(t)
    top = jnp.argmax(t, axis=-1)
    confidence_gap = _pick(p, top) - _pick(p, targets)
    # Without a swap the product is zero, also where the logits are infinite.
    margin = jnp.where(top == targets, 0.0, _pick(s, top) - _pick(s, targets))
    return distillation(s, t) + confidence_gap * margin


def distillation(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Plain distillation `KL(p || q)`, `[...]`, nats; no gradient for the teacher.

    Vocabulary entries that both sides mask with -inf contribute nothing.
    """
    t = jax.lax.stop_gradient(_at_least_float32(teacher_logits))
    log_p = jax.nn.log_softmax(t)
    log_q = jax.nn.log_softmax(_at_least_float32(student_logits))
    possible = log_p > -jnp.inf
    log_ratio = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.exp(log_p) * log_ratio, axis=-1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Next-token prediction: `-log q_y`, `[...]`, nats."""
    return -_pick(jax.nn.log_softmax(_at_least_float32(logits)), targets)


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
