"""The loop, whole: it learns, resumes exactly, and stops with a clear word."""

import dataclasses
import json
import shutil
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from etils import epath
from processes import finish, kill

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.jobs import train
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import checkpoint, optimizer, phase


def losses(folder):
    """step -> every training metric of that step but the speed."""
    return {
        row["step"]: {k: v for k, v in row.items() if k != "tokens_per_second"}
        for row in metrics.read(epath.Path(folder))
        if "loss" in row
    }


def test_a_phase_learns_and_leaves_its_record(finished):
    results = json.loads((finished / phase.RESULTS_FILE).read_text())
    rows = losses(finished)
    assert list(rows) == list(range(1, 7))
    for name in ("ntp", "lssd", "kd", "agree", "swapped", "grad_norm", "learning_rate"):
        assert name in rows[6]
    assert "domain/lssd" in rows[6]
    assert rows[6]["ntp"] < rows[1]["ntp"]
    assert rows[1]["agree"] == 1.0  # the student starts as the teacher
    for name in ("domain", "instructions"):
        for measure in ("loss", "perplexity", "accuracy"):
            assert f"{name}/{measure}" in results["before"]
            assert f"{name}/{measure}" in results["after"]
    assert results["after"]["domain/loss"] < results["before"]["domain/loss"]
    asked = {row["name"]: row["share_asked"] for row in results["mixture"]}
    assert asked == pytest.approx({"domain": 0.6, "instructions": 0.4})


@pytest.mark.slow
def test_every_mesh_gives_the_same_run(tiny_config, finished, tmp_path):
    """`finished` is on a mesh of (1, 8, 1)."""
    config = tiny_config
    config.mesh.data = config.mesh.fsdp = config.mesh.tensor = 2
    train.run(config, str(tmp_path / "run"), "cpt")
    other = losses(tmp_path / "run")
    for step, row in losses(finished).items():
        for name, value in row.items():
            assert other[step][name] == pytest.approx(value, rel=2e-4, abs=2e-5)


def test_a_finished_run_is_not_run_again(tiny_config, finished):
    files = [finished / name for name in (metrics.FILE, phase.RESULTS_FILE)]
    before = [file.read_text() for file in files]
    assert train.run(tiny_config, str(finished), "cpt") == json.loads(before[1])
    assert [file.read_text() for file in files] == before


def test_resuming_on_another_mesh_goes_on_with_the_same_losses(
    tiny_config, finished, tmp_path
):
    halves = str(tmp_path / "halves")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.run(tiny_config, halves, "cpt")
    tiny_config.mesh.fsdp, tiny_config.mesh.tensor = 4, 2
    train.run(tiny_config, halves, "cpt")
    expected, actual = losses(finished), losses(halves)
    assert list(actual) == list(expected)
    for step, row in expected.items():
        assert actual[step]["loss"] == pytest.approx(row["loss"], rel=2e-4)


@pytest.mark.slow
def test_ever_fewer_devices_go_on_with_the_same_losses(tiny_config, finished, tmp_path):
    """Eight, then four, then one: parameters and moments are read into place."""
    config = tiny_config
    config.train.save_every = 1
    parts = str(tmp_path / "parts")
    make_mesh = sharding.make_mesh
    for num_devices, shape in [(8, (1, 4, 2)), (4, (2, 2, 1)), (1, (1, 1, 1))]:
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = shape
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                phase.sharding,
                "make_mesh",
                lambda sizes, n=num_devices: make_mesh(sizes, jax.devices()[:n]),
            )
            # Not what is being tested, and it counts the devices of the process.
            patch.setattr(phase, "check_model", lambda *_: None)
            ends = num_devices == 1
            if not ends:
                stop_after(patch, 1)
            with nullcontext() if ends else pytest.raises(KeyboardInterrupt):
                train.run(config, parts, "cpt")
    expected, actual = losses(finished), losses(parts)
    assert list(actual) == list(expected)
    for step, row in expected.items():
        assert actual[step]["loss"] == pytest.approx(row["loss"], rel=2e-4)


@pytest.mark.slow
def test_a_phase_reads_its_sources_to_the_end(tiny_config, tmp_path):
    config = tiny_config
    config.train.num_steps = 0
    config.sources.domain.epochs = 1.0
    config.sources.instructions.max_tokens = 2000
    results = train.run(config, str(tmp_path / "run"), "cpt")
    domain, instructions = results["mixture"]
    assert domain["epochs"] == 1
    rows = losses(tmp_path / "run")
    read = {
        name: sum(row[f"{name}/tokens"] for row in rows.values())
        for name in ("domain", "instructions")
    }
    assert read["domain"] == domain["loss_tokens"]
    assert 2000 <= read["instructions"] < 2000 + 2 * config.data.row_length
    num_rows = domain["rows"] + instructions["epochs"] * instructions["rows"]
    assert len(rows) == -(-num_rows // config.data.batch_size)

    config.train.num_steps = len(rows) + 1
    with pytest.raises(InputError, match=f"max_tokens after {len(rows)} steps"):
        train.run(config, str(tmp_path / "more"), "cpt")


def test_the_source_with_a_limit_says_how_long_a_phase_is(tiny_config, tmp_path):
    config = tiny_config
    config.train.num_steps = 0
    config.sources.domain.epochs = 2.0
    tokens = phase.start(config, str(tmp_path), "").tokenizer
    data = train.pipeline.load(config, tokens)
    domain, _ = data.report
    assert domain["epochs"] == pytest.approx(2, abs=0.2)
    # The other source keeps its share for as long as that takes.
    assert domain["share_delivered"] == pytest.approx(0.6, abs=0.05)
    config.sources.domain.epochs = 0.0
    with pytest.raises(InputError, match="num_steps=0.*none has one; set epochs"):
        config_lib.validate(config)


def test_text_that_is_read_very_often_is_warned_of_and_then_refused(
    tiny_config, tmp_path, caplog
):
    config = tiny_config
    config.sources.instructions.max_records = 20
    tokens = phase.start(config, str(tmp_path), "").tokenizer
    epochs = train.pipeline.load(config, tokens).report[1]["epochs"]
    for warned, most in [(0.9 * epochs, 0.0), (1.1 * epochs, 0.0), (0.0, 1.1 * epochs)]:
        caplog.clear()
        config.data.warn_epochs, config.data.max_epochs = warned, most
        train.pipeline.load(config, tokens)
        told = [r.getMessage() for r in caplog.records if "times" in r.getMessage()]
        assert bool(told) == (0 < warned < epochs)
        assert all("sources.instructions" in text for text in told)
    config.data.max_epochs = 0.9 * epochs
    with pytest.raises(InputError, match="^sources.instructions: its .*max_epochs="):
        train.pipeline.load(config, tokens)


@pytest.mark.slow
def test_the_batch_size_may_change_on_the_way(tiny_config, tmp_path):
    """The rows go on where they stopped: none is lost, none read twice."""
    config = tiny_config
    config.train.num_steps = 5
    tokens = []
    original = train.pipeline.batches
    with pytest.MonkeyPatch.context() as patch:

        def batches(*args):
            for batch in original(*args):
                tokens.append(batch["tokens"])
                yield batch

        patch.setattr(train.pipeline, "batches", batches)
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, str(tmp_path / "run"), "cpt")
        first = tokens[:2]
        tokens.clear()
        patch.setattr(train.pipeline, "batches", batches)
        config.data.batch_size = 16
        train.run(config, str(tmp_path / "run"), "cpt")
    read = np.concatenate([*first, *tokens[:3]])
    config.data.batch_size = 8
    data = train.pipeline.load(config, phase.start(config, str(tmp_path), "").tokenizer)
    whole = original(config, data, 0)
    expected = np.concatenate([b["tokens"] for b, _ in zip(whole, range(8))])
    np.testing.assert_array_equal(read, expected)


def stop_after(patch, num_batches):
    """Makes the data stream raise KeyboardInterrupt after so many batches."""
    original = train.pipeline.batches

    def batches(*args):
        for number, batch in enumerate(original(*args)):
            if number == num_batches:
                raise KeyboardInterrupt
            yield batch

    patch.setattr(train.pipeline, "batches", batches)


def test_hand_over_starts_the_next_phase_where_the_last_one_ended(
    tiny_config, finished, tmp_path
):
    tiny_config.init_from = str(finished)
    results = train.run(tiny_config, str(tmp_path / "second"), "cpt")
    end = json.loads((finished / phase.RESULTS_FILE).read_text())["after"]
    for name, value in results["before"].items():
        if name.endswith("/kl_from_start"):  # the start is this phase's own
            assert value == pytest.approx(0, abs=1e-6) != end[name]
        elif name != "step":
            assert value == pytest.approx(end[name], rel=1e-5)
    # The teacher, too, is what this phase started from.
    assert losses(tmp_path / "second")[1]["kd"] == pytest.approx(0.0, abs=1e-5)


def test_random_weights_are_the_seeds_on_any_mesh(tiny_config, tiny_model, tmp_path):
    """Of the model's folder its config.json is all that is read."""
    shutil.copy(f"{tiny_model}/config.json", tmp_path)
    config = tiny_config
    config.model.path, config.model.tokenizer = str(tmp_path), tiny_model
    config.model.weights = "random"

    def draw(num_devices=8, dtype="float32", **mesh):
        started = dataclasses.replace(
            phase.start(config, str(tmp_path / "run"), "cpt"),
            mesh=sharding.make_mesh(
                {"data": -1, "fsdp": 1, "tensor": 1} | mesh, jax.devices()[:num_devices]
            ),
        )
        return jax.device_get(started.starting_params(dtype))

    first = draw(num_devices=1)
    jax.tree.map(np.testing.assert_array_equal, draw(fsdp=4, tensor=2), first)
    # The frozen model is kept in fewer digits, and is the same but for them.
    rounded = transformer.cast(first, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, draw(dtype="bfloat16"), rounded)
    provenance = phase.start(config, str(tmp_path / "run"), "cpt").provenance({})
    assert provenance["start"]["random"] == config.seed
    config.seed += 1
    other = draw(num_devices=1)
    for before, now in zip(jax.tree.leaves(first), jax.tree.leaves(other)):
        # Norms begin with ones.
        assert np.all(before == 1) or np.mean(before == now) < 0.01


@pytest.mark.slow
def test_from_random_weights_a_phase_is_its_own_teacher(tiny_config, tmp_path):
    tiny_config.model.weights = "random"
    tiny_config.objective.lssd_weight = tiny_config.objective.selective_weight = 0.5
    tiny_config.sources.instructions.selective_weight = 0.0
    for source in tiny_config.sources.values():
        source.holdout = 0
    tiny_config.train.num_steps = 1
    tiny_config.train.eval_before = False
    train.run(tiny_config, str(tmp_path / "run"), "cpt")
    rows = losses(tmp_path / "run")
    assert rows[1]["agree"] == 1.0
    assert rows[1]["kd"] == pytest.approx(0.0, abs=1e-5)
    assert rows[1]["loss"] != pytest.approx(rows[1]["ntp"], rel=0.01)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_remedy(
    tiny_config, tmp_path
):
    tiny_config.optimizer.learning_rate = 1e30
    tiny_config.optimizer.clip_norm = 0.0
    with pytest.raises(FloatingPointError, match=r"step \d: .*nan.*learning_rate"):
        train.run(tiny_config, str(tmp_path / "run"), "cpt")


def spoil_batches(patch, steps):
    """Makes the gradient of these steps NaN."""
    original = train.pipeline.batches

    def batches(*args):
        for step, batch in enumerate(original(*args), 1):
            if step in steps:
                batch = batch | {"lssd_weights": np.nan * batch["lssd_weights"]}
            yield batch

    patch.setattr(train.pipeline, "batches", batches)


def test_a_few_bad_steps_are_skipped_and_counted_and_more_end_the_run(
    tiny_config, tmp_path
):
    config = tiny_config
    config.train.eval_before = False
    config.train.max_skipped = 2
    config.train.log_every = 6
    config.train.save_every = 3
    with pytest.MonkeyPatch.context() as patch:
        spoil_batches(patch, {2, 3, 5})
        results = train.run(config, str(tmp_path / "run"), "cpt")
    assert results["skipped"] == 3
    rows = {row["step"]: row for row in metrics.read(epath.Path(tmp_path / "run"))[:2]}
    # Saved in the middle of it: what is not finite is no number in JSON.
    assert "loss" not in rows[3]
    assert (rows[3]["skipped"], rows[3]["skipped_in_a_row"]) == (2, 2)
    assert (rows[6]["skipped"], rows[6]["skipped_in_a_row"]) == (3, 2)
    schedule = optimizer.make_schedule(config.optimizer, 6)
    assert rows[6]["learning_rate"] == pytest.approx(schedule(2))
    # Noticed also where no step in between is logged.
    config.train.save_every = 6
    with pytest.MonkeyPatch.context() as patch:
        spoil_batches(patch, {2, 3, 4})
        with pytest.raises(
            FloatingPointError, match="step 6: 3 steps in a row skipped"
        ):
            train.run(config, str(tmp_path / "more"), "cpt")


def test_a_workdir_of_another_config_is_refused(tiny_config, finished):
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(InputError, match=r"belongs to a run with optimizer.learning_"):
        train.run(tiny_config, str(finished), "cpt")


def test_settings_that_do_not_suit_the_model(tiny_config, tmp_path):
    tiny_config.data.row_length = 512
    with pytest.raises(InputError, match="row_length=512: longer than.*context of 256"):
        train.run(tiny_config, str(tmp_path / "a"), "cpt")
    tiny_config.data.row_length = 64
    tiny_config.mesh.fsdp, tiny_config.mesh.tensor = 1, 8
    with pytest.raises(InputError, match=r"mesh.tensor=8 does not divide.*4 attention"):
        train.run(tiny_config, str(tmp_path / "b"), "cpt")


def test_the_teacher_is_in_no_checkpoint(finished):
    folder = finished / checkpoint.FOLDER / "6"
    items = {path.name for path in folder.iterdir() if path.is_dir()}
    assert items == {"params", "optimizer"}


def test_the_last_two_checkpoints_stay_by_default(finished):
    kept = {path.name for path in (finished / checkpoint.FOLDER).iterdir()}
    assert kept == {"4", "6"}


def test_the_end_equals_what_the_checkpoint_exports(finished, tiny_model, tmp_path):
    model_config = pretrained.read_model_config(tiny_model)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        transformer.abstract_params(model_config),
    )
    params = checkpoint.load_params(str(finished), abstract)
    pretrained.save_pretrained(
        str(tmp_path / "hf"), params, model_config, dtype="float32"
    )
    reloaded = pretrained.load_params(str(tmp_path / "hf"), abstract)
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_kill_at_a_random_moment_changes_nothing(
    tiny_config, tmp_path, launcher, write_config_file, accumulation_steps
):
    """`kill -9`, the same command again: every number of every step is equal."""
    tiny_config.train.num_steps = 40
    tiny_config.train.save_every = 4
    tiny_config.optimizer.accumulation_steps = accumulation_steps
    tiny_config.data.batch_size = 8 * accumulation_steps
    flag = f"--config={write_config_file(tiny_config)}"

    def start(workdir):
        return launcher.start(flag, f"--workdir={tmp_path / workdir}", num_devices=8)

    finish([start("whole")])
    rng = np.random.default_rng(accumulation_steps)
    kills = 0
    for attempt in range(3):
        num_steps = int(rng.integers(5, 12)) * (attempt + 1)
        kills += kill(
            start("killed"), lambda n=num_steps: len(losses(tmp_path / "killed")) >= n
        )
    assert kills, "the run ended before any kill"
    finish([start("killed")])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / phase.RESULTS_FILE).exists()


@pytest.fixture
def dpo_config(tiny_config):
    """A short preference phase on the pairs that ship with the package."""
    config = tiny_config
    for source in config.sources.values():
        source.weight, source.holdout = 0.0, 0
    pairs = "package:mixcpt_jax/assets/preferences.jsonl"
    config.sources.dpo = config_lib.source(
        path=pairs, format="chat_preference", holdout=8, max_records=60
    )
    config.objective.kind = "preference"
    config.data.row_length = 128
    config.data.overlong = "truncate"
    config.train.num_steps = 4
    return config


def assert_same_losses(actual, expected, rtol):
    assert list(actual) == list(expected)
    for step, row in expected.items():
        assert row.keys() == actual[step].keys()
        for name, value in row.items():
            # While the two rewards are equal, noise says which is larger.
            if name.endswith("accuracy") and step == 1:
                continue
            # Log-probabilities near -1000 make the noise of rewards.
            assert actual[step][name] == pytest.approx(value, rel=rtol, abs=1e-3), name


@pytest.mark.slow
def test_a_preference_phase_learns_and_its_reference_may_run_ahead(
    dpo_config, tmp_path
):
    # So few pairs that every batch holds all of them.
    dpo_config.sources.dpo.max_records = 16
    dpo_config.optimizer.learning_rate = 1e-3
    results = train.run(dpo_config, str(tmp_path / "step"), "dpo")
    rows = losses(tmp_path / "step")
    # The policy starts as the reference.
    assert rows[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[1]["margin"] == pytest.approx(0, abs=1e-4)
    assert rows[4]["loss"] < rows[1]["loss"]
    assert rows[4]["margin"] > 0
    before, after = results["before"], results["after"]
    assert before["dpo/reward_margin"] == pytest.approx(0, abs=1e-4)
    assert after["dpo/reward_margin"] != 0
    assert 0 <= after["dpo/reward_accuracy"] <= 1
    assert 0 <= after["dpo/pair_accuracy"] <= 1

    dpo_config.preference.reference = "precomputed"
    train.run(dpo_config, str(tmp_path / "ahead"), "dpo")
    assert (tmp_path / "ahead" / "reference.sources.dpo.npz").exists()
    assert_same_losses(losses(tmp_path / "ahead"), rows, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "precomputed"])
def test_a_preference_phase_resumes_exactly(where, dpo_config, tmp_path):
    dpo_config.preference.reference = where
    dpo_config.train.save_every = 2
    train.run(dpo_config, str(tmp_path / "whole"), "dpo")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.run(dpo_config, str(tmp_path / "halves"), "dpo")
    train.run(dpo_config, str(tmp_path / "halves"), "dpo")
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_adapters_alone_are_trained_kept_and_handed_over_merged(tiny_config, tmp_path):
    config = tiny_config
    config.lora.rank = 2
    config.objective.ntp_weight = 1.0
    config.optimizer.learning_rate = 1e-2
    config.train.num_steps = 12
    results = train.run(config, str(tmp_path / "first"), "cpt")
    rows = losses(tmp_path / "first")
    assert rows[1]["agree"] == 1.0
    assert rows[1]["kd"] == pytest.approx(0, abs=1e-6)
    assert rows[12]["ntp"] < rows[1]["ntp"]
    model_config = pretrained.read_model_config(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    loaded = phase.load_params(str(tmp_path / "first"), model_config, mesh, "float32")
    base = pretrained.load_params(
        config.model.path, phase.abstract_params(model_config, mesh, "float32")
    )
    np.testing.assert_array_equal(loaded["embedding"], base["embedding"])
    assert np.any(loaded["layers"]["query"] != base["layers"]["query"])
    lora = lora_lib.Lora(2, config.lora.alpha, tuple(config.lora.targets))
    with pytest.raises(InputError, match=r"\['embedding'\] is absent there"):
        checkpoint.load_params(str(tmp_path / "first"), base)
    adapters = checkpoint.load_params(
        str(tmp_path / "first"),
        phase.abstract_adapters(model_config, lora, mesh, "float32"),
    )
    assert set(adapters) == {"layers"}

    # The next phase starts from base and adapters, with adapters of its own or without.
    config.train.num_steps = 2
    config.init_from = str(tmp_path / "first")
    for rank in (0, 3):
        config.lora.rank = rank
        after = train.run(config, str(tmp_path / f"next{rank}"), "sft")["before"]
        for name, value in results["after"].items():
            if name.endswith("/kl_from_start"):
                assert after.get(name, 0) == pytest.approx(0, abs=1e-6) != value
            elif name != "step":
                assert after[name] == pytest.approx(value, rel=1e-4), name


def test_a_start_that_has_changed_is_refused(tiny_config, finished, tiny_run, tmp_path):
    shutil.copytree(finished, tmp_path / "first")
    tiny_config.init_from = str(tmp_path / "first")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train.run(tiny_config, str(tmp_path / "second"), "cpt")
    # Trained again, the same folder holds another model.
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    shutil.copytree(f"{tiny_run}/whole", tmp_path / "first")
    with pytest.raises(InputError, match="init_from: .*was trained from.*'step': 6"):
        train.run(tiny_config, str(tmp_path / "second"), "cpt")


def test_a_finished_phase_is_not_taken_for_one_of_another_start(
    tiny_config, finished, tiny_run, tmp_path
):
    tiny_config.train.num_steps = 1
    tiny_config.train.eval_before = False
    shutil.copytree(finished, tmp_path / "first")
    tiny_config.init_from = "phase:first"
    results = train.run(tiny_config, str(tmp_path / "second"), "sft")
    assert train.run(tiny_config, str(tmp_path / "second"), "sft") == results
    # A run's folder may be moved.
    (tmp_path / "moved").mkdir()
    for name in ("first", "second"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    second = str(tmp_path / "moved" / "second")
    assert train.run(tiny_config, second, "sft") == results
    # The first phase, made anew, is another start.
    shutil.rmtree(tmp_path / "moved" / "first")
    shutil.copytree(f"{tiny_run}/whole", tmp_path / "moved" / "first")
    with pytest.raises(InputError, match="second: was made from .*delete .*second"):
        train.run(tiny_config, second, "sft")


def test_a_wrong_start_does_not_take_the_folder(tiny_config, tmp_path):
    tiny_config.init_from = str(tmp_path / "none")
    with pytest.raises(InputError, match="init_from=.*none: has no folder"):
        train.run(tiny_config, str(tmp_path / "run"), "sft")
    assert not (tmp_path / "run").exists()
