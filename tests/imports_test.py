"""The house's rule: imports go one way."""

import ast

# Each file may import these of the package, besides `errors` and `paths`.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "paths": set(),
    "losses": set(),
    "config": {"sharding"},
    "sharding": set(),
    "chips": set(),
    "hlo": set(),
    "attention": {"sharding"},
    "model": {"attention", "sharding"},
    "fused": {"chips", "sharding"},
    "optim": set(),
    "tokenizer": set(),
    "weights": {"model", "tokenizer"},
    "steps": {"fused", "model", "optim", "sharding"},
    "checkpoint": {"hosts", "steps"},
    "metrics": {"terminal"},
    "hosts": set(),
    "preemption": set(),
    "terminal": set(),
    "watchdog": set(),
    "phase": {
        "__version__", "checkpoint", "config", "data", "fused", "hosts", "model",
        "sharding", "steps", "tokenizer", "weights",
    },
    "command": {"preemption", "terminal"},
    # Commands themselves as well.
    "sample": {"command", "data", "model", "runs", "sharding", "tokenizer"},
    "evaluate": {
        "command", "data", "metrics", "model", "phase", "runs", "sample", "statistics",
        "terminal",
    },
    "statistics": set(),
    "runs": {
        "checkpoint", "config", "export", "model", "phase", "sharding", "tokenizer",
        "weights",
    },
    "harness": {"command", "data", "evaluate", "runs", "sample"},
    "reference": {"data", "evaluate"},
    "teacher": {"data", "phase", "sharding", "steps"},
    "select": {"data", "evaluate", "metrics", "phase"},
    "export": {"phase", "weights"},
    "plots": set(),
    "records": {"metrics"},
    "page": {"config", "plots", "records", "statistics"},
    "report": {"metrics", "page", "records"},
    "train": {
        "checkpoint", "config", "data", "evaluate", "fused", "losses", "metrics",
        "model", "optim", "phase", "preemption", "reference", "sharding", "steps",
        "teacher", "terminal", "watchdog",
    },
    "main": {
        "command", "config", "evaluate", "export", "hosts", "phase", "report", "select",
        "terminal", "train",
    },
    "data": {"config", "data"},
    "plan": {
        "attention", "chips", "config", "data", "hlo", "main", "metrics", "model",
        "phase", "sharding", "teacher", "train", "weights",
    },
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
