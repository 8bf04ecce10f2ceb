"""All six phases by one command: what they leave, killed in every one, with adapters."""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import six_phases
from etils import epath
from processes import finish, kill
from safetensors import numpy as safetensors
from six_phases import NUM_STEPS, PHASES, TRAINED

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import paths
from mixcpt_jax.jobs import generate
from mixcpt_jax.models import lora as lora_lib
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import checkpoint, phase

ASSETS = "package:mixcpt_jax/assets"
RANKED = ("instructions", "preferences")
MOMENTS = ("before", "after")
# As configs/mixcpt.py:tiny has them.
MAX_RECORDS, HOLDOUT, KEEP = 160, 8, 16


@pytest.fixture
def start(project, tiny_model, launcher):
    """Starts the command of the six phases in a workdir."""

    def start(workdir, *settings):
        flags = six_phases.flags(project, tiny_model, workdir)
        return launcher.start(*flags, *settings, num_devices=2)

    return start


@pytest.fixture(scope="module")
def whole(six_phase_run):
    """The workdir of a run that nothing disturbed."""
    return epath.Path(six_phase_run)


def read_json(folder, name=phase.RESULTS_FILE):
    return json.loads((folder / name).read_text())


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def training_metrics(folder):
    """step -> every training metric of that step but the speed; no step twice."""
    rows = [row for row in metrics.read(folder) if "loss" in row]
    steps = {row.pop("step"): row for row in rows}
    assert len(steps) == len(rows)
    for row in rows:
        row.pop("tokens_per_second", None)
    return steps


def final_params(folder, tiny_model):
    """The whole parameters at a phase's end, on the host."""
    mesh = sharding.make_mesh(config_lib.default().mesh)
    model_config = pretrained.read_model_config(tiny_model)
    with jax.set_mesh(mesh):
        return jax.device_get(
            phase.load_params(str(folder), model_config, mesh, "float32")
        )


def assert_same_bits(tree, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            a.view(np.uint32), b.view(np.uint32), strict=True
        ),
        tree,
        other,
    )


def assert_hand_over(workdir):
    """Each phase names the checkpoint that the one before it left."""
    ends = {name: checkpoint.identity(str(workdir / name)) for name in TRAINED}
    assert {end["step"] for end in ends.values()} == {NUM_STEPS}
    assert len({end["id"] for end in ends.values()}) == len(TRAINED)
    for name, earlier in {
        "select": "cpt",
        "sft": "cpt",
        "dpo": "sft",
        "evaluate": "dpo",
        "export": "dpo",
    }.items():
        start = read_json(workdir / name, phase.PROVENANCE_FILE)["start"]
        expected = {"init_from": f"phase:{earlier}"} | ends[earlier]
        assert expected.items() <= start.items()


def assert_measured_alike(results, other):
    """The same losses but for float32 noise; accuracies jump where two tokens tie."""
    names = [name for name in results if name.endswith("/loss")]
    assert {*names} == {f"{name}/loss" for name in ("domain", "general", *RANKED)}
    for name in names:
        assert results[name] == pytest.approx(other[name], rel=1e-6)


def assert_each_phase_begins_at_the_end_of_the_last(workdir):
    results = {name: read_json(workdir / name) for name in (*TRAINED, "evaluate")}
    for earlier, later in [("cpt", "sft"), ("sft", "dpo")]:
        assert_measured_alike(results[later]["before"], results[earlier]["after"])
    assert_measured_alike(results["evaluate"]["after"], results["dpo"]["after"])
    # And no phase ends where it began.
    for name in TRAINED:
        before, after = (results[name][moment] for moment in MOMENTS)
        assert after["domain/loss"] != pytest.approx(before["domain/loss"], rel=1e-5)
    first = training_metrics(workdir / "dpo")[1]
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def rounded(params, dtype="bfloat16"):
    return jax.tree.map(lambda p: jnp.asarray(p, dtype).astype(jnp.float32), params)


def test_every_phase_leaves_what_it_should(whole):
    for name in PHASES:
        for file in (phase.CONFIG_FILE, phase.PROVENANCE_FILE, phase.RESULTS_FILE):
            assert read_json(whole / name, file)
    for name in TRAINED:
        kept = [path.name for path in (whole / name / checkpoint.FOLDER).iterdir()]
        assert set(kept) == {str(NUM_STEPS - 2), str(NUM_STEPS)}
        assert [*training_metrics(whole / name)] == [*range(1, NUM_STEPS + 1)]
    for name, steps in {
        **dict.fromkeys(TRAINED, (0, NUM_STEPS)),
        "evaluate": (0,),
    }.items():
        samples = read_lines(whole / name / metrics.SAMPLES_FILE)
        prompts = read_lines(paths.require_file(f"{ASSETS}/prompts.jsonl"))
        assert [row["step"] for row in samples] == np.repeat(
            steps, len(prompts)
        ).tolist()
        page = (whole / name / metrics.SAMPLES_PAGE).read_text()
        for step in (0, NUM_STEPS):
            shown = len(prompts) if step in steps else 0
            assert page.count(f"*step {step}*") == shown
    table = (whole / "report.md").read_text().splitlines()[0]
    for name in (*TRAINED, "evaluate"):
        assert f"after {name}" in table


def test_each_phase_begins_at_the_end_of_the_last(whole):
    assert_hand_over(whole)
    assert_each_phase_begins_at_the_end_of_the_last(whole)


def test_every_phase_learns(whole):
    results = {name: read_json(whole / name) for name in TRAINED}
    for source in ("domain", *RANKED):
        before, after = (results["cpt"][m][f"{source}/loss"] for m in MOMENTS)
        assert after < before
    first = training_metrics(whole / "cpt")[1]
    assert first["agree"] == 1.0  # the student starts as the teacher
    rows = training_metrics(whole / "sft")
    assert rows[NUM_STEPS]["ntp"] < rows[1]["ntp"]
    rows = training_metrics(whole / "dpo")
    assert rows[NUM_STEPS]["margin"] > rows[1]["margin"]


@pytest.mark.parametrize("source", RANKED)
def test_selection_ranks_the_samples_that_alignment_reads(whole, source):
    lines = read_lines(whole / "select" / f"{source}.jsonl")
    found = [line.pop("selection") for line in lines]
    assert [row["rank"] for row in found] == [*range(1, len(lines) + 1)]
    assert [row["selected"] for row in found] == [i < KEEP for i in range(len(lines))]
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    # A line is a sample as it stands in its source, and each stands there once.
    originals = [
        json.dumps(line)
        for line in read_lines(paths.require_file(f"{ASSETS}/{source}.jsonl"))
    ][:MAX_RECORDS]
    samples = [json.dumps(line) for line in lines]
    assert len(set(samples)) == len(samples)
    assert set(samples) <= set(originals)
    summary = read_json(whole / "select")["selection"][source]
    assert summary["read"] == len(originals) - HOLDOUT
    assert summary["candidates"] == len(lines)
    assert summary["selected"] == KEEP

    reader, examples = {"instructions": ("sft", 1), "preferences": ("dpo", 2)}[source]
    mixture = read_json(whole / reader)["mixture"]
    assert {row["name"]: row["documents"] for row in mixture if row["documents"]} == {
        reader: KEEP * examples
    }
    files = read_json(whole / reader, phase.PROVENANCE_FILE)["files"][reader]
    assert [*files] == [str(whole / "select" / f"{source}.jsonl")]


def test_the_export_is_the_end_of_dpo_to_transformers(whole, tiny_model):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    results = read_json(whole / "export")
    assert results["folder"] == str(whole / "export" / "hf")
    assert results["dtype"] == "bfloat16"
    # It speaks the format it was trained in, and stops where a turn ends.
    vocabulary = tokenizer.load(tiny_model)
    ends = {vocabulary.end_of_turn_id, vocabulary.eos_id}
    folder = whole / "export" / "hf"
    assert set(read_json(folder, "generation_config.json")["eos_token_id"]) == ends
    exported = transformers.AutoTokenizer.from_pretrained(str(folder))
    messages = [{"role": "user", "content": "Hello"}]
    assert (
        exported.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        == (vocabulary.encode_chat(messages, add_generation_prompt=True)[0])
    )
    params = final_params(whole / "dpo", tiny_model)
    model_config = pretrained.read_model_config(results["folder"])
    assert model_config == pretrained.read_model_config(tiny_model)
    tokens_BxL = np.random.default_rng(0).integers(0, model_config.vocab_size, (2, 48))
    positions = jnp.broadcast_to(jnp.arange(48), tokens_BxL.shape)
    forward = jax.jit(transformer.make_forward(model_config))

    def logits_of(params):
        hidden = forward(params, tokens_BxL, positions, jnp.ones_like(positions))
        return np.asarray(transformer.logits(params, hidden))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        results["folder"], dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        actual = theirs(torch.tensor(tokens_BxL)).logits.numpy()
    # Once the weights are rounded as the export's are, only float32 noise is left.
    expected = logits_of(rounded(params))
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    # Unrounded, they differ by bfloat16's own noise.
    assert np.abs(actual - logits_of(params)).max() < 2**-6 * np.abs(expected).max()


# When the process of each phase is killed: after a training step of this number (before
# the first checkpoint, between two, after the last step), or once there is this file.
KILLED_AT = {
    "cpt": 3,
    "select": "instructions.plain.npz",
    "sft": 1,
    "dpo": NUM_STEPS,
    "evaluate": metrics.FILE,
    "export": phase.CONFIG_FILE,
}


def is_under_way(folder, moment):
    if isinstance(moment, str):
        return (folder / moment).exists()
    return any(row["step"] >= moment for row in metrics.read(folder) if "loss" in row)


@pytest.mark.long
@pytest.mark.slow
def test_killed_in_every_phase_it_ends_the_same(whole, start, tmp_path, tiny_model):
    workdir, landed = epath.Path(tmp_path) / "run", []
    for name in PHASES:
        folder = workdir / name
        kill(start(workdir), functools.partial(is_under_way, folder, KILLED_AT[name]))
        if (
            is_under_way(folder, KILLED_AT[name])
            and not (folder / phase.RESULTS_FILE).exists()
        ):
            landed.append(name)
    finish([start(workdir)])
    # A phase may come to its end before the signal arrives.
    assert len(landed) >= 4, landed

    assert_hand_over(workdir)
    for name in TRAINED:
        assert training_metrics(workdir / name) == training_metrics(whole / name)
        assert_same_bits(
            final_params(workdir / name, tiny_model),
            final_params(whole / name, tiny_model),
        )
    selected = [read_json(run / "select")["selection"] for run in (workdir, whole)]
    assert selected[0] == selected[1]
    for name in (*TRAINED, "evaluate"):
        results, expected = (read_json(run / name) for run in (workdir, whole))
        for key in MOMENTS:
            assert results[key] == expected[key]
        samples = metrics.SAMPLES_FILE
        assert (workdir / name / samples).read_text() == (
            whole / name / samples
        ).read_text()
    for file in (
        *(f"select/{source}.jsonl" for source in RANKED),
        "export/hf/model.safetensors",
    ):
        hashes = [
            hashlib.blake2b((run / file).read_bytes()).digest()
            for run in (workdir, whole)
        ]
        assert hashes[0] == hashes[1], file
    # Nothing half-written stays behind.
    assert not [*workdir.glob("*/*.tmp"), *workdir.glob("*/*.incomplete")]
    for name in TRAINED:
        kept = [path.name for path in (workdir / name / checkpoint.FOLDER).iterdir()]
        assert set(kept) == {str(NUM_STEPS - 2), str(NUM_STEPS)}


# When the process of each of these phases is killed: once there is this file.
KEEPING_KILLED_AT = {
    "generate": f"{generate.FOLDER}/00000.jsonl",
    "cpt": f"{checkpoint.FOLDER}/1",
    "merge": metrics.FILE,
}


@pytest.mark.long
@pytest.mark.slow
def test_killed_in_the_phases_that_keep_knowledge_it_ends_the_same(
    launcher, write_config_file, tmp_path, tiny_model, larger_model
):
    config = six_phases.keeping(tiny_model, larger_model)
    file = write_config_file(config)

    def start(name):
        return launcher.start(f"--config={file}", f"--workdir={tmp_path / name}")

    whole, killed = epath.Path(tmp_path) / "whole", epath.Path(tmp_path) / "killed"
    for name, moment in KEEPING_KILLED_AT.items():
        kill(start("killed"), functools.partial(is_under_way, killed / name, moment))
    finish([start("killed"), start("whole")])

    samples = [*sorted((whole / "generate" / generate.FOLDER).iterdir())]
    assert len(samples) > 1
    for path in samples:
        other = killed / path.relative_to(whole)
        assert other.read_text() == path.read_text()
    facts = read_json(whole / "cpt", phase.PROVENANCE_FILE)
    assert facts["teacher"]["identity"] == pretrained.identity(larger_model)
    assert facts["start"]["identity"] == pretrained.identity(tiny_model)
    for name in TRAINED:
        assert len(training_metrics(whole / name)) == 3
        assert training_metrics(killed / name) == training_metrics(whole / name)
    for name in ("merge", *TRAINED):
        results = [read_json(run / name) for run in (killed, whole)]
        for key in ("after", "curve") if name == "merge" else ("after",):
            assert results[0][key] == results[1][key]
        assert_same_bits(
            *(final_params(run / name, tiny_model) for run in (killed, whole))
        )
    assert read_json(whole / "merge")["share"] == 1.0
    for source in RANKED:
        texts = [
            (run / f"select/{source}.jsonl").read_text() for run in (killed, whole)
        ]
        assert texts[0] == texts[1]


@pytest.mark.long
@pytest.mark.slow
def test_adapters_go_through_all_phases(start, tmp_path, tiny_model):
    workdir = epath.Path(tmp_path) / "run"
    finish([start(workdir, "--config.lora.rank=4")])
    model_config = pretrained.read_model_config(tiny_model)
    settings = config_lib.default().lora
    lora = lora_lib.Lora(4, settings.alpha, tuple(settings.targets))
    adapters = lora_lib.abstract_adapters(model_config, lora)["layers"]
    for name in TRAINED:
        params = workdir / name / checkpoint.FOLDER / str(NUM_STEPS) / "params"
        stored = read_json(params, "_METADATA")["tree_metadata"].values()
        assert {
            "/".join(key["key"] for key in leaf["key_metadata"]) for leaf in stored
        } == {f"layers/{adapter}" for adapter in adapters}
    assert_hand_over(workdir)
    assert_each_phase_begins_at_the_end_of_the_last(workdir)

    base = safetensors.load_file(epath.Path(tiny_model) / "model.safetensors")
    folder = workdir / "export" / "hf"
    found = safetensors.load_file(folder / "model.safetensors")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        is_adapted = "_proj." in name
        as_exported = np.asarray(rounded(base[name]))
        assert (tensor.astype(np.float32) != as_exported).any() == is_adapted, name
    params = final_params(workdir / "dpo", tiny_model)
    abstract = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            p.shape,
            p.dtype,
            sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        ),
        params,
    )
    assert_same_bits(
        jax.device_get(pretrained.load_params(str(folder), abstract)),
        jax.device_get(rounded(params)),
    )
