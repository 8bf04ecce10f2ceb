"""The house's rules: imports go one way, and --help does not wait for them."""

import ast
import re
import subprocess
import sys

import pytest

from mixcpt_jax import cli

# A room may import itself and every room of an earlier row.
ROWS = [
    {"core"},
    {"__init__"},
    {"config", "runtime"},
    {"data", "reporting"},
    {"models"},
    {"objectives"},
    {"training"},
    {"evaluation", "planning"},
    {"jobs"},
    {"cli", "library", "main", "__main__"},
]
# These are one floor: commands share the flags of `main`.
SHARED_FLOOR = ROWS[-1]
ROW_OF = {room: number for number, rooms in enumerate(ROWS) for room in rooms}


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
    """Imports within functions count too."""
    wrong = []
    for file, tree in files(project):
        path = file.relative_to(project / "mixcpt_jax").with_suffix("")
        room = path.parts[0]
        for name in imported(tree):
            parts = name.split(".")
            if parts[0] != "mixcpt_jax" or len(parts) == 1:
                continue
            other = parts[1] if parts[1] in ROW_OF else "__init__"
            is_own = other == room or {room, other} <= SHARED_FLOOR
            if not is_own and ROW_OF[other] >= ROW_OF[room]:
                wrong.append(f"{path} imports {name}")
    assert not wrong


def test_no_module_hides_one_of_the_standard_library(project):
    """`python mixcpt_jax/main.py` puts the package's folder first on the path."""
    names = {path.stem for path in (project / "mixcpt_jax").iterdir()}
    assert not names & sys.stdlib_module_names


def test_data_does_not_import_jax(project):
    for file, tree in files(project):
        if file.parent.name in ("data", "config", "core"):
            roots = {name.split(".")[0] for name in imported(tree)}
            assert not roots & {"jax", "flax", "optax", "orbax"}, file.name


def test_only_the_model_knows_flax(project):
    users = {
        file.name
        for file, tree in files(project)
        if any(name.split(".")[0] == "flax" for name in imported(tree))
    }
    assert users == {"transformer.py"}


def test_configs_import_config_and_core_only(project):
    for file in (project / "configs").glob("*.py"):
        names = set(imported(ast.parse(file.read_text())))
        ours = {name for name in names if name.startswith("mixcpt_jax")}
        ours = {name for name in ours if not name.startswith("mixcpt_jax.core")}
        if file.name == "docstrings.py":  # a helper that takes seconds, and says so
            ours -= {"mixcpt_jax.runtime", "mixcpt_jax.runtime.terminal"}
        assert ours <= {"mixcpt_jax", "mixcpt_jax.config"}, file.name


def test_small_files_are_read_in_one_place(project):
    """It has bounds. Memory that a process itself has written to a file is mapped."""
    found = set()
    for file, tree in files(project):
        for node in ast.walk(tree):
            called = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if re.match(r"(json|pickle|np|yaml)\.load\(|json\.loads\(.*\.read", called):
                found.add(file.name)
    assert found == {"formats.py"}


def test_losses_stand_alone(project):
    tree = ast.parse((project / "mixcpt_jax" / "objectives" / "dense.py").read_text())
    assert {name.split(".")[0] for name in imported(tree)} == {"jax"}


SLOW_IMPORTS = {
    "flax", "grain", "jax", "lm_eval", "matplotlib", "optax", "orbax", "pandas",
    "pyarrow", "torch", "transformers",
}  # fmt: skip
COMMANDS = [["mixcpt_jax.main"], ["mixcpt_jax"]] + [
    ["mixcpt_jax", name] for name in cli.COMMANDS
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_does_not_wait(project, command):
    """What takes long to import is not imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *command, "--help"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "mixcpt" in done.stdout
    loaded = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "mixcpt_jax" in loaded
    assert not SLOW_IMPORTS & loaded


def test_the_package_is_imported_at_once():
    code = "import mixcpt_jax, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not SLOW_IMPORTS & set(done.stdout.split())
