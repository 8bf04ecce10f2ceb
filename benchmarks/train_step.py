"""Compares one LSSD training step with its teacher with PyTorch, in one run.

    python -m benchmarks.train_step [--rows 4 --length 512 --rounds 5]

Both sides compute the same: SmolLM2-135M's shapes with the same random weights, teacher
forward, student forward and backward, clipping by global norm, AdamW, float32. PyTorch runs
transformers' `LlamaForCausalLM` (scaled dot-product attention), the literal swap on dense
logits and the fused AdamW. The two alternate, so that changes in the machine's speed affect
both; the result is the median over rounds. Needs the test requirements.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from mixcpt_jax import config as config_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import over_tokens, teachers
from mixcpt_jax.training import optimizer, steps

SMOLLM2 = transformer.ModelConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    mlp_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    max_positions=8192,
    rope_theta=1e5,
    tie_embeddings=True,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    config = config_lib.default().optimizer
    student, teacher = (
        jax.jit(lambda seed: transformer.init_params(SMOLLM2, jax.random.key(seed)))(
            seed
        )
        for seed in (0, 1)
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, SMOLLM2.vocab_size, (args.rows, args.length + 1))

    torch_step = make_torch_step(config, student, teacher, ids)
    jax_step = make_jax_step(config, student, teacher, ids)
    sides = {"mixcpt_jax": jax_step, "torch": torch_step}
    # The first round compiles; its losses show that both compute the same.
    losses = {name: step() for name, step in sides.items()}
    seconds = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, step in sides.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    tokens = args.rows * args.length
    print(
        f"jax {jax.__version__}, torch {torch.__version__}, {args.rows} x {args.length}"
    )
    print(f"{'':12} {'first loss':>12} {'s/step':>8} {'tokens/s':>9}")
    for name in sides:
        median = statistics.median(seconds[name])
        print(f"{name:12} {losses[name]:12.6f} {median:8.2f} {tokens / median:9.0f}")
    ratios = [
        t / j for j, t in zip(seconds["mixcpt_jax"], seconds["torch"], strict=True)
    ]
    print(
        f"speed-up over torch: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f} over {args.rounds} rounds)"
    )


def make_jax_step(config, student, teacher, ids):
    transforms, schedule = optimizer.make_optimizer(config, num_steps=1000)
    train_step = jax.jit(
        steps.make_train_step(
            over_tokens.token_objective(
                transformer.make_forward(SMOLLM2, remat="dots"),
                teachers.running_teacher(transformer.make_forward(SMOLLM2)),
                ("all",),
            ),
            transforms,
            schedule,
        ),
        donate_argnums=0,
        compiler_options=steps.COMPILER_OPTIONS[jax.default_backend()],
    )
    shape = ids[:, 1:].shape
    ones, zeros = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    batch = {
        "tokens": jnp.asarray(ids[:, :-1], jnp.int32),
        "targets": jnp.asarray(ids[:, 1:], jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "source_ids": jnp.zeros(shape, jnp.int32),
        "loss_mask": ones,
    }
    batch |= {f"{objective}_weights": zeros for objective in config_lib.OBJECTIVES}
    batch["lssd_weights"] = ones
    # The step donates its state, and torch reads these parameters later.
    params = jax.tree.map(jnp.copy, student)
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, transforms.init(params))

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, teacher, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"][0])

    return step


def make_torch_step(config, student, teacher, ids):
    student, teacher = (to_torch(params) for params in (student, teacher))
    # The same groups as ours: norms are not decayed.
    matrices = [p for p in student.parameters() if p.ndim > 1]
    scales = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )
    tokens, targets = (torch.tensor(x) for x in (ids[:, :-1], ids[:, 1:]))

    def step() -> float:
        optimizer.zero_grad()
        with torch.no_grad():
            target = torch.log_softmax(swap(teacher(tokens).logits, targets), -1)
        log_q = torch.log_softmax(student(tokens).logits, -1)
        loss = torch.sum(target.exp() * (target - log_q), -1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
        optimizer.step()
        return loss.item()

    return step


def swap(logits, targets):
    """Exchanges the largest logit with the gold one, in place."""
    top_logit, top = logits.max(-1, keepdim=True)
    gold = targets[..., None]
    gold_logit = logits.gather(-1, gold)
    return logits.scatter_(-1, top, gold_logit).scatter_(-1, gold, top_logit)


def to_torch(params):
    """transformers' model with our parameters."""
    config = transformers.LlamaConfig(
        vocab_size=SMOLLM2.vocab_size,
        hidden_size=SMOLLM2.hidden_size,
        intermediate_size=SMOLLM2.mlp_size,
        num_hidden_layers=SMOLLM2.num_layers,
        num_attention_heads=SMOLLM2.num_heads,
        num_key_value_heads=SMOLLM2.num_kv_heads,
        head_dim=SMOLLM2.head_size,
        max_position_embeddings=SMOLLM2.max_positions,
        rope_theta=SMOLLM2.rope_theta,
        rms_norm_eps=SMOLLM2.norm_epsilon,
        tie_word_embeddings=True,
        use_cache=False,
    )
    network = transformers.LlamaForCausalLM(config)
    tensors = {
        "model.embed_tokens.weight": params["embedding"],
        "model.norm.weight": params["final_norm"],
    }
    names = {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    for name, theirs in names.items():
        for layer, value in enumerate(np.asarray(params["layers"][name])):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = value.T
    tensors = {k: torch.tensor(np.array(v)) for k, v in tensors.items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    network.load_state_dict(tensors)
    return network


if __name__ == "__main__":
    main()
