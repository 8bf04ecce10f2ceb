"""AdamW with a learning-rate schedule, global-norm clipping and a decay mask."""

import jax
import jax.numpy as jnp
import ml_collections
import optax


def make_schedule(config: ml_collections.ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate at each step, after a linear warm-up.

    Args:
      config: `config.optimizer`. `schedule` is "cosine" (to `final_ratio` of the peak),
        "wsd" (warm-up, stable, then linear to `final_ratio` over the last
        `decay_fraction` of the steps) or "constant".
      num_steps: length of the phase, warm-up included.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    final = peak * config.final_ratio
    after_warmup = num_steps - warmup
    match config.schedule:
        case "cosine":
            body = optax.cosine_decay_schedule(
                peak, max(after_warmup, 1), config.final_ratio
            )
        case "wsd":
            decay_steps = max(1, round(config.decay_fraction * num_steps))
            body = optax.linear_schedule(
                peak, final, decay_steps, transition_begin=after_warmup - decay_steps
            )
        case "constant":
            body = optax.constant_schedule(peak)
        case unknown:
            raise ValueError(f"optimizer.schedule={unknown!r}")
    # Step 0 already learns: the warm-up ramp starts one step in.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, body], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clip by global norm, then AdamW; norms and biases are not decayed."""
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
    return transforms, schedule


def decay_mask(params) -> dict:
    """True for matrices: leaves named like a norm scale or a bias are left alone."""

    def is_matrix(path, _):
        name = path[-1].key
        return not (name.endswith("norm") or name.endswith("bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def state_shardings(
    transforms: optax.GradientTransformation, params, param_shardings, replicated
):
    """Shardings of the optimizer state: moments lie where their parameters lie.

    The compiler would replicate them: nothing in `init` ties zeros to a parameter.

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
