"""One GPU: its presets, the table of memory, compiler options, the benchmark."""

import jax
import pytest

from benchmarks import gpu_memory
from configs import one_gpu
from mixcpt_jax import config as config_lib
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.models import pretrained
from mixcpt_jax.planning import step_plan
from mixcpt_jax.training import phase, steps


@pytest.mark.parametrize("variant", one_gpu.FITS)
def test_a_preset_fits_on_its_gpu(variant):
    config = one_gpu.get_config(variant)
    shape = pretrained.read_model_config(config.model.architecture)
    config.model.path = "weights"
    for source in config.sources.values():
        source.path = "text"
    config_lib.validate(config, 1)
    phase.check_model(config, shape, 1)
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    size = config.data.row_length
    needed = step_plan.step_memory(config, shape, (1, 1, 1), rows, size) / GIB
    assert needed <= gpu_memory.GPUS[variant.partition("-")[0]]


@pytest.mark.slow
def test_the_page_has_the_table_that_the_command_prints(project):
    page = (project / "docs" / "gpu.md").read_text()
    shown = page.partition("<!-- gpu-memory -->")[2].partition("<!-- /gpu-memory -->")[
        0
    ]
    assert shown.strip() == gpu_memory.table().strip()


def test_the_compiler_knows_the_options_for_gpus():
    """Its CPU backend refuses names that no backend has."""

    def compile_with(options):
        jax.jit(lambda x: x + 1, compiler_options=options).lower(1.0).compile()

    compile_with(steps.COMPILER_OPTIONS["gpu"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such_option"):
        compile_with({"xla_gpu_no_such_option": True})
