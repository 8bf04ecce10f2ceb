"""Measures against their definitions, with a scorer of known values."""

import functools
import itertools
import json
import math
import sys

import jax
import numpy as np
import pytest

from benchmarks import vocabularies
from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import chat, evaluate, lm_eval
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import exams, formats, mixture, tasks
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.data.sources import Record
from mixcpt_jax.evaluation import evaluator, generation, load_model
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.training import steps


class Letters:
    """A tokenizer of single characters."""

    add_bos, bos_id = True, 1

    def encode_batch(self, texts):
        return [[ord(letter) for letter in text] for text in texts]


def score(batch):
    """Nats depend on the target alone, so packing does not change them."""
    targets = batch["targets"]
    return {"ntp": (targets % 7) / 3.0, "correct": (targets % 2 == 0) * 1.0}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("row_length", [8, 50])
def test_measures_of_a_text_count_every_loss_token_once(row_length, batch_size):
    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 90, n) for n in (30, 5, 2, 17, 9)]
    texts[0] *= 2  # the only one that is correct throughout; longer than a row
    masks = [rng.random(len(text)) < 0.7 for text in texts]
    rows = mixture.pack_text("t", Examples.collect(zip(texts, masks)), row_length)
    results = evaluator.measure(score, {"t": rows}, {}, batch_size)
    targets = np.concatenate([t[1:][m[1:]] for t, m in zip(texts, masks)])
    loss = np.mean((targets % 7) / 3.0)
    assert results["t/loss"] == pytest.approx(loss)
    assert results["t/perplexity"] == pytest.approx(math.exp(loss))
    assert results["t/accuracy"] == pytest.approx(np.mean(targets % 2 == 0))
    right = [np.all(t[1:][m[1:]] % 2 == 0) for t, m in zip(texts, masks)]
    assert results["t/exact"] == pytest.approx(np.mean(right))


def test_blanks_around_a_choice_change_nothing():
    plain = {"question": "Is it?", "choices": ["yes", "no idea"], "answer": 0}
    expected = exams.encode([plain], Letters(), 32)
    for before, after in ((" ", ""), ("", "\n"), ("\t ", "  ")):
        choices = [f"{before}{choice}{after}" for choice in plain["choices"]]
        found = exams.encode([plain | {"choices": choices}], Letters(), 32)
        source, wanted = found.rows.source.examples, expected.rows.source.examples
        np.testing.assert_array_equal(source.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.num_bytes, expected.num_bytes)


def test_exact_equals_greedy_decoding(tiny_model):
    vocabulary = tokenizer.load(tiny_model)
    model_config = pretrained.read_model_config(tiny_model)
    params = transformer.init_params(model_config, jax.random.key(0))
    contexts = [f"{a} {b}" for a in ("The sum", "To write", "Use") for b in "abcd"]
    sampler = generation.Sampler(model_config, vocabulary)
    # Every second target is the model's continuation; the others are other continuations.
    found = sampler.complete(params, contexts, 2)
    targets = [found[i - i % 2] for i in range(len(found))]
    records = [
        Record({"context": context, "target": target}, "f:1")
        for context, target in zip(contexts, targets)
    ]
    examples = formats.encode(records, "cloze", vocabulary)
    right = []
    for first, last in itertools.pairwise(examples.offsets):
        tokens, mask = examples.tokens[first:last], examples.loss_mask[first:last]
        (new,) = sampler.generate(
            params,
            [tokens[~mask].tolist()],
            int(mask.sum()),
            set(),
            generation.SamplingParams(),
        )
        right.append(new == tokens[mask].tolist())
    assert 0 < np.mean(right) < 1
    documents = [Record({"text": context}, "f:1") for context in contexts]
    texts = {
        "cloze": mixture.pack_text("cloze", examples, 64),
        "plain": mixture.pack_text(
            "plain", formats.encode(documents, "document", vocabulary), 64
        ),
    }
    score = jax.jit(steps.make_eval_step(transformer.make_forward(model_config)))
    results = evaluator.measure(functools.partial(score, params), texts, {}, 4)
    assert results["cloze/exact"] == pytest.approx(np.mean(right))
    assert "plain/accuracy" in results
    assert "plain/exact" not in results


QUESTIONS = [
    {"question": "One?", "choices": ["a", "bb", "ccc"], "answer": 1},
    {"question": "Question: two?", "choices": ["dd", "e"], "answer": 0},
    {"question": "Three?", "choices": ["xy", "yx", "zz", "q"], "answer": 3},
]


def test_an_exam_is_graded_by_log_likelihood_per_byte():
    exam = exams.encode(QUESTIONS, Letters(), row_length=64)
    results = evaluator.measure(score, {}, {"quiz": exam}, batch_size=2)
    right = []
    for question in QUESTIONS:
        per_byte = [
            -sum(ord(letter) % 7 / 3.0 for letter in f" {choice}") / len(choice)
            for choice in question["choices"]
        ]
        right.append(int(np.argmax(per_byte)) == question["answer"])
    assert 0 < np.mean(right) < 1
    assert results["quiz/exam"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("budget", [0, 1, 60, 200, 10**6])
def test_an_exam_scores_only_its_tokens(budget):
    questions = [
        q | {"question": f"{i} {q['question']}"} for i in range(9) for q in QUESTIONS
    ]

    def size(places):
        return sum(
            len(f"{questions[i]['question']} {choice}")
            for i in places
            for choice in questions[i]["choices"]
        )

    kept = exams.within(questions, Letters(), budget)
    assert kept == sorted(set(kept))
    if budget:
        assert size(kept) <= budget or len(kept) == 1
    if not budget or size(range(len(questions))) <= budget:
        assert kept == list(range(len(questions)))


def test_only_the_choice_is_scored():
    exam = exams.encode(QUESTIONS[:1], Letters(), row_length=64)
    examples = exam.rows.source.examples
    texts = [
        "".join(map(chr, examples.tokens[a:b][examples.loss_mask[a:b]]))
        for a, b in zip(examples.offsets, examples.offsets[1:])
    ]
    assert texts == [" a", " bb", " ccc"]
    first = "".join(map(chr, examples.tokens[: examples.offsets[1]]))
    assert first == "\x01Question: One?\nAnswer: a"


def test_length_is_in_bytes_not_tokens():
    exam = exams.encode(
        [{"question": "?", "choices": ["é", "ee"], "answer": 0}], Letters(), 32
    )
    np.testing.assert_array_equal(exam.num_bytes, [2, 2])


def test_a_question_must_fit_the_context():
    exam = exams.encode(QUESTIONS, Letters(), row_length=8, max_positions=27)
    assert len(exam.rows.source.examples) == 9
    assert len(exam.rows.plan.length) == 9  # each in one piece
    with pytest.raises(InputError, match="quiz: question 3: has 27 tokens, the mo"):
        exams.encode(QUESTIONS, Letters(), 8, max_positions=26, name="quiz")


@pytest.mark.parametrize("kind", vocabularies.TYPES)
def test_a_choice_is_tokenized_as_in_text(kind, tmp_path):
    vocabularies.write(kind, tmp_path)
    vocabulary = tokenizer.load(str(tmp_path))
    question = {"question": "Of which?", "choices": ["the heart", "It is", "ünd  so"]}
    exam = exams.encode([question | {"answer": 0}], vocabulary, 64)
    examples = exam.rows.source.examples
    before = vocabulary.encode("Question: Of which?\nAnswer:")
    start = [vocabulary.bos_id] * vocabulary.add_bos
    for number, choice in enumerate(question["choices"]):
        tokens, mask = examples.read(*examples.offsets[number : number + 2])
        text = vocabulary.encode(f"Question: Of which?\nAnswer: {choice}")
        assert tokens.tolist() == start + text
        assert tokens[mask].tolist() == text[len(before) :]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"question": "x", "choices": ["a"]}',
        '{"question": "x", "choices": ["a"], "answer": 1}',
        '{"question": "x", "choices": ["a"], "answer": -1}',
        '{"question": "x", "choices": ["a", 2], "answer": 0}',
        '{"question": 3, "choices": ["a"], "answer": 0}',
    ],
)
def test_a_bad_exam_line_is_named(tmp_path, line):
    good = json.dumps(QUESTIONS[0])
    (tmp_path / "exam.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=r"exam.jsonl:2: "):
        exams.read(str(tmp_path / "exam.jsonl"))


def test_exams_are_read_back(tmp_path):
    file = tmp_path / "exam.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    assert exams.read(str(file)) == QUESTIONS
    file.write_text("")
    with pytest.raises(InputError, match="exam.jsonl: has no records"):
        exams.read(str(file))


def test_pairs_are_compared_per_token_and_rewards_by_the_sums():
    losses = np.array([4.0, 9.0, 6.0, 2.0])  # pairs (4, 9) and (6, 2)
    counts = np.array([2.0, 3.0, 6.0, 1.0])  # per token (2, 3) and (1, 2)
    sums = np.stack([losses, np.zeros(4), counts])
    config = config_lib.default().preference
    results = evaluator.compare_pairs("p", sums, None, config)
    assert results == {"p/pair_accuracy": 1.0}
    # Log-ratios: (1, 2) and (3, -1)
    reference = np.array([-5.0, -11.0, -9.0, -1.0])
    results = evaluator.compare_pairs("p", sums, reference, config)
    assert results["p/reward_accuracy"] == 0.5
    assert results["p/reward_margin"] == pytest.approx(0.1 * (-1 + 4) / 2)
    config.length_normalised = True
    results = evaluator.compare_pairs("p", sums, reference, config)
    # Per token (1/2, 2/3) and (3/6, -1/1)
    assert results["p/reward_margin"] == pytest.approx(0.1 * (-1 / 6 + 1.5) / 2)


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def run_command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
    return capsys.readouterr().out


@pytest.mark.slow
def test_the_command_measures_and_compares(
    tiny_run, tiny_model, tmp_path, monkeypatch, capsys
):
    assets = paths.resolve("package:mixcpt_jax/assets")
    clozes = [
        {"context": "To be or not", "continuation": "to be"},
        {"context": "One, two, three, ", "target": "four"},
        {"context": "A rose is a rose is a", "target": " rose"},
    ]
    cloze = write_lines(tmp_path / "cloze.jsonl", clozes)
    settings = [
        *("--tasks", f"texts={assets}/general_text.jsonl"),
        *(f"{assets}/general_exam.jsonl", cloze),
        *("--limit=6", "--row_length=64"),
    ]
    files = [str(tmp_path / f"{side}.json") for side in "ab"]
    out = run_command(
        monkeypatch,
        capsys,
        f"--checkpoint={tiny_model}",
        f"--compare={tiny_run}",
        f"--output={files[0]}",
        *settings,
    )
    assert "only B" in out
    both = json.loads(paths.resolve(files[0]).read_text())

    # Each side equals the measures of a run.
    for side, place in ((both, tiny_model), (both["compared_with"], tiny_run)):
        trained = load_model.load(place)
        examples = formats.encode(
            tasks.read(settings[1], 6).records, "document", trained.tokenizer
        )
        questions = exams.read(f"{assets}/general_exam.jsonl")[:6]
        with jax.set_mesh(trained.mesh):
            expected = evaluator.measure(
                trained.score(),
                {"texts": mixture.pack_text("texts", examples, 64)},
                {"exam": exams.encode(questions, trained.tokenizer, 128)},
                8,
            )
        values = {
            (task, key): entry["value"]
            for task, found in side["tasks"].items()
            for key, entry in found["measures"].items()
        }
        assert values["texts", "perplexity"] == pytest.approx(
            expected["texts/perplexity"], rel=1e-5
        )
        assert values["texts", "accuracy"] == expected["texts/accuracy"]
        assert values["general_exam", "acc_bytes"] == expected["exam/exam"]
        for task in side["tasks"].values():
            assert {len(column) for column in task["items"].values()} <= {3, 6}
            for entry in task["measures"].values():
                assert entry["low"] <= entry["value"] <= entry["high"]

    difference = both["comparison"]["texts"]["perplexity"]
    assert 0 < difference["low"] < difference["difference"] < difference["high"]
    assert "p_value" in both["comparison"]["cloze"]["exact"]

    # Earlier results are compared without a model, and with one.
    paths.resolve(files[1]).write_text(json.dumps(both["compared_with"]))
    again = [f"--output={files[0]}", f"--compare={files[1]}"]
    run_command(monkeypatch, capsys, f"--checkpoint={files[0]}", *again)
    assert json.loads(paths.resolve(files[0]).read_text()) == both
    with pytest.raises(InputError, match="items of task cloze differ"):
        run_command(
            monkeypatch,
            capsys,
            f"--checkpoint={tiny_model}",
            f"--compare={files[1]}",
            *("--tasks", cloze, "--limit=2"),
        )


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        *((evaluate, flag) for flag in ("limit=-1", "seed=-1", f"limit={2**70}")),
        *((evaluate, flag) for flag in ("batch_size=0", "row_length=-5", "limit=1.5")),
        *((lm_eval, flag) for flag in ("limit=-1", "batch_size=0", "num_fewshot=-1")),
        *((lm_eval, flag) for flag in ("batch_size=1000000000", "max_length=nan")),
        *((chat, flag) for flag in (f"seed={2**70}", "seed=-1", "max_new_tokens=-1")),
        *((chat, flag) for flag in ("temperature=nan", "temperature=inf", "top_k=0")),
        *((chat, flag) for flag in ("top_p=nan", "top_p=0", "temperature=1e9")),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_flag(
    module, flag, monkeypatch, capsys
):
    tasks_given = [] if module is chat else ["--tasks=none"]
    given = ["x", "--checkpoint=none", *tasks_given, f"--{flag}"]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit):
        module._parse()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: argument --{flag.split('=')[0]}: ")
    assert ": must be a" in line


@pytest.mark.parametrize(
    "found", [{"tasks": {}}, {"tasks": [], "checkpoint": "a", "dtype": "b"}, [], 1]
)
def test_a_file_that_output_did_not_write_is_refused(found, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(found))
    with pytest.raises(
        InputError, match=r"results\.json: .*; name what --output wrote"
    ):
        evaluate._read_results(str(file))


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None, "1", [1.0], "missing"])
@pytest.mark.parametrize("column", ["nats", "tokens", "log_likelihoods"])
def test_earlier_results_hold_a_number_for_each_item(bad, column, tmp_path):
    file = tmp_path / "results.json"
    items = {"nats": [1.0, 2.0], "tokens": [1, 2], "log_likelihoods": [[-1.0], [-2.0]]}
    found = {"checkpoint": "m", "dtype": "float32", "row_length": 8}
    task = {"kind": "text", "fingerprint": "f", "measures": {}, "items": items}
    found["tasks"] = {"t": task}
    file.write_text(json.dumps(found))
    assert evaluate._read_results(str(file)) == found
    first = items[column][:1]
    is_list = column == "log_likelihoods"
    wrong = [] if bad == "missing" else [bad]
    if is_list and bad != "missing":
        wrong = [1.0] if bad == [1.0] else [wrong]  # no list, or a bad entry of one
    items[column] = first + wrong
    file.write_text(json.dumps(found))
    message = (
        r"task 't': its columns must|: \[1\]:.* must be|NaN, which|Infinity, which"
    )
    with pytest.raises(InputError, match=message):
        evaluate._read_results(str(file))


def test_a_difference_of_dtypes_is_reported():
    items = {"exact": [1, 0], "nats": [1.0, 2.0], "tokens": [1, 2], "bytes": [3, 4]}
    task = {"kind": "cloze", "fingerprint": "f", "tokens": "x", "items": items}
    sides = [
        {"checkpoint": "m", "row_length": 8, "dtype": dtype, "tasks": {"t": task}}
        for dtype in ("bfloat16", "float32")
    ]
    comparison = {"comparison": evaluator.compare(*sides)}
    words = "A was measured in bfloat16, B in float32"
    for second, is_told in zip(sides, (False, True)):
        result = sides[0] | comparison | {"compared_with": second}
        assert (words in evaluator.describe_comparison(result)) == is_told


def test_a_task_setting_that_is_a_file_has_no_name_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "seed=1.jsonl", [{"text": "one"}])
    write_lines(tmp_path / "1.jsonl", [{"text": "other"}])
    assert tasks.read("seed=1.jsonl").records[0].fields == {"text": "one"}
    assert tasks.read("seed:text=1.jsonl").records[0].fields == {"text": "other"}


def test_tasks_are_known_by_their_fields(tmp_path):
    def read(record, setting="{}", limit=0):
        file = write_lines(tmp_path / "my.task.jsonl", [record] * 3)
        return tasks.read(setting.format(file), limit)

    text, choice = {"text": "x", "choices": ["a"]}, QUESTIONS[0]
    task = read(choice)
    assert (task.name, task.kind, len(task.records)) == ("my", "choice", 3)
    task = read(text, "other.name:text={}", 2)
    assert (task.name, task.kind, len(task.records)) == ("other.name", "text", 2)
    assert read({"context": "a", "continuation": "b"}).kind == "cloze"
    for record, setting, message in (
        (text, "{}", "an exam line is"),
        ({"body": "x"}, "{}", "has the fields body; a task has text"),
        (text, "x:word={}", "kind 'word': use one of text, choice, cloze"),
    ):
        with pytest.raises(InputError, match=message):
            read(record, setting)


def test_an_item_is_never_cut(tiny_model):
    vocabulary = tokenizer.load(tiny_model)
    record = Record({"context": "a " * 100, "target": "b"}, "f:1")
    task = tasks.Task("long", "f", "cloze", [record])
    encoded = task.encode(vocabulary, 8, 1024)
    assert len(encoded.rows) == 1
    assert len(encoded.rows[0]["tokens"]) == encoded.examples.num_tokens - 1
    with pytest.raises(InputError, match="tokens, the model's context is 16; leave"):
        task.encode(vocabulary, 8, 16)
