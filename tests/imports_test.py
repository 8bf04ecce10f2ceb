"""The house's rules: imports go one way, and --help does not wait for them."""

import ast
import os
import re
import subprocess
import sys

import pytest

# Each file may import these of the package, besides `errors` and `paths`.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "paths": set(),
    "headers": set(),
    "companions": {"headers"},
    "losses": set(),
    "config": {"sharding"},
    "sharding": set(),
    "chips": set(),
    "hlo": set(),
    "attention": {"sharding"},
    "model": {"attention", "sharding"},
    "fused": {"chips", "sharding"},
    "optim": {"config"},
    "finite": set(),
    "tokenizer": {"companions", "headers"},
    "weights": {"finite", "headers", "model", "tokenizer"},
    "steps": {"fused", "model", "optim", "sharding"},
    "checkpoint": {"finite", "hosts", "steps"},
    "metrics": {"terminal"},
    "hosts": set(),
    "preemption": set(),
    "terminal": set(),
    "watchdog": set(),
    "phase": {
        "__version__", "checkpoint", "config", "data", "fused", "hosts", "model",
        "sharding", "steps", "terminal", "tokenizer", "weights",
    },
    "command": {"preemption", "terminal"},
    "decoding": {"model", "sharding", "tokenizer"},
    "measures": {
        "data", "decoding", "metrics", "model", "phase", "runs", "statistics",
    },
    "lm_eval_model": {"data", "decoding", "measures", "runs"},
    "planning": {
        "attention", "chips", "config", "data", "hlo", "metrics", "model", "phase",
        "sharding", "teacher", "train", "weights",
    },
    # Commands.
    "sample": {"command", "data", "decoding", "runs"},
    "evaluate": {"command", "data", "measures", "runs", "terminal"},
    "harness": {"command", "lm_eval_model"},
    "plan": {"main", "planning"},
    "statistics": set(),
    "runs": {
        "checkpoint", "config", "export", "model", "phase", "sharding", "tokenizer",
        "weights",
    },
    "reference": {"data", "measures"},
    "teacher": {"data", "phase", "sharding", "steps"},
    "select": {"data", "measures", "metrics", "phase"},
    "export": {"phase", "weights"},
    "plots": set(),
    "records": {"metrics"},
    "changes": {"records", "statistics"},
    "page": {"changes", "config", "plots", "records"},
    "report": {"changes", "command", "metrics", "page", "records"},
    "train": {
        "checkpoint", "config", "data", "fused", "losses", "measures", "metrics",
        "model", "optim", "phase", "preemption", "reference", "sharding", "steps",
        "teacher", "watchdog",
    },
    "sizing": {
        "chips", "config", "data", "model", "planning", "sharding", "terminal",
        "tokenizer", "weights",
    },
    "main": {
        "command", "config", "export", "hosts", "measures", "phase", "report", "select",
        "sizing", "terminal", "train",
    },
    "data": {"config", "data"},
    # A command that lies with what it makes.
    "data/prepare": {"config", "data", "main", "teacher", "tokenizer"},
}  # fmt: skip
FREE = {"errors", "paths"}


def imported(tree, top_level_only=False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(project):
    for file in sorted((project / "mixcpt_jax").rglob("*.py")):
        yield file, ast.parse(file.read_text())


def test_imports_go_one_way(project):
    for file, tree in files(project):
        path = str(file.relative_to(project / "mixcpt_jax").with_suffix(""))
        part = path if path in ALLOWED else path.split("/")[0]
        ours = {
            name.split(".")[1]
            for name in imported(tree)
            if name.startswith("mixcpt_jax.")
        }
        assert ours <= ALLOWED[part] | FREE, f"{file.name} imports {ours}"


def test_data_does_not_import_jax(project):
    for file, tree in files(project):
        if file.parent.name == "data":
            roots = {name.split(".")[0] for name in imported(tree)}
            assert not roots & {"jax", "flax", "optax", "orbax"}, file.name


def test_only_the_model_knows_flax(project):
    users = {
        file.name
        for file, tree in files(project)
        if any(name.split(".")[0] == "flax" for name in imported(tree))
    }
    assert users == {"model.py"}


def test_configs_import_the_config_module_only(project):
    for file in (project / "configs").glob("*.py"):
        names = set(imported(ast.parse(file.read_text())))
        ours = {name for name in names if name.startswith("mixcpt_jax")}
        assert ours <= {"mixcpt_jax", "mixcpt_jax.config"}, file.name


def test_losses_stand_alone(project):
    tree = ast.parse((project / "mixcpt_jax" / "losses.py").read_text())
    assert {name.split(".")[0] for name in imported(tree)} == {"jax"}


COMMANDS = "main", "sample", "evaluate", "harness", "report", "plan", "data.prepare"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait(project, command):
    """Processor time is what a busy machine does not change."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"mixcpt_jax.{command}", "--help"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    after = os.times()
    assert f"python -m mixcpt_jax.{command}" in done.stdout
    loaded = re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE)
    assert not {"jax", "grain", "orbax", "lm_eval"} & set(loaded)
    used = [
        getattr(after, k) - getattr(before, k)
        for k in ("children_user", "children_system")
    ]
    assert sum(used) < 1


def test_the_package_is_imported_at_once():
    code = """if True:
        import sys, time
        start = time.process_time()
        import mixcpt_jax
        assert time.process_time() - start < 0.2
        assert "jax" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
