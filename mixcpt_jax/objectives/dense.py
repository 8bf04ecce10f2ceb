"""The objectives, dense and written as in the formulas: the readable reference.

Every function computes in float32 (float64 stays float64). Token objectives take logits
`[..., V]` and integer targets `[...]` and return one loss per position, in nats. Training
uses `streamed`, which computes the same numbers without materializing the logits of a whole
batch. `preference_loss` takes the log-probabilities of whole answers. A target outside
`[0, V)` gives NaN, at that position alone: give such positions a valid target and multiply
their loss by 0.

Notation: teacher logits `t`, student logits `s`, gold token `y`, `a = argmax t` with the
lowest index winning a tie, `p = softmax(t)`, `q = softmax(s)`.
"""

import jax
import jax.numpy as jnp


def swap_logits(teacher_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Exchanges each position's largest teacher logit with that of the gold token.

    The gold token gets the teacher's top probability, and the top token gets the gold
    token's; all others keep theirs. Where the teacher is right (`a == y`), nothing changes.

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

    Examples:
      >>> import jax.numpy as jnp
      >>> from mixcpt_jax import lssd, swap_logits
      >>> teacher = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
      >>> print(jnp.exp(swap_logits(teacher, jnp.array([2]))).round(1))
      [[0.1 0.2 0.7]]
      >>> print(lssd(teacher, teacher, jnp.array([2])).round(2))  # 0.6 log 7
      [1.17]
    """
    return distillation(student_logits, swap_logits(teacher_logits, targets))


def lssd_by_identity(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """`lssd` without a swapped tensor: `KL(p || q) + (p_a - p_y) (s_a - s_y)`.

    The swap changes only two entries, so it adds one product to the divergence. This form
    can be streamed over the vocabulary.
    """
    s, t = _at_least_float32(student_logits), _at_least_float32(teacher_logits)
    t = jax.lax.stop_gradient(t)
    p = jax.nn.softmax(t)
    top = jnp.argmax(t, axis=-1)
    p_top_minus_p_gold = _pick(p, top) - _pick(p, targets)
    # Without a swap the product is zero, even if the logits are infinite.
    margin = jnp.where(top == targets, 0.0, _pick(s, top) - _pick(s, targets))
    return distillation(s, t) + p_top_minus_p_gold * margin


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


def selective(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array
) -> jax.Array:
    """Next-token prediction where the teacher is wrong, distillation where it is right.

    The teacher is right if its top token is the gold token. `(1 - m) lssd + m selective`
    is, up to a constant, the divergence from `(1 - m) p~ + m e_y` where the teacher is
    wrong, and from `p` where it is right. This is LSSD with the gold token's target
    probability raised from `p_a` to `m + (1 - m) p_a`.

    Args:
      student_logits, teacher_logits: `[..., V]`; no gradient for the teacher's.
      targets: `[...]`, gold token ids.

    Returns:
      `[...]`, nats.
    """
    return jnp.where(
        jnp.argmax(teacher_logits, axis=-1) == targets,
        distillation(student_logits, teacher_logits),
        cross_entropy(student_logits, targets),
    )


def coarse_lssd(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array, top_k: int
) -> jax.Array:
    """`lssd` with a teacher that gives only the probabilities of `list_tokens`.

    All other tokens count as one outcome. By the data processing inequality, the result is
    never above `lssd`; it grows with `top_k` until it equals `lssd`.
    """
    listed = list_tokens(teacher_logits, targets, top_k)
    swapped = swap_logits(teacher_logits, targets)
    return distillation(merge_tail(student_logits, listed), merge_tail(swapped, listed))


def coarse_distillation(
    student_logits: jax.Array, teacher_logits: jax.Array, targets: jax.Array, top_k: int
) -> jax.Array:
    """`distillation` with the same teacher."""
    listed = list_tokens(teacher_logits, targets, top_k)
    return distillation(
        merge_tail(student_logits, listed), merge_tail(teacher_logits, listed)
    )


def list_tokens(teacher_logits: jax.Array, targets: jax.Array, top_k: int) -> jax.Array:
    """Marks the `top_k` largest logits and the gold token, `[..., V]` bool.

    Among equal logits, the lowest index comes first.
    """
    _, top = jax.lax.top_k(teacher_logits, top_k)
    ids = jnp.concatenate([top, targets[..., None]], axis=-1)
    return jax.nn.one_hot(ids, teacher_logits.shape[-1], dtype=bool).any(-2)


def merge_tail(logits: jax.Array, listed: jax.Array) -> jax.Array:
    """Logits `[..., V + 1]`: of the listed tokens and, last, of all others merged.

    `softmax` gives the last entry the sum of the unlisted tokens' probabilities, and 0 to
    their own entries.
    """
    logits = _at_least_float32(logits)
    # Exclude masked entries: their gradient would be 0 / 0 if all are masked.
    is_tail = ~listed & (logits > -jnp.inf)
    tail = jax.nn.logsumexp(logits, axis=-1, where=is_tail, keepdims=True)
    return jnp.concatenate([jnp.where(listed, logits, -jnp.inf), tail], axis=-1)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Next-token prediction: `-log q_y`, `[...]`, nats."""
    return -_pick(jax.nn.log_softmax(_at_least_float32(logits)), targets)


def token_factor(
    kind: str, student_nll: jax.Array, teacher_nll: jax.Array
) -> jax.Array:
    """The factor on the weight of next-token prediction at each token.

    - "none": 1.
    - "teacher_probability": the teacher's probability of the gold token (arXiv
      2509.23753), so that tokens which the starting model considers impossible change
      little.
    - "excess_loss": `2 sigmoid(student_nll - teacher_nll)`, from 0 to 2, and 1 at the start
      of training. Tokens that the student already predicts better than the teacher fade
      out. It is a smooth form of the selection by excess loss in Rho-1 (arXiv 2404.07965).

    Args:
      kind: one of these.
      student_nll, teacher_nll: `[...]`, `cross_entropy` of each, nats.

    Returns:
      `[...]`, without gradient.
    """
    match kind:
        case "none":
            factor = jnp.ones_like(student_nll)
        case "teacher_probability":
            factor = jnp.exp(-teacher_nll)
        case "excess_loss":
            factor = 2 * jax.nn.sigmoid(student_nll - teacher_nll)
        case _:
            raise ValueError(f"token_factor: unknown kind {kind!r}")
    return jax.lax.stop_gradient(factor)


def preference_loss(
    chosen_logps_P: jax.Array,
    rejected_logps_P: jax.Array,
    reference_chosen_logps_P: jax.Array,
    reference_rejected_logps_P: jax.Array,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    chosen_lengths_P: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prefers the chosen answer of each of P pairs to the rejected one.

    With the log-ratio `r = logp - reference logp` of an answer, the margin
    `m = r_chosen - r_rejected` of a pair and `e = label_smoothing`:

      `sigmoid`: `-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)`. With `e = 0`
        DPO (Rafailov et al., arXiv 2305.18290, eq. 7); with `e > 0` conservative DPO,
        where `e` is the probability that the two answers of a pair are exchanged. (TRL's
        `robust` is a different correction for the same noise.)
      `ipo`: `(m - 1 / (2 beta))^2` (Azar et al., arXiv 2310.12036, eq. 17, where beta
        is tau). The caller passes per-token means of log-probabilities, as in TRL;
        nothing is divided here.

    For `sigmoid`, sums over an answer's tokens give the DPO paper's loss. Means give its
    length-normalized variant (TRL's `sigmoid_norm`), and means with references of 0 give
    SimPO's loss (Meng et al., arXiv 2405.14734) without its target margin gamma.

    `sft_weight` adds `sft_weight * NLL(chosen)`, in nats per token of that answer:
    `-sft_weight * chosen_logps_P / chosen_lengths_P` (Pang et al., arXiv 2404.19733,
    called RPO; `rpo_alpha` in older TRL. In TRL 1.16 it is the loss type `sft`, which
    averages over the tokens of the batch; this function and the paper average over the
    tokens of each answer).

    Args:
      chosen_logps_P: `[P]`, nats, policy's log-probability of the chosen answer.
      rejected_logps_P: `[P]`, nats, policy's, rejected answer.
      reference_chosen_logps_P: `[P]`, nats, reference's; no gradient flows into it.
      reference_rejected_logps_P: `[P]`, nats, reference's; no gradient either.
      beta: positive; scales the margin. A larger value keeps the policy nearer to the
        reference.
      kind: `sigmoid` or `ipo`.
      label_smoothing: in [0, 0.5), for `sigmoid` only.
      sft_weight: weight of the chosen answer's negative log-likelihood.
      chosen_lengths_P: `[P]`, tokens that `chosen_logps_P` sums over; ones where it is
        a mean. Needed with `sft_weight`; 0 counts as 1, so an empty answer has no NLL.

    Returns:
      `(loss_P, chosen_rewards_P, rejected_rewards_P)`, `[P]` each. Rewards are `beta * r`
      of the given values (of means, if means were given), without gradient. A pair is
      ranked correctly if the chosen reward is larger.
    """
    if kind not in ("sigmoid", "ipo"):
        raise ValueError(f"kind must be 'sigmoid' or 'ipo', not {kind!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), not {label_smoothing}")
    if kind == "ipo" and label_smoothing:
        raise ValueError("label_smoothing must be 0 for kind 'ipo', which has none")
    if sft_weight and chosen_lengths_P is None:
        raise ValueError("sft_weight needs chosen_lengths_P")

    chosen_ratio_P = _log_ratio(chosen_logps_P, reference_chosen_logps_P)
    rejected_ratio_P = _log_ratio(rejected_logps_P, reference_rejected_logps_P)
    margin_P = chosen_ratio_P - rejected_ratio_P
    if kind == "sigmoid":
        right_P = jax.nn.log_sigmoid(beta * margin_P)
        wrong_P = jax.nn.log_sigmoid(-beta * margin_P)
        loss_P = -(1 - label_smoothing) * right_P - label_smoothing * wrong_P
    else:
        loss_P = jnp.square(margin_P - 1 / (2 * beta))
    if sft_weight:
        lengths_P = jnp.maximum(chosen_lengths_P, 1)
        loss_P -= sft_weight * _at_least_float32(chosen_logps_P) / lengths_P
    chosen_rewards_P = jax.lax.stop_gradient(beta * chosen_ratio_P)
    rejected_rewards_P = jax.lax.stop_gradient(beta * rejected_ratio_P)
    return loss_P, chosen_rewards_P, rejected_rewards_P


def _log_ratio(logps_P: jax.Array, reference_logps_P: jax.Array) -> jax.Array:
    reference_logps_P = jax.lax.stop_gradient(_at_least_float32(reference_logps_P))
    return jnp.subtract(_at_least_float32(logps_P), reference_logps_P)


def _pick(values: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values, ids[..., None], axis=-1)[..., 0]


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
