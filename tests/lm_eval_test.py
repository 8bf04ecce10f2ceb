"""Our model's answers equal those of the harness's own `hf` model."""

import copy
import functools
import json
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval import tasks as lm_eval_tasks

from benchmarks import lm_eval_agreement
from mixcpt_jax.cli import lm_eval
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.evaluation import lm_eval_adapter

# Of theirs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SHARED = pathlib.Path(__file__).parents[1] / "../shared/data/general_eval"
TASKS = sorted(lm_eval_agreement.TASKS.glob("*.yaml"))
EXAM = pathlib.Path(__file__).parents[1] / "mixcpt_jax/assets/general_exam.jsonl"
CONTEXTS = [
    "The first of all",
    "  Two spaces behind it, and before. ",
    "Émile said: «",
    "The end<|endoftext|>of one, and the next",
    "To be or not to be, that is the question. " * 12,
    "x",
]
MAX_LENGTH = 96


@pytest.fixture(scope="module", params=["plain", "bos"])
def folder(request, tiny_run, tmp_path_factory):
    """An export; the tokenizer of the second puts BOS before texts."""
    if request.param == "plain":
        return f"{tiny_run}/export/hf"
    target = tmp_path_factory.mktemp("bos")
    for file in pathlib.Path(tiny_run, "export/hf").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = target / "tokenizer.json"
    raw = json.loads(file.read_text())
    (bos,) = (t for t in raw["added_tokens"] if t["content"] == "<|im_start|>")
    name, special = bos["content"], {"type_id": 0}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": name, **special}},
            {"Sequence": {"id": "A", **special}},
        ],
        "pair": [{"Sequence": {"id": "A", **special}}],
        "special_tokens": {name: {"id": name, "ids": [bos["id"]], "tokens": [name]}},
    }
    file.write_text(json.dumps(raw))
    file = target / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["add_bos_token"]
    file.write_text(json.dumps(config | {"bos_token": name}))
    return str(target)


@pytest.fixture(scope="module")
def models(folder):
    """Our model and `hf`, with a context that truncates every request."""
    theirs = lm_eval_agreement.hf_model(folder, 4)
    theirs._max_length = MAX_LENGTH
    return lm_eval_adapter.Model(folder, batch_size=4, max_length=MAX_LENGTH), theirs


@pytest.fixture
def tasks(tmp_path):
    """The tasks of the benchmark, on a few texts."""
    passages = [
        {"context": context, "continuation": word}
        for context in CONTEXTS
        for word in ("one", "another", " third")
    ]
    lines = (json.dumps(passage) + "\n" for passage in passages)
    (tmp_path / "lambada.jsonl").write_text("".join(lines))
    for name in ("arc_easy", "piqa", "openbook_qa"):
        (tmp_path / f"{name}.jsonl").write_text(EXAM.read_text())
    read = [
        lm_eval_agreement.read_task(file, tmp_path)
        for file in TASKS
        if file.stem not in ("piqa", "openbook_qa")
    ]
    for task in read:
        task["dataset_kwargs"]["cache_dir"] = str(tmp_path / "cache")
    return read


def test_every_answer_is_that_of_hf(models, tasks):
    results = [
        lm_eval_agreement.evaluate(model, copy.deepcopy(tasks), 18) for model in models
    ]
    for task, agreement in lm_eval_agreement.compare(*results).items():
        assert agreement.samples == 18, task
        assert agreement.differing == 0, task
        # Sums of up to a few hundred float32 terms of about ln 512.
        assert agreement.difference < 1e-3, task
    said = [sample["resps"][0][0] for sample in results[0]["mixcpt_lambada_generate"]]
    assert len(set(said)) > 3


def test_a_text_without_a_context(models):
    class Request:
        args = "", "without"

    (ours,), (theirs,) = (model.loglikelihood([Request]) for model in models)
    assert ours == (pytest.approx(theirs[0], rel=1e-5), theirs[1])
    Request.args = "", {"max_gen_toks": 4}
    assert models[0].generate_until([Request])[0]


def test_tokens_and_chats_are_those_of_hf(models):
    ours, theirs = models
    for text in (*CONTEXTS, "<|im_start|>user\nHi", "<|endoftext|>Hi"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        plain = theirs.tok_encode(text, add_special_tokens=False)
        assert ours.tok_encode(text, add_special_tokens=False) == plain
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " So it is that "},
    ]
    for turns, prompt in ((chat[:1], True), (chat, False)):
        text = ours.apply_chat_template(turns, prompt)
        assert text == theirs.apply_chat_template(turns, prompt)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None


def test_unsupported_settings_are_named(models):
    class Request:
        args = "x", {"until": ["."], "num_beams": 4}

    with pytest.raises(InputError, match="generation_kwargs: num_beams: not supported"):
        models[0].generate_until([Request])
    Request.args = "x", {"until": ["."], "max_gen_toks": 500}
    with pytest.raises(InputError, match="max_gen_toks=500: must be <"):
        models[0].generate_until([Request])


def test_the_command(tiny_run, tasks, tmp_path, monkeypatch, capsys):
    (tmp_path / "yaml").mkdir()
    (tmp_path / "yaml/mine.yaml").write_text(json.dumps(tasks[0]))
    output = tmp_path / "results.json"
    # Finding all tasks of the harness takes long.
    alone = functools.partial(lm_eval_tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", alone)
    command = [
        "harness",
        f"--checkpoint={tiny_run}",
        f"--include_path={tmp_path}/yaml",
        "--limit=3",
        f"--output={output}",
    ]
    monkeypatch.setattr(sys, "argv", [*command, f"--tasks={tasks[0]['task']}"])
    lm_eval.main()
    assert tasks[0]["task"] in capsys.readouterr().out
    assert len(json.loads(output.read_text())["samples"][tasks[0]["task"]]) == 3
    monkeypatch.setattr(sys, "argv", [*command, "--tasks=none_such"])
    with pytest.raises(InputError, match="has no task 'none_such'"):
        lm_eval.main()


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_files_of_the_benchmark_are_read():
    for file in TASKS:
        task = lm_eval_agreement.read_task(file, SHARED)
        (path,) = task["dataset_kwargs"]["data_files"].values()
        with open(path) as lines:
            fields = json.loads(next(lines)).keys()
        assert fields >= {"question", "choices", "answer"} or fields >= {
            "context",
            "continuation",
        }


def test_only_lm_eval_imports_the_harness():
    code = (
        "import sys, mixcpt_jax.evaluation.evaluator, mixcpt_jax.main;"
        "import mixcpt_jax.jobs.train;"
        "print(*sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in process.stdout.split()}
    assert not loaded & {"lm_eval", "torch", "transformers"}
