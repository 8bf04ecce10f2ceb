"""KL from the start at every evaluation, and phases that end within a budget of it."""

import dataclasses
import functools
import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from steps_test import CONFIG, make_batch
from steps_test import params as small_params

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core import mesh_shape
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.jobs import train
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import transformer
from mixcpt_jax.objectives import streamed
from mixcpt_jax.reporting import changes, page, run_records
from mixcpt_jax.runtime import hosts, metrics, preemption, sharding
from mixcpt_jax.training import budget as budget_lib
from mixcpt_jax.training import checkpoint, program, steps
from mixcpt_jax.training import phase as phase_lib

BUDGET = "domain/kl_from_start"


@functools.cache
def params(seed):
    """Random parameters whose predictions differ a lot."""
    return jax.tree.map(lambda x: 3 * x, small_params(seed))


def eval_batch():
    batch = make_batch()
    return {name: batch[name] for name in ("tokens", "targets", "positions",
                                           "segment_ids")}  # fmt: skip


def kl_oracle(now, start, batch):
    """KL(start || now) at every position, from whole logits in float64."""
    forward = transformer.make_forward(CONFIG)
    inputs = batch["tokens"], batch["positions"], batch["segment_ids"]

    def log_softmax(params):
        hidden = forward(params, *inputs)
        logits = np.asarray(transformer.logits(params, hidden), np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_softmax(start), log_softmax(now)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("chunk_size", [8, pytest.param(256, marks=pytest.mark.slow)])
def test_kl_from_the_start_equals_the_float64_one_for_any_chunk(chunk_size):
    batch = eval_batch()

    def head(*args, **options):
        return streamed.head_loss(*args, chunk_size=chunk_size, **options)

    step = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG), head))
    scores = step(params(1), batch, params(0))
    expected = kl_oracle(params(1), params(0), batch)
    assert expected.mean() > 0.1
    np.testing.assert_allclose(scores["kl"], expected, rtol=2e-5, atol=2e-6)
    # The other scores are those without the start.
    alone = step(params(1), batch)
    assert alone.keys() == {"ntp", "correct"}
    for name, values in alone.items():
        np.testing.assert_allclose(scores[name], values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(2, 2, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)]
)
def test_kl_from_the_start_is_the_same_on_any_mesh(shape):
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, shape, strict=True)))
    batch, forward = eval_batch(), transformer.make_forward(CONFIG)
    expected = jax.jit(steps.make_eval_step(forward))(params(1), batch, params(0))
    where = sharding.shardings(mesh, transformer.param_axes(CONFIG))
    now, start = (jax.device_put(params(seed), where) for seed in (1, 0))
    with jax.set_mesh(mesh):
        run = phase_lib.make_eval_step(forward, mesh)
        scores = run(now, jax.tree.map(np.asarray, batch), start)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_kl_from_the_start_is_0_at_the_start(compute):
    # The frozen model has the coarser of the two dtypes, see `model.teacher_dtype`.
    start = transformer.cast(params(0), compute)
    step = jax.jit(steps.make_eval_step(transformer.make_forward(CONFIG, compute)))
    kl = step(params(0), eval_batch(), start)["kl"]
    np.testing.assert_allclose(kl, 0, atol=1e-6)


@pytest.mark.slow
def test_kl_from_the_base_of_fresh_adapters_is_0():
    lora = lora_lib.Lora(2, 16.0, ("query", "down"))
    adapters = lora_lib.init_adapters(CONFIG, lora, jax.random.key(0), "float32")
    step = steps.make_eval_step(
        transformer.make_forward(CONFIG, lora=lora),
        start_forward=transformer.make_forward(CONFIG),
    )
    now = lora_lib.with_adapters(params(0), adapters)
    kl = jax.jit(step)(now, eval_batch(), params(0))["kl"]
    np.testing.assert_allclose(kl, 0, atol=1e-6)


def test_no_array_of_tokens_by_vocabulary_exists():
    batch = eval_batch()

    def head(*args, **options):
        return streamed.head_loss(*args, chunk_size=8, **options)

    # A size that no other dimension has.
    config = dataclasses.replace(CONFIG, vocab_size=88)
    weights = transformer.init_params(config, jax.random.key(0))
    step = steps.make_eval_step(transformer.make_forward(config), head)
    text = jax.jit(step).lower(weights, batch, weights).as_text()
    assert "88x8xf32" in text
    num_tokens = batch["tokens"].size
    for shape in (f"{num_tokens}x88x", f"88x{num_tokens}x", "8x32x88x"):
        assert shape not in text


def score_of_constants(batch):
    ones = np.ones_like(batch["loss_mask"], float)
    return {"ntp": 2.0 * ones, "correct": ones, "kl": 0.25 * ones}


def test_texts_have_the_mean_and_the_sums_of_their_examples(tiny_config, tmp_path):
    phase = phase_lib.start(tiny_config, str(tmp_path), "cpt")
    data = pipeline.load(phase.config, phase.tokenizer)
    items = {}
    results = evaluator.measure(
        score_of_constants,
        data.texts,
        {},
        8,
        items,
        ("loss", "correct", "tokens", "kl"),
    )
    assert results["domain/kl_from_start"] == pytest.approx(0.25)
    assert results["domain/loss"] == pytest.approx(2.0)
    np.testing.assert_allclose(items["domain/kl"], 0.25 * items["domain/tokens"])
    assert "domain/kl_from_start" not in evaluator.measure(
        score_of_constants, data.texts, {}, 8
    )


@given(
    losses=st.lists(st.floats(0, 4), min_size=1, max_size=8),
    limit=st.floats(0, 2),
    cut=st.integers(0, 8),
)
def test_a_phase_ends_with_the_evaluation_before_the_first_over_the_budget(
    losses, limit, cut
):
    rows = [{"step": 10 * i, "a/loss": loss} for i, loss in enumerate(losses)]
    budget = budget_lib.Budget({"a/loss": limit})
    # Recorded evaluations and those of this process count alike.
    budget.replay(rows[:cut])
    for row in rows[cut:]:
        budget.observe(row["step"], row)
    over = [i for i, loss in enumerate(losses) if loss - losses[0] > limit]
    end = over[0] - 1 if over else len(losses) - 1
    assert budget.end == 10 * end
    assert budget.spent_at == (10 * over[0] if over else None)
    spent = budget.result()["measures"]["a/loss"]["spent"]
    assert spent == losses[end] - losses[0] <= limit


def test_a_perplexity_that_has_overflowed_exceeds_its_budget():
    budget = budget_lib.Budget({"a/perplexity": 1e6})
    budget.observe(0, {"a/perplexity": 9.0})
    budget.observe(1, {"a/loss": 800.0})
    assert (budget.end, budget.spent_at) == (0, 1)


def test_a_text_without_tokens_has_no_budget():
    budget = budget_lib.Budget({"a/loss": 0.1})
    with pytest.raises(InputError, match="train.keep_budget: 'a/loss' has no value"):
        budget.observe(0, {"b/loss": 9.0})


def test_hosts_agree_on_recorded_measures_to_the_bit(tmp_path, monkeypatch):
    rows = [{"step": 0, "eval/a/loss": 1 / 3}, {"step": 7, "eval/b/loss": 0.1}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / metrics.FILE).write_text(text)
    phase = types.SimpleNamespace(folder=epath.Path(tmp_path))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # What a broadcast keeps of floats.
    monkeypatch.setattr(
        hosts, "of_first", lambda value: np.asarray(jax.numpy.asarray(value))
    )
    found = train._recorded_evaluations(phase, {"a/loss": 0.1})
    assert found == [{"step": 0, "a/loss": 1 / 3}, {"step": 7}]


def ntp_only(config):
    config.objective.ntp_weight, config.objective.lssd_weight = 1.0, 0.0
    config.sources.instructions.lssd_weight = 0.0
    config.sources.instructions.ntp_weight = 1.0


def prepared(config):
    config.objective.teacher, config.data.prepared = "prepared", "folder"


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (lambda c: None, True),
        (ntp_only, False),
        (lambda c: (ntp_only(c), setattr(c.lora, "rank", 2)), True),
        (
            lambda c: (
                ntp_only(c),
                setattr(c.objective, "token_weighting", "excess_loss"),
            ),
            True,
        ),
        (prepared, False),
        (lambda c: setattr(c.teacher, "path", c.model.path), False),
        (lambda c: (prepared(c), setattr(c.lora, "rank", 2)), True),
        (lambda c: (ntp_only(c), c.eval.update(kl_from_start="always")), False),
    ],
)
def test_the_start_is_loaded_apart_only_if_the_step_does_not_hold_it(
    tiny_config, tmp_path, change, holds
):
    """The config alone, as budgets are checked by it, says what the step holds."""
    change(tiny_config)
    config_lib.validate(tiny_config)
    phase = phase_lib.start(tiny_config, str(tmp_path), "cpt")
    form = None
    if tiny_config.objective.teacher == "prepared":
        from mixcpt_jax.training import teacher_outputs

        form = teacher_outputs.form_of(phase)
    data = pipeline.synthetic(tiny_config, form)
    assert config_lib.holds_start(tiny_config) == holds
    always = tiny_config.eval.kl_from_start == "always"
    assert config_lib.measures_kl(tiny_config) == holds or always
    built = program.make_program(phase, data)
    whole = transformer.abstract_params(phase.model_config)
    is_whole = len(jax.tree.leaves(built.frozen)) == len(jax.tree.leaves(whole))
    assert is_whole == holds
    assert (built.start is not None) == (always and not holds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generl/loss": 0.1}, "train.keep_budget: 'generl/loss' is not measured"),
        (
            {"domain/exam": 0.1},
            "'domain/exam' is not measured; measures are domain/acc",
        ),
        ({"domain/loss": -0.1}, "train.keep_budget.domain/loss=-0.1: must be >= 0 and"),
        ({"domain/loss": "little"}, "must be a number, not str"),
        ({"domain/loss": float("nan")}, "must be a finite number"),
    ],
)
def test_a_bad_budget_is_a_line_before_anything_is_loaded(
    tiny_config, tmp_path, settings, message
):
    tiny_config.train.eval_every = 2
    tiny_config.train.keep_budget = settings
    tiny_config.phases = ("cpt",)
    with pytest.raises(InputError, match=message):
        main.run(tiny_config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_budget_of_kl_needs_the_start(tiny_config):
    ntp_only(tiny_config)
    tiny_config.train.eval_every = 2
    tiny_config.train.keep_budget = {BUDGET: 0.1}
    with pytest.raises(InputError, match="is measured with eval.kl_from_start=always"):
        config_lib.validate(tiny_config)
    tiny_config.eval.kl_from_start = "always"
    config_lib.validate(tiny_config)


def test_a_budget_needs_evaluations_and_they_stay_as_they_are(tiny_config):
    tiny_config.train.keep_budget = {BUDGET: 0.1}
    with pytest.raises(InputError, match="needs train.eval_every, which is 0"):
        config_lib.validate(tiny_config)
    tiny_config.train.eval_every = 2
    stored = tiny_config.to_dict()
    tiny_config.train.eval_every, tiny_config.train.save_every = 3, 1
    difference = config_lib.first_difference(tiny_config, stored)
    assert difference == ("train.eval_every", 2, 3)
    for settings in (stored, tiny_config):
        settings["train"]["keep_budget"] = {}
    assert config_lib.first_difference(tiny_config, stored) is None


# Whole runs.


def short(config):
    """Nine steps, evaluated every third, whose KL from the start rises."""
    config.train.num_steps, config.train.eval_every = 9, 3
    # The checkpoint of an evaluation stays, however many newer ones there are.
    config.train.save_every, config.train.keep_last = 1, 1
    config.eval.max_tokens = 256
    config.optimizer.learning_rate = 2e-2
    config.optimizer.schedule = "constant"
    config.eval.prompts = "package:mixcpt_jax/assets/prompts.jsonl"
    config.eval.max_new_tokens = 2
    config.phases = ("cpt",)
    return config


def evaluations(folder):
    return {e["step"]: e for e in metrics.evaluations(metrics.read(epath.Path(folder)))}


def record_of(folder):
    """All rows without their times."""
    rows = metrics.read(epath.Path(folder))
    timed = ("tokens_per_second",)
    rows = [{k: v for k, v in row.items() if k not in timed} for row in rows]
    samples = metrics.read(epath.Path(folder), metrics.SAMPLES_FILE)
    items = metrics.read(epath.Path(folder), metrics.ITEMS_FILE)
    return rows, samples, items


def outcome(folder):
    results = json.loads((folder / "results.json").read_text())
    for timed in ("seconds", "tokens_per_second"):
        del results[timed]
    kept = checkpoint.newest_readable(epath.Path(folder))
    entries = json.loads(
        (folder / f"checkpoints/{kept.step}/_CHECKPOINT_METADATA").read_text()
    )
    return results, kept.step, entries["custom_metadata"]["leaves"]


def checkpoints_of(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def free(tiny_model, once):
    """The evaluations of a run without a budget."""
    from conftest import _tiny_config

    def make(folder):
        main.run(short(_tiny_config(tiny_model)), f"{folder}/run")

    return evaluations(once("keep_budget_free", make) / "run" / "cpt")


@pytest.fixture
def budgeted(tiny_config, free):
    """A config whose phase exceeds its budget at step 6."""
    config = short(tiny_config)
    kl = {step: row[BUDGET] for step, row in free.items()}
    assert kl[0] == 0 < kl[3] < kl[6]
    config.train.keep_budget = {BUDGET: (kl[3] + kl[6]) / 2}
    return config


@pytest.fixture
def whole(tiny_model, once, budgeted):
    """The folder of the phase, run without interruption."""
    return once("keep_budget", lambda f: main.run(budgeted, f"{f}/run")) / "run" / "cpt"


@pytest.mark.slow
def test_a_phase_ends_with_the_last_checkpoint_within_its_budget(
    budgeted, free, whole, tmp_path
):
    results, step, _ = outcome(whole)
    assert step == 3 == results["after"]["step"]
    assert results["after"] == free[3]
    assert results["before"] == free[0]
    assert results["keep_budget"] == {
        "step": 3,
        "exceeded_at": 6,
        "measures": {
            BUDGET: {
                "spent": free[3][BUDGET] - free[0][BUDGET],
                "budget": budgeted.train.keep_budget[BUDGET],
            }
        },
    }
    # Those after it are set aside, and the record shows why.
    assert checkpoints_of(whole) == ["3", "over-budget-5"]
    assert evaluations(whole) == {step: free[step] for step in (0, 3, 6)}
    samples = metrics.read(epath.Path(whole), metrics.SAMPLES_FILE)
    assert {row["step"] for row in samples} == {0, 3}
    arms = run_records.load([str(whole.parent)])
    (sentence,) = changes.budgets(arms)
    spent = f"{free[3][BUDGET]:.4g} of {budgeted.train.keep_budget[BUDGET]:g}"
    assert sentence == (
        f"cpt: spent {spent} of {BUDGET}; ends with step 3, as step 6 exceeds the budget."
    )
    html = page.render(arms).html
    assert sentence in html
    assert "domain: KL(start ‖ now), nats per token" in html
    # The next phase starts from it.
    assert checkpoint.identity(str(whole))["step"] == 3


@pytest.mark.slow
def test_a_phase_whose_first_evaluation_is_over_its_budget_ends_with_its_start(
    budgeted, free, tmp_path
):
    budgeted.train.keep_budget = {BUDGET: free[3][BUDGET] / 2}
    _, results = main.run(budgeted, str(tmp_path))
    assert results["cpt"]["after"] == results["cpt"]["before"] == free[0]
    assert checkpoints_of(tmp_path / "cpt") == ["0", "over-budget-2"]
    samples = metrics.read(epath.Path(tmp_path / "cpt"), metrics.SAMPLES_FILE)
    assert {row["step"] for row in samples} == {0}


@pytest.mark.slow
def test_a_phase_within_its_budget_ends_as_without_one(budgeted, free, tmp_path):
    budgeted.train.keep_budget = {BUDGET: 9.0}
    _, results = main.run(budgeted, str(tmp_path))
    assert results["cpt"]["after"] == free[9]
    assert results["cpt"]["keep_budget"]["exceeded_at"] is None


def kill_after(place, name, number=1):
    """Raises KeyboardInterrupt after the `number`-th call of a function of `place`."""

    def patch(monkeypatch):
        function, calls = getattr(place, name), []

        def killed(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(result)
            if len(calls) == number:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(place, name, killed)

    return patch


def kill_before(place, name):
    def patch(monkeypatch):
        def killed(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(place, name, killed)

    return patch


@pytest.mark.slow
def test_kills_at_any_moment_change_nothing(budgeted, whole, tmp_path, monkeypatch):
    kills = [
        # After the evaluations of the start, of step 3 and of step 6, and before and
        # after what follows the last.
        kill_after(budget_lib.Budget, "observe", 1),
        kill_after(budget_lib.Budget, "observe", 2),
        # Recorded evaluations are observed again.
        kill_after(budget_lib.Budget, "observe", 3),
        kill_before(checkpoint, "set_aside"),
        kill_after(checkpoint, "_rename"),
        kill_before(train._Evaluation, "answer"),
        kill_before(train, "_results"),
    ]
    for kill in kills:
        with monkeypatch.context() as patch:
            kill(patch)
            with pytest.raises(KeyboardInterrupt):
                main.run(budgeted, str(tmp_path))
    main.run(budgeted, str(tmp_path))
    assert outcome(tmp_path / "cpt") == outcome(whole)
    assert record_of(tmp_path / "cpt") == record_of(whole)


@pytest.mark.slow
def test_a_stop_during_the_evaluation_over_the_budget_changes_nothing(
    budgeted, whole, tmp_path, monkeypatch
):
    measure, calls = evaluator.sums_per_example, []

    def interrupted(*args):
        calls.append(measure(*args))
        if len(calls) == 5:  # two texts at the start, two at step 3
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("was not cut off")
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "sums_per_example", interrupted)
        with pytest.raises(preemption.Preempted, match="from step 6"):
            main.run(budgeted, str(tmp_path))
    assert checkpoints_of(tmp_path / "cpt") == ["3", "6"]
    main.run(budgeted, str(tmp_path))
    assert outcome(tmp_path / "cpt") == outcome(whole)
    assert record_of(tmp_path / "cpt") == record_of(whole)


@pytest.mark.slow
def test_the_start_may_be_loaded_for_it_and_a_merge_and_an_evaluation_measure_it(
    tiny_config, tmp_path
):
    config = short(tiny_config)
    ntp_only(config)
    config.eval.kl_from_start = "always"
    config.eval.prompts = ""
    config.phases = ("cpt", "merge", "evaluate")
    config.overrides.merge = {"job": "merge", "init_from": "phase:cpt"}
    config.overrides.merge.merge = {"shares": (0.5, 1.0), "keep": {BUDGET: 9.0}}
    config.overrides.evaluate = {"job": "evaluate", "init_from": "phase:merge"}
    _, results = main.run(config, str(tmp_path))
    after = results["cpt"]["after"][BUDGET]
    assert results["cpt"]["before"][BUDGET] == 0 < after
    shares = [row[BUDGET] for row in results["merge"]["curve"]]
    assert shares[0] == 0 < shares[1] < shares[2]
    assert shares[2] == pytest.approx(after, rel=1e-5)
    assert results["evaluate"]["after"][BUDGET] == pytest.approx(after, rel=1e-5)
