"""AdamW with a learning-rate schedule, global-norm clipping and a decay mask.

Options: parameters and moments in bfloat16, rounded stochastically; steps whose gradient
is not finite, or far too large, are skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from mixcpt_jax import config as config_lib

# The running mean of gradient norms covers about `_MEAN_OVER` accepted steps; no step
# counts as a spike before `_MIN_ACCEPTED` steps were accepted.
_MEAN_OVER = 100
_MIN_ACCEPTED = 20


def make_schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate at each step, after a linear warm-up.

    Step `warmup_steps` (counted from 0), the first after the warm-up, has the peak.
    Under "cosine" and "wsd" the last step, `num_steps - 1`, has exactly `final_ratio` times
    the peak; a warm-up that leaves no step between them is shortened by one step. In a
    phase of one step, that step has the final rate.

    Args:
      config: `config.optimizer`. `schedule` is "cosine" (decays from the peak on), "wsd"
        (warm-up, stable, then a linear decay over the last `decay_fraction` of the
        steps, or over those after the peak if they are fewer) or "constant".
      num_steps: length of the phase, warm-up included.
    """
    peak = config.learning_rate
    warmup = config_lib.warmup_steps(config, num_steps)
    final = peak * config.final_ratio
    if config.schedule == "constant":
        final = peak
    else:
        warmup = max(min(warmup, num_steps - 2), 0)
    steps_after_peak = max(1, num_steps - 1 - warmup)
    match config.schedule:
        case "constant":
            body = optax.constant_schedule(peak)
        case "cosine":
            body = optax.cosine_decay_schedule(
                peak, steps_after_peak, config.final_ratio
            )
        case "wsd":
            decay_steps = max(1, round(config.decay_fraction * num_steps))
            decay_steps = min(decay_steps, steps_after_peak)
            body = optax.linear_schedule(
                peak,
                final,
                decay_steps,
                transition_begin=steps_after_peak - decay_steps,
            )
        case unknown:
            raise ValueError(f"optimizer.schedule={unknown!r}")
    # The ramp starts one step in, so that step 0 has a rate above 0.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    # The decays end within rounding of the final rate.
    last = optax.constant_schedule(final)
    return optax.join_schedules([ramp, body, last], [warmup, num_steps - 1])


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int, param_dtype: str = "float32"
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clips by global norm, then applies AdamW; norms and biases are not decayed.

    Args:
      config: `config.optimizer`.
      num_steps: length of the phase.
      param_dtype: of the trained parameters.
    """
    schedule = make_schedule(config, num_steps)
    transforms = optax.chain(
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm
        else optax.identity(),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
    if {param_dtype, config.moments_dtype} != {"float32"}:
        transforms = round_moments(transforms, config.moments_dtype)
    return transforms, schedule


class Guarded(NamedTuple):
    """State of `skip_bad_steps`.

    Attributes:
      inner: the inner optimizer's state.
      skipped: all skipped steps.
      in_a_row: skipped steps since the last accepted one.
      longest: the most steps skipped in a row.
      accepted: all accepted steps.
      norm_sum: exponentially weighted sum of the accepted gradient norms, whose weights
        add up to `1 - (1 - 1 / _MEAN_OVER)^accepted`.
    """

    inner: Any
    skipped: jax.Array
    in_a_row: jax.Array
    longest: jax.Array
    accepted: jax.Array
    norm_sum: jax.Array


def skip_bad_steps(
    inner: optax.GradientTransformation, spike_factor: float = 0.0
) -> optax.GradientTransformation:
    """Skips bad steps: parameters and inner optimizer state stay bitwise unchanged.

    A step is bad if its gradient's norm is not finite, or a spike. Skipped steps do not
    advance the schedule. `optax.apply_if_finite` does not detect spikes, and after too many
    bad steps applies one; here the training loop ends the run instead.

    Args:
      inner: the optimizer.
      spike_factor: a norm above this many times the running mean of the accepted ones is a
        spike; 0: no spike detection.
    """
    decay = 1 - 1 / _MEAN_OVER

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return Guarded(inner.init(params), zero, zero, zero, zero, jnp.zeros(()))

    def update(grads, state: Guarded, params=None):
        norm = global_norm(grads)
        is_good = jnp.isfinite(norm)
        if spike_factor:
            weights = 1 - decay ** jnp.maximum(state.accepted, 1)
            mean = state.norm_sum / weights
            is_good &= (state.accepted < _MIN_ACCEPTED) | (norm <= spike_factor * mean)

        def choose(good, bad):
            return jax.tree.map(lambda g, b: jnp.where(is_good, g, b), good, bad)

        updates, new_inner = inner.update(grads, state.inner, params)
        # Adding -0 changes no parameter, not even -0.
        updates = choose(
            updates, jax.tree.map(lambda u: jnp.full_like(u, -0.0), updates)
        )
        in_a_row = jnp.where(is_good, 0, state.in_a_row + 1)
        return updates, Guarded(
            choose(new_inner, state.inner),
            state.skipped + ~is_good,
            in_a_row,
            jnp.maximum(state.longest, in_a_row),
            state.accepted + is_good,
            choose(decay * state.norm_sum + (1 - decay) * norm, state.norm_sum),
        )

    return optax.GradientTransformation(init, update)


class RoundedMoments(NamedTuple):
    """State of `round_moments`: the inner optimizer's, and the number of its steps."""

    inner: Any
    count: jax.Array


def round_moments(
    inner: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """Stores the moments in the given dtype; computes in float32.

    By itself, optax stores moments in the dtype of the parameters, rounded to nearest. In
    bfloat16 a second moment then stops changing: each step changes it by less than half of
    its last digit.

    Args:
      inner: the optimizer.
      dtype: of the moments.
    """

    def init(params):
        moments = inner.init(_cast(params, "float32"))
        return RoundedMoments(_cast(moments, dtype), jnp.zeros((), jnp.int32))

    def update(grads, state: RoundedMoments, params=None):
        wide = (_cast(tree, "float32") for tree in (grads, state.inner, params))
        updates, new_inner = inner.update(*wide)
        key = jax.random.fold_in(jax.random.key(1), state.count)
        moments = _round_tree(
            new_inner, jax.tree.map(lambda old: old.dtype, state.inner), key
        )
        return updates, RoundedMoments(moments, state.count + 1)

    return optax.GradientTransformation(init, update)


def _cast(tree, dtype: str):
    """Casts the floating-point leaves of a tree, not its counters."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def apply_updates(params, updates, step: jax.Array):
    """`params + updates`; to bfloat16 the sums are rounded stochastically.

    Rounding to nearest would lose every update smaller than 1/512 of its parameter.

    Args:
      params: parameters.
      updates: of the optimizer, same tree.
      step: the number of steps taken; it seeds the rounding.
    """
    sums = jax.tree.map(
        lambda p, u: p.astype(jnp.float32) + u.astype(jnp.float32), params, updates
    )
    key = jax.random.fold_in(jax.random.key(0), step)
    return _round_tree(sums, jax.tree.map(lambda p: p.dtype, params), key)


def _round_tree(tree, dtypes, key: jax.Array):
    leaves, structure = jax.tree.flatten(tree)
    rounded = [
        round_stochastically(leaf, jax.random.fold_in(key, number))
        if dtype == jnp.bfloat16
        else leaf.astype(dtype)
        for number, (leaf, dtype) in enumerate(
            zip(leaves, jax.tree.leaves(dtypes), strict=True)
        )
    ]
    return jax.tree.unflatten(structure, rounded)


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the probabilities that make the mean exact.

    bfloat16 is the upper half of a float32. Adding a random lower half carries into the
    upper half with a probability proportional to the original lower half.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def decay_mask(params) -> dict:
    """True for matrices, False for leaves named like a norm scale or a bias."""

    def is_matrix(path, _):
        name = path[-1].key
        return not (name.endswith("norm") or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def state_shardings(
    transforms: optax.GradientTransformation, params, param_shardings, replicated
):
    """Shardings of the optimizer state: moments have those of their parameters.

    The compiler would replicate them, because zeros do not depend on a parameter.

    Args:
      transforms: the optimizer.
      params: parameters or their `jax.ShapeDtypeStruct`s.
      param_shardings: one sharding per parameter, same tree.
      replicated: the sharding of everything else, such as step counts.
    """
    abstract = jax.eval_shape(transforms.init, params)
    return optax.tree_map_params(
        transforms,
        lambda _, sharding: sharding,
        abstract,
        param_shardings,
        transform_non_params=lambda _: replicated,
    )


def global_norm(tree) -> jax.Array:
    """The L2 norm over all leaves, float32."""
    return optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), tree))
