"""A written source: of the model's own text or of a document's tasks, resumed exactly."""

import json
import types

import jax
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import comprehension
from mixcpt_jax.evaluation import generation
from mixcpt_jax.jobs import generate, train
from mixcpt_jax.models import pretrained
from mixcpt_jax.training import phase as phase_lib
from mixcpt_jax.training import teacher_outputs

ASSETS = "package:mixcpt_jax/assets"
DOCUMENT = (
    "The barn owl is a bird that hunts by sound. Its pale face works like a dish for "
    "faint noises. A pellet is the part of its prey that an owl cannot digest. "
    "Naturalists collect these pellets to learn which mammals live nearby."
)


@pytest.fixture
def config(tiny_config):
    config = tiny_config
    config.eval.batch_size = 8
    config.generate.num_tokens = 400
    config.generate.max_new_tokens = 16
    config.phases = ("write",)
    config.overrides.write = {"job": "generate"}
    return config


def rows(folder):
    files = sorted((folder / "write" / "generated").glob("*.jsonl"))
    return [
        json.loads(line) for file in files for line in file.read_text().splitlines()
    ]


def test_every_answer_is_in_its_document_and_every_rule_is_used():
    found = comprehension.tasks(DOCUMENT, "The barn owl", "1", most=9)
    flat = " ".join(DOCUMENT.split())
    assert all(task.answer in flat or task.answer == "The barn owl" for task in found)
    questions = [task.question for task in found]
    assert questions[0] == "What is the title of this text?"
    assert "What is a pellet?" in questions
    for start in ("Which word is missing", "Which sentence follows"):
        assert any(question.startswith(start) for question in questions)
    assert comprehension.tasks(DOCUMENT, "", "1") == comprehension.tasks(
        DOCUMENT, "", "1"
    )
    assert len(comprehension.tasks(DOCUMENT * 9, "", "1", most=4)) <= 4
    assert comprehension.tasks("", "", "1") == []


def test_gaps_hide_their_word():
    for seed in "abcdefgh":
        for task in comprehension.tasks(DOCUMENT, seed=seed, most=9):
            if task.question.startswith("Which word"):
                assert task.answer not in task.question
                filled = task.question.partition("“")[2].rstrip("”")
                assert filled.replace("____", task.answer) in DOCUMENT


def test_reading_comprehension_of_a_source_runs_no_model(config, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "Sampler", None)
    config.overrides.write.generate = {
        "kind": "comprehension",
        "source": "domain",
        "num_tokens": 10**6,
    }
    _, results = main.run(config, str(tmp_path))
    written = rows(tmp_path)
    assert results["write"]["generated"]["records"] == len(written) > 20
    for row in written:
        assert "\n\nQuestion: " in row["text"]
        assert row["text"].count("Question: ") == row["text"].count("\nAnswer: ")


@pytest.mark.slow
@pytest.mark.parametrize("source", ["", "instructions"])
def test_replay_resumes_with_the_next_batch(config, tmp_path, monkeypatch, source):
    config.overrides.write.generate = {
        "source": source,
        "num_tokens": 4000 if source else 400,
    }
    monkeypatch.setattr(generate, "_BATCHES_PER_PART", 2)
    _, whole = main.run(config, str(tmp_path / "whole"))
    write, killed = generate._Output.write, []

    def write_until_killed(self, part):
        if part == 1 and not killed:
            killed.append(part)
            raise KeyboardInterrupt
        write(self, part)

    monkeypatch.setattr(generate._Output, "write", write_until_killed)
    with pytest.raises(KeyboardInterrupt):
        main.run(config, str(tmp_path / "killed"))
    _, resumed = main.run(config, str(tmp_path / "killed"))
    assert killed == [1]
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert resumed["write"]["generated"] == whole["write"]["generated"]
    counts = whole["write"]["generated"]
    assert counts["tokens"] >= (4000 if source else 400)
    texts = [
        row.get("text") or (row["prompt"], row["response"])
        for row in rows(tmp_path / "whole")
    ]
    assert len(set(texts)) == len(texts) == counts["records"]
    assert ("prompt" in rows(tmp_path / "whole")[0]) == bool(source)
    numbers = [row["generated"]["number"] for row in rows(tmp_path / "whole")]
    assert numbers == sorted(numbers)


@pytest.mark.slow
def test_a_later_phase_reads_what_was_written(config, tmp_path):
    config.sources.replay = config_lib.source(
        path="phase:write/generated",
        weight=0.0,
        ntp_weight=0.0,
        lssd_weight=0.0,
        kd_weight=1.0,
    )
    config.phases = ("write", "cpt")
    config.train.num_steps = 1
    config.train.eval_before = False
    config.overrides.cpt = {"sources": {"replay": {"weight": 0.4}}}
    _, results = main.run(config, str(tmp_path))
    mixture = {row["name"]: row for row in results["cpt"]["mixture"]}
    assert mixture["replay"]["documents"] == results["write"]["generated"]["records"]


@pytest.mark.parametrize(("add_bos", "first"), [(True, 1), (False, 0)])
def test_texts_begin_after_the_token_that_precedes_them_in_training(add_bos, first):
    """A chat model's BOS may begin turns; then texts follow the end of another one."""
    tokenizer = types.SimpleNamespace(bos_id=1, end_of_document_id=0, add_bos=add_bos)
    request = generate._from_start(types.SimpleNamespace(tokenizer=tokenizer))
    assert request == generate.Request([first], {})


def test_samples_of_another_model_are_not_replayed(config, tiny_model, tmp_path):
    file = tmp_path / "samples.jsonl"
    replay = {"ntp_weight": 0.0, "lssd_weight": 0.0, "kd_weight": 1.0}
    config.sources.replay = config_lib.source(path=str(file), **replay)
    phase = phase_lib.start(config, str(tmp_path / "run"), "cpt")
    own = phase_lib.model_hash({"architecture": phase.model_config.fingerprint}
                               | {"identity": pretrained.identity(tiny_model)})  # fmt: skip

    def write(*models, kind="replay"):
        records = [
            {"text": "A text.", "generated": {"kind": kind, "model": model}}
            for model in models
        ]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))

    write(own, own)
    teacher_outputs.check_replay(phase)
    write("0" * 16, kind="comprehension")
    teacher_outputs.check_replay(phase)
    write(own, "0" * 16)
    with pytest.raises(InputError) as error:
        train.run(config, str(tmp_path / "run"), "cpt")
    assert str(error.value) == (
        f"{file}:2: a sample of model {'0' * 16}, the teacher of sources.replay is {own}, "
        f"{tiny_model}; generate the source again from this model, set teacher.path to "
        "the other one, or sources.replay.kd_weight=0"
    )
    assert not (tmp_path / "run").exists()
    # The samples of another teacher are its own, those of the start are not.
    with config.unlocked():
        config.model.weights = "random"
    config.teacher.path = tiny_model
    phase = phase_lib.start(config, str(tmp_path / "run"), "cpt")
    write(own)
    teacher_outputs.check_replay(phase)
    config.sources.replay.kd_weight = 0.0
    write("0" * 16)
    phase = phase_lib.start(config, str(tmp_path / "run"), "cpt")
    teacher_outputs.check_replay(phase)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "comprehension"}, "generate.source='': must be one of domain"),
        (
            {"kind": "comprehension", "source": "instructions"},
            "must be one of document",
        ),
        ({"source": "domain"}, "must be one of instruction, preference, chat"),
        ({"source": "absent"}, "generate.source='absent'"),
        ({"prompts": "p.jsonl", "source": "instructions"}, "an empty generate.source"),
        ({"prompts": "absent.jsonl"}, "absent.jsonl"),
        ({"num_tokens": 0}, "generate.num_tokens"),
        ({"temperature": -1.0}, "generate.temperature"),
    ],
)
def test_bad_settings_are_a_line(config, tmp_path, settings, message):
    config.overrides.write.generate = settings
    with pytest.raises(InputError, match=message):
        main.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "write" / "generated").exists()


def test_prompts_that_do_not_fit_are_a_line_before_weights_are_read(
    config, tmp_path, monkeypatch
):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "word " * 2000}))
    config.overrides.write.generate = {"prompts": str(tmp_path / "prompts.jsonl")}
    monkeypatch.setattr(jax, "device_put", None)
    with pytest.raises(InputError, match=r"prompt 1 has \d+ tokens, .* do not fit"):
        main.run(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Question: What?\nAnswer: That.", "doc\n\nQuestion: What?\nAnswer: That."),
        (
            "Sure!\nQuestion:  What? \n Answer: That. ",
            "doc\n\nQuestion: What?\nAnswer: That.",
        ),
        (" What?\nAnswer: That.", "doc\n\nQuestion: What?\nAnswer: That."),
        ("What a question.", None),
        ("Question: What?", None),
        ("", None),
    ],
)
def test_what_the_model_asks_is_taken_if_it_has_an_answer(said, expected):
    request = generate.Request([1], {"text": "doc"})
    record = generate._record("questions", request, said)
    assert record == (None if expected is None else {"text": expected})
