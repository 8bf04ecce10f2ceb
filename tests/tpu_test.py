"""The head and the step, compiled by XLA for TPU slices that do not exist."""

import functools
import importlib.util

import jax
import pytest

from benchmarks import lssd_head
from mixcpt_jax.core import chips
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import streamed
from mixcpt_jax.planning import hlo
from mixcpt_jax.runtime import sharding

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
    pytest.mark.usefixtures("compiled_anew"),
]

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 128256

# Two layers of 1/8 of the width; the vocabulary is 4 x 8,016, sizes nothing else has.
SMALL = transformer.ModelConfig(
    family="llama",
    vocab_size=32064,
    hidden_size=512,
    mlp_size=1024,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=128,
    max_positions=4096,
    rope_theta=5e5,
)


def test_the_head_of_llama_3_8b_costs_its_four_products():
    mesh = sharding.make_topology_mesh("v5e:2x2", lssd_head.ONE_CHIP)
    compiled = lssd_head.compile_head(
        lssd_head.head_forms.streamed, mesh, TOKENS, VOCABULARY
    )
    module = hlo.Module(compiled.as_text())
    floor = 8 * TOKENS * HIDDEN * VOCABULARY
    assert module.flops <= 1.02 * floor
    gradient = 4 * HIDDEN * VOCABULARY
    assert lssd_head.temporary(compiled) - gradient <= 0.75 * GIB
    chip = chips.of_topology("v5e:2x2")
    seconds = module.roofline_seconds(chip.flops, chip.hbm_bandwidth)
    assert seconds <= 1.25 * floor / chip.flops


def test_only_hidden_states_and_scalars_cross_between_shards_of_the_vocabulary():
    mesh = sharding.make_topology_mesh("v5e:2x2", {"data": 1, "fsdp": 1, "tensor": 4})
    compiled = lssd_head.compile_head(
        lssd_head.head_forms.streamed, mesh, 2048, VOCABULARY
    )
    collectives = hlo.Module(compiled.as_text()).collectives
    assert collectives
    for collective in collectives:
        for array in collective.arrays:
            assert VOCABULARY // 4 not in array.dimensions, collective
            assert VOCABULARY not in array.dimensions, collective
        # The gradient of the hidden states, at most in float32.
        assert collective.num_bytes <= 2048 * HIDDEN * 4, collective


@pytest.mark.usefixtures("compiled_quickly")
def test_the_step_holds_a_block_of_logits_and_computes_nothing_twice():
    block, length = 1024, 2048
    compiled = lssd_head.compile_step(
        SMALL,
        "v5e:2x2",
        functools.partial(streamed.head_loss, chunk_size=512, block_size=block),
        has_teacher=True,
        sequences_per_chip=1,
        length=length,
    )
    module = hlo.Module(compiled.as_text())
    sizes = (SMALL.vocab_size, SMALL.vocab_size // 4)
    seen = 0
    for array in module.arrays():
        for size in sizes:
            if size in array.dimensions:
                tokens = array.num_elements // size
                assert tokens <= max(block, SMALL.hidden_size), array
                seen += tokens > 1
                break
    assert seen
    needed = lssd_head.needed_flops(SMALL, has_teacher=True) * length
    assert module.flops <= 1.05 * needed


@pytest.mark.usefixtures("compiled_quickly")
def test_with_adapters_the_teacher_costs_no_second_copy():
    lora = lora_lib.Lora(8, 8.0, lora_lib.LORA_TARGETS)
    length = 1024

    def compiled(has_teacher, lora):
        return lssd_head.compile_step(
            SMALL, "v5e:2x2", streamed.head_loss, has_teacher, 1, length, lora
        )

    def arguments(compiled):
        return compiled.memory_analysis().argument_size_in_bytes

    distilled = compiled(True, lora)
    assert arguments(distilled) == arguments(compiled(False, lora))
    weights = (
        sum(x.size for x in jax.tree.leaves(transformer.abstract_params(SMALL))) / 4
    )
    # Frozen weights in bfloat16, and adapters with their moments in float32. Training
    # all weights takes 14 bytes each: with moments in float32, and a bfloat16 teacher.
    assert 2 * weights <= arguments(distilled) <= 2.5 * weights
    # No gradient of a frozen weight is computed, that of the unembedding included.
    needed = lssd_head.needed_flops(SMALL, True, lora) * length
    assert hlo.Module(distilled.as_text()).flops <= 1.1 * needed
