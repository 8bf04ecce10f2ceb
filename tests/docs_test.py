"""What the pages say to type is typed.

Blocks marked `sh` run, each page in a folder of its own, with a tiny model in the place of
the one that the page names. Of all other commands, and those of the README and of
docstrings in `configs/`, the flags are read.
"""

import ast
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

PROJECT = pathlib.Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"python -m (mixcpt_jax[\w.]*)((?:[^\n\\`]|\\\n)*)")

# Reads the flags of each command in a process of its own: they are defined once.
_READ_FLAGS = """
import importlib, json, os, sys
from mixcpt_jax import main
commands = json.load(sys.stdin)
for module, _ in commands:
    importlib.import_module(module)
for module, arguments in commands:
    child = os.fork()
    if not child:
        sys.argv = ["command", *arguments]  # where the config's flags are looked for
        main._parse(sys.argv)
        main._CONFIG.value
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{module} {arguments}")
"""


def scripts():
    for page in PAGES:
        if blocks := _SHELL.findall(page.read_text()):
            yield pytest.param("\n".join(blocks), id=page.stem)


@pytest.mark.parametrize("script", list(scripts()))
def test_what_a_page_says_runs(script, tmp_path, write_tiny_model):
    model = write_tiny_model(tmp_path / "model", max_positions=512)
    for name in ("configs", "experiments"):
        (tmp_path / name).symlink_to(PROJECT / name)
    script = re.sub(r"(?m)^export MODEL=.*$", f"export MODEL={model}", script)
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            "XLA_FLAGS": "",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def commands(text):
    """Module and arguments of each command, but of those that leave something out."""
    for module, rest in _COMMAND.findall(text):
        arguments = shlex.split(re.sub(r"\\\n", " ", rest.rstrip("'`").split("&&")[0]))
        if not any("..." in part or part.startswith("[") for part in arguments):
            yield module, arguments


def test_flags_of_all_commands_exist():
    files = [PROJECT / "README.md", PROJECT / "experiments" / "README.md", *PAGES]
    found = [
        entry
        for text in (
            *(file.read_text() for file in files),
            *map(ast.get_docstring, map(ast.parse, _configs())),
        )
        for entry in commands(_SHELL.sub("", text or ""))
        if any(argument.startswith("--config=") for argument in entry[1])
    ]
    assert len(found) > 20
    done = subprocess.run(
        [sys.executable, "-c", _READ_FLAGS],
        input=json.dumps(found),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _configs():
    return (file.read_text() for file in sorted((PROJECT / "configs").glob("*.py")))


def test_a_cluster_runs_what_a_slice_runs():
    text = (DOCS / "pods.md").read_text()
    (job,) = yaml.safe_load(*_YAML.findall(text))["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]
    pod = hosts["template"]["spec"]
    (container,) = pod["containers"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(map(int, topology.split("x")))
    assert hosts["parallelism"] == hosts["completions"]
    assert hosts["completions"] * container["resources"]["limits"][
        "google.com/tpu"
    ] == (chips)
    assert container["command"][3:] in [arguments for _, arguments in commands(text)]


def test_links_lead_somewhere():
    for page in [PROJECT / "README.md", PROJECT / "WORKSPACE.md", *PAGES]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def messages():
    spec = importlib.util.spec_from_file_location("messages", DOCS / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_troubleshooting_has_every_message(messages):
    """Written anew by `python docs/messages.py`."""
    assert messages.PAGE.read_text() == messages.page()


def test_troubleshooting_explains_messages_that_there_are(messages):
    written, _, all_messages = messages.PAGE.read_text().partition(messages.MARK)
    explained = re.findall(r"\*\*`([^`]+)`\*\*", written)
    assert len(explained) > 10
    for text in explained:
        pattern = ".*".join(map(re.escape, text.split("…")))
        assert re.search(pattern, all_messages), text
