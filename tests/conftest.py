"""Eight CPU devices, no silent broadcasting, and warnings of ours are errors."""

import contextlib
import importlib.metadata
import os
import tempfile

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
# These emitters compile a step in a third of the time; later versions lack the flag.
os.environ["XLA_FLAGS"] = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
# What one test compiles serves the others, in all processes of this run of the tests.
COMPILED = contextlib.ExitStack()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.TemporaryDirectory(prefix="mixcpt-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.enter_context(folder)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
# No test reaches the Hub; those of `hub_server` are served on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny programs take longer to compile well than to run; jax tests itself so, too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# In this process alone; processes that it starts have one device, or as many as asked.
jax.config.update("jax_num_cpu_devices", 8)

import fcntl
import gc
import json
import logging
import pathlib
import shutil
import signal
import sys

import hypothesis
import pytest
import six_phases
import tiny
import tokenizers
from jax.experimental.compilation_cache import compilation_cache
from processes import Launcher, finish

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core import paths
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.models import tokenizer as tokenizer_lib

ASSETS = "package:mixcpt_jax/assets"

# What a property test tries: always the same. `EXAMPLES=1000` looks longer and elsewhere.
hypothesis.settings.register_profile(
    "here",
    max_examples=int(os.environ.get("EXAMPLES", "60")),
    derandomize="EXAMPLES" not in os.environ,
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("here")


def pytest_unconfigure():
    COMPILED.close()


def pytest_collection_finish():
    """Excludes the objects of modules and tests from later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.get_closest_marker("long"))


_SIGNALS = dict.fromkeys(
    (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP), signal.SIG_DFL
)
_SIGNALS[signal.SIGINT] = signal.default_int_handler


@pytest.fixture(autouse=True)
def process_state():
    """Restores what a command changes in its process, so that no later test sees it.

    Signals have an effect, although `nohup` or a shell in the background ignores some.
    """
    root = logging.getLogger()
    folder, environment = os.getcwd(), dict(os.environ)
    handlers, level = root.handlers.copy(), root.level
    hooks = sys.excepthook, sys.unraisablehook
    on_signal = {n: signal.signal(n, default) for n, default in _SIGNALS.items()}
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in on_signal.items():
        signal.signal(number, handler or signal.SIG_DFL)  # None: that of a library
    sys.excepthook, sys.unraisablehook = hooks
    root.handlers[:] = handlers
    root.setLevel(level)
    changed = {name for name, _ in os.environ.items() ^ environment.items()}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in environment:
            os.environ[name] = environment[name]
        else:
            del os.environ[name]
    os.chdir(folder)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`(name, make) -> folder`, in which the first process to ask has called `make`.

    The processes of one run of the tests share these folders.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def once(name, make) -> pathlib.Path:
        folder, done = root / f"shared-{name}", root / f"shared-{name}.done"
        with (root / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def launcher(tmp_path_factory):
    """Starts processes of the command line, whose imports are paid once."""
    with Launcher(tmp_path_factory.mktemp("processes")) as launcher:
        yield launcher


@pytest.fixture(scope="module")
def compiled_anew():
    """For tests that compile for a slice, as it would run.

    What is compiled for a slice cannot be read back from the cache.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_disable_most_optimizations", True)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled_well():
    """For tests that run a real model, which takes longer than to compile it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def compiled_quickly(monkeypatch):
    """For tests that compile for a slice whatever need not be as it would run.

    So do their processes. Compiling for a CPU takes the same effort as ever.
    """
    monkeypatch.setenv("JAX_EXEC_TIME_OPTIMIZATION_EFFORT", "-1")
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", 0.0)


@pytest.fixture(scope="session")
def tiny_model(once) -> str:
    """An HF folder with a random two-layer model and a byte-level BPE tokenizer."""
    return f"{once('tiny_model', _write_tiny_model)}/hf"


@pytest.fixture(scope="session")
def longer_model(once) -> str:
    """`tiny_model` with a context that the pages' commands fit in."""
    folder = once(
        "longer_model", lambda folder: _write_tiny_model(folder, max_positions=512)
    )
    return f"{folder}/hf"


@pytest.fixture(scope="session")
def larger_model(once) -> str:
    """A wider and deeper model with the vocabulary of `tiny_model`."""
    size = {"hidden_size": 48, "num_layers": 3, "num_heads": 6}
    return (
        f"{once('larger_model', lambda folder: _write_tiny_model(folder, **size))}/hf"
    )


def _write_tiny_model(folder: pathlib.Path, **settings) -> None:
    bpe = tokenizers.ByteLevelBPETokenizer()
    lines = paths.require_file(f"{ASSETS}/instructions.jsonl").read_text().splitlines()
    bpe.train_from_iterator(
        (json.loads(line)["output"] for line in lines),
        vocab_size=tiny.NUM_TOKENS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model_config = tiny.architecture(**{"tie_embeddings": True} | settings)
    params = transformer.init_params(model_config, jax.random.key(0))
    pretrained.save_pretrained(
        str(folder / "hf"),
        params,
        model_config,
        dtype="float32",
        tokenizer=tokenizer_lib.load(str(folder)),
    )


@pytest.fixture
def tiny_config(tiny_model):
    """A config of one short LSSD phase over eight devices; tests change it freely."""
    return _tiny_config(tiny_model)


@pytest.fixture(scope="session")
def finished(tiny_model, once) -> pathlib.Path:
    """The folder of phase `cpt` of `tiny_config`, run to its end; tests leave it so."""

    def make(folder):
        from mixcpt_jax.jobs import train  # only some tests need its imports

        train.run(_tiny_config(tiny_model), f"{folder}/run", "cpt")

    return once("finished", make) / "run"


def _tiny_config(tiny_model):
    config = config_lib.default()
    config.objective.ntp_weight, config.objective.lssd_weight = 0.0, 1.0
    config.model.path = tiny_model
    config.model.compute_dtype = "float32"
    config.model.teacher_dtype = "float32"
    config.model.remat = "none"
    config.sources.domain = config_lib.source(
        path=f"{ASSETS}/general_text.jsonl", weight=0.6, holdout=4
    )
    config.sources.instructions = config_lib.source(
        path=f"{ASSETS}/instructions.jsonl",
        format="instruction",
        weight=0.4,
        holdout=4,
        ntp_weight=0.5,
        lssd_weight=0.5,
    )
    config.data.row_length = 64
    config.data.batch_size = 8
    config.optimizer.learning_rate = 3e-3
    config.train.num_steps = 6
    config.train.save_every = 2
    config.metrics.tensorboard = False
    config.metrics.progress = False
    return config


@pytest.fixture(scope="session")
def tiny_run(tiny_model, once) -> str:
    """The workdir of a run: phases `whole`, `adapters` from its end, and `export`."""
    config = config_lib.default()
    config.model.path = tiny_model
    config.model.compute_dtype = "float32"
    config.sources.domain = config_lib.source(path=f"{ASSETS}/general_text.jsonl")
    config.data.row_length = 64
    config.data.batch_size = 8
    config.objective.lssd_weight = 0.0
    config.objective.ntp_weight = 1.0
    config.optimizer.learning_rate = 3e-2
    config.train.num_steps = 2
    config.metrics.tensorboard = False
    config.metrics.progress = False
    config.phases = ("whole", "adapters", "export")
    config.overrides.adapters = {"init_from": "phase:whole", "lora": {"rank": 2}}
    config.overrides.export = {"init_from": "phase:adapters", "job": "export"}
    config.export.dtype = "float32"
    folder = once("tiny_run", lambda folder: main.run(config, f"{folder}/tiny"))
    return f"{folder}/tiny"


@pytest.fixture(scope="session")
def six_phase_run(tiny_model, project, launcher, once) -> pathlib.Path:
    """The workdir of a run of all six phases on two devices that nothing disturbed."""

    def make(folder):
        flags = six_phases.flags(project, tiny_model, folder / "run")
        finish([launcher.start(*flags, num_devices=2)])

    return once("six_phases", make) / "run"


@pytest.fixture(scope="session")
def project() -> pathlib.Path:
    return pathlib.Path(__file__).parent.parent


@pytest.fixture
def write_config_file(tmp_path):
    """Writes a config as the file that the command line reads."""

    def write(config) -> pathlib.Path:
        file = tmp_path / "config.py"
        file.write_text(
            "import json\n\nimport ml_collections\n\n\n"
            "def get_config():\n"
            f"    text = {config.to_json()!r}\n"
            "    return ml_collections.ConfigDict(json.loads(text))\n"
        )
        return file

    return write
