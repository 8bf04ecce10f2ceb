"""The commands of the pages run.

Blocks marked `sh` run, each page in its own folder, with a tiny model instead of the one
that the page names. All other commands, which need models, buckets and slices of the
reader, run shortened and with substitutes for these. Commands in docstrings of `configs/`
are checked for their flags.
"""

import ast
import collections
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import bucket
import pytest
import yaml
from processes import free_port

from mixcpt_jax import cli
from mixcpt_jax import config as config_lib

PROJECT = pathlib.Path(__file__).parent.parent
DOCS = PROJECT / "docs"
SHARED = PROJECT / "../shared/data"
PAGES = sorted(DOCS.glob("*.md"))
_SHELL = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"python -m mixcpt_jax(\.main| [a-z-]+)((?:[^\n\\`]|\\\n)*)")

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


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("script", list(scripts()))
def test_commands_of_a_page_run(script, tmp_path, longer_model):
    script = re.sub(r"(?m)^export MODEL=.*$", f"export MODEL={longer_model}", script)
    script = script.replace("localhost:12355", f"localhost:{free_port()}")
    run(script, tmp_path, pathlib.Path(sys.executable).parent)


def run(script, folder, *programs, **environment):
    """Runs a script in a folder as if that were a clone of the project."""
    for name in ("configs", "experiments", "benchmarks"):
        (folder / name).symlink_to(PROJECT / name)
    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ
        | {
            "PATH": ":".join([*map(str, programs), os.environ["PATH"]]),
            "PYTHONPATH": str(PROJECT),
        }
        | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def blocks():
    """The blocks that are not marked `sh`, as scripts that may run at the same time."""
    found = collections.defaultdict(list)
    for page in (PROJECT / "README.md", *PAGES):
        if page.stem == "reproduce":
            continue  # paper_test rehearses it
        text = page.read_text()
        indented = map(textwrap.dedent, _INDENTED.findall(_FENCED.sub("", text)))
        for number, block in enumerate([*indented, *_CONSOLE.findall(text)]):
            if "python -m mixcpt_jax" in block and "[--" not in block:
                # Several read the run of the first one.
                name = "mine" if "runs/mine" in block else f"{page.stem}-{number}"
                found[name].append(block)
    found["make"].append(f"make -f {PROJECT}/Makefile quickstart")
    for name, scripts in found.items():
        yield pytest.param("\n".join(scripts), id=name)


# Programs of the reader's machine, of Google's and of a fresh VM. What trains does so in
# small: a flag that is given twice counts as it was given last.
_STAND_INS = {
    "python": """
case "$*" in
    *configs/quickstart.py*) set -- "$@" --config.model.path=MODEL \\
        --config.data.row_length=128 --config.train.num_steps=4 ;;
    *configs/mixcpt.py:auto*) set -- "$@" --config.model.compute_dtype=float32 \\
        --config.select.max_tokens=256 --config.overrides.sft.data.row_length=512 \\
        --config.overrides.dpo.data.row_length=512 \\
        --config.overrides.sft.train.num_steps=3 --config.overrides.dpo.train.num_steps=3 ;;
    *configs/mixcpt.py*) set -- "$@" --config.data.row_length=128 \\
        --config.train.num_steps=2 --config.optimizer.warmup_steps=1 \\
        --config.overrides.sft.train.num_steps=3 --config.overrides.dpo.train.num_steps=3 \\
        --config.sources.domain.holdout=2 ;;
    *"mixcpt_jax plan"*) set -- "$@" --topology=v5e:2x2 --config.mesh.data=1 \\
        --config.mesh.fsdp=4 --config.data.batch_size=4 --config.data.row_length=1024 \\
        --config.model.architecture=ARCHITECTURES/smollm2_135m.json ;;
    *mixcpt_jax.main*:v*|*configs/one_gpu.py*) set -- "$@" --config.mesh.data=1 \\
        --config.mesh.fsdp=1 \\
        --config.data.batch_size=2 --config.eval.batch_size=2 \\
        --config.model.architecture= --config.data.row_length=64 \\
        --config.optimizer.accumulation_steps=1 \\
        --config.train.num_steps=2 --config.optimizer.warmup_steps=1 \\
        --config.sources.domain.holdout=2 --config.sources.instructions.holdout=2 \\
        --config.sources.preferences.holdout=2 ;;
    *"mixcpt_jax lm-eval"*) set -- "$@" --limit=2 ;;
esac
exec REAL "$@"
""",
    "gcloud": """
for argument; do
    case "$argument" in --command=*) exec bash -ec "${argument#--command=}" ;; esac
done
""",
    "git": "mkdir -p mixcpt_jax && ln -sfn PROJECT/configs mixcpt_jax/configs",
    "python3.11": "mkdir -p ~/venv/bin && cp ~/bin/pip ~/venv/bin && >~/venv/bin/activate",
    "pip": "",
    "sudo": "",
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("script", list(blocks()))
def test_commands_with_models_buckets_and_slices_run(script, tmp_path, longer_model):
    pytest.importorskip("libtpu")
    pytest.importorskip("lm_eval")
    assets = PROJECT / "mixcpt_jax" / "assets"
    (tmp_path / "data/domain").mkdir(parents=True)
    # Not the general text: configs measure that, so nothing may train on it.
    domain = [text for page in PAGES for text in page.read_text().split("\n\n")]
    domain = [text for text in domain if len(text) > 80][:200]
    (tmp_path / "data/domain/part.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in domain)
    )
    for name in ("instructions", "preferences"):
        shutil.copy(assets / f"{name}.jsonl", tmp_path / "data")
    shutil.copy(assets / "general_exam.jsonl", tmp_path / "data/exam.jsonl")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in _STAND_INS.items():
        text = text.replace("REAL", sys.executable).replace("PROJECT", str(PROJECT))
        text = text.replace("ARCHITECTURES", f"{assets}/architectures")
        text = text.replace("MODEL", longer_model)
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    script = script.replace("BUCKET", "bucket")
    # The environment of the two commands of the README is there, and is this one.
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(programs / "python")
    (tmp_path / "requirements.txt").symlink_to(PROJECT / "requirements.txt")
    (tmp_path / ".venv/installed").touch()
    script = re.sub(
        r"(model\.path=)(?!gs:)\S+", lambda found: found[1] + longer_model, script
    )
    script = re.sub(r"gs://bucket/Meta\S+", "gs://bucket/model", script)
    script = re.sub(r"(?<=[= ])/data/", f"{tmp_path}/data/", script)
    with bucket.serve() as port:
        with bucket.reached_by(port) as there:
            for name, here in (("model", longer_model), ("", tmp_path / "data")):
                for file in pathlib.Path(here).rglob("*"):
                    if file.is_file():
                        target = there / name / str(file.relative_to(here))
                        target.write_bytes(file.read_bytes())
        run(
            script,
            tmp_path,
            programs,
            HOME=str(tmp_path),
            # A cluster of one host, in the variables of Open MPI.
            OMPI_MCA_orte_hnp_uri=f"{port}.0;tcp://127.0.0.1:{port}",
            OMPI_COMM_WORLD_SIZE="1",
            OMPI_COMM_WORLD_RANK="0",
            OMPI_COMM_WORLD_LOCAL_RANK="0",
            **bucket.environment(port),
        )


def commands(text):
    """Module and arguments of each command, except commands with an ellipsis."""
    for name, rest in _COMMAND.findall(text):
        module, _ = cli.COMMANDS["train" if name == ".main" else name.strip()]
        rest = rest.rstrip("`")
        if rest.count("'") % 2:  # a command within quotes
            rest = rest.rstrip("'")
        arguments = shlex.split(re.sub(r"\\\n", " ", rest.split("&&")[0]))
        if not any("..." in part or part.startswith("[") for part in arguments):
            yield module, arguments


def read_flags(script, found):
    """Runs a script that reads the flags of commands, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(found),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )


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
    done = read_flags(_READ_FLAGS, found)
    assert done.returncode == 0, done.stderr


# Stops each benchmark after it has read its flags.
_READ_BENCHMARKS_FLAGS = """
import argparse, json, runpy, sys

class Read(Exception):
    pass

parse_args = argparse.ArgumentParser.parse_args

def read(parser):
    parse_args(parser)
    raise Read

argparse.ArgumentParser.parse_args = read
for module, *sys.argv[1:] in json.load(sys.stdin):
    try:
        runpy.run_module(module, run_name="__main__")
    except Read:
        print(module)
"""


def benchmarks():
    """Module and arguments of each that a page names."""
    text = " ".join("\n".join(page.read_text() for page in PAGES).split())
    for line in re.findall(r"`python -m (benchmarks[^`]+)`", text):
        yield line.split()


# Flags that make a benchmark short.
_SHORT = {
    "benchmarks.train_step": "--rows 1 --length 64 --rounds 1",
    "benchmarks.overhead": "--layers 1 --length 64 --steps 2 --rounds 1",
    "benchmarks.sample": "--new_tokens 4 --rounds 1 --batches 1",
    "benchmarks.lm_eval_agreement": "--limit 1",
    "benchmarks.lssd_head": "--part cpu",
    "benchmarks.plan_check": "--rows 1 --row_length 128 --remat none",
    "benchmarks.head_cpu": "--rounds 1",
    "benchmarks.prepared_teacher": "--rows 1 --length 64 --rounds 1",
    "benchmarks.long_texts": "--megabytes 1",
    "benchmarks.pipeline": "--megabytes 1 --memory 0",
    "benchmarks.parity": "--only llama3",
    "benchmarks.keeping": "--rounds 1",
    "benchmarks.plan_tunix": "--topology v5e:2x2 --layers 1",
    "benchmarks.gpu_memory": "",
    "benchmarks.side_by_side": "",
}
# Beside what stands in an environment of its own, for it wants another jax.
_WANTS = {"benchmarks.plan_tunix": "tunix", "benchmarks.side_by_side": "maxtext"}


@pytest.mark.skipif("BENCHMARKS" not in os.environ, reason="BENCHMARKS=all: minutes")
@pytest.mark.parametrize("command", list(benchmarks()), ids=lambda command: command[0])
def test_a_benchmark_runs(command):
    if command[0] in _WANTS and not importlib.util.find_spec(_WANTS[command[0]]):
        pytest.skip(f"{_WANTS[command[0]]} is not installed: see {command[0]}")
    arguments = [str(SHARED) if part == "FOLDER" else part for part in command]
    done = subprocess.run(
        [sys.executable, "-m", *arguments, *_SHORT[command[0]].split()],
        cwd=PROJECT,
        env=os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout


@pytest.mark.slow
def test_flags_of_all_benchmarks_exist():
    pytest.importorskip("transformers")
    pytest.importorskip("lm_eval")
    found = list(benchmarks())
    modules = {
        f"benchmarks.{file.stem}" for file in (PROJECT / "benchmarks").glob("*.py")
    }
    assert {module for module, *_ in found} <= modules
    done = read_flags(_READ_BENCHMARKS_FLAGS, found)
    assert done.stdout.split() == [module for module, *_ in found], done.stderr


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


def test_links_have_targets():
    for page in [PROJECT / "README.md", PROJECT / "WORKSPACE.md", *PAGES]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def messages():
    spec = importlib.util.spec_from_file_location("messages", DOCS / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_state_the_default_objective():
    objective = config_lib.default().objective
    ntp, lssd = objective.ntp_weight, objective.lssd_weight
    stated = {
        "README.md": f"{ntp:g} NTP + {lssd:g} LSSD",
        "docs/mixture.md": f"`ntp_weight={ntp:g}` and `lssd_weight={lssd:g}`",
        "docs/reference.md": f"`lssd_weight` (logit swap self-distillation, {lssd:g})",
    }
    for page, words in stated.items():
        assert words in " ".join((PROJECT / page).read_text().split()), page


# What no public source says of the paper: that LSSD alone is its objective, or that a
# score of ours is the one of its equations.
_UNFOUNDED = re.compile(r"papers?'s?[ ]own|equations?[ ]8\b", re.IGNORECASE)


def test_pages_claim_nothing_unfounded_about_the_paper():
    for folder, folders, names in os.walk(PROJECT):
        # Other tests write to the folders whose names begin with a dot.
        folders[:] = {f for f in folders if f[0] != "."} - {"runs", "shared"}
        for name in names:
            if not name.endswith((".md", ".py", ".ipynb", ".html", ".toml")):
                continue
            text = " ".join(pathlib.Path(folder, name).read_text().split())
            assert not _UNFOUNDED.search(text), f"{folder}/{name}"


def test_troubleshooting_has_every_message(messages):
    """`python docs/messages.py` writes the list."""
    assert messages.PAGE.read_text() == messages.page()


def test_explained_messages_exist(messages):
    written, _, all_messages = messages.PAGE.read_text().partition(messages.MARK)
    explained = re.findall(r"\*\*`([^`]+)`\*\*", written)
    assert len(explained) > 10
    for text in explained:
        pattern = ".*".join(map(re.escape, text.split("…")))
        assert re.search(pattern, all_messages), text
