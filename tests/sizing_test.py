"""Runs sized by their corpus and devices."""

import itertools
import json
import runpy

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core.chips import GIB
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import pretrained
from mixcpt_jax.planning import sizing, step_plan
from mixcpt_jax.runtime import sharding

MODELS = {
    name: f"package:mixcpt_jax/assets/architectures/{name}.json"
    for name in ("smollm2_135m", "llama32_1b", "llama3_8b")
}


def choose(name, num_tokens, mesh, gib, **settings):
    config = config_lib.default()
    config.data.row_length = 0
    config.update_from_flattened_dict(settings)
    architecture = pretrained.read_model_config(MODELS[name])
    return sizing.choose(config, architecture, num_tokens, mesh, gib * GIB)


@hypothesis.given(
    st.sampled_from(list(MODELS)),
    st.floats(0, 1e12),
    st.tuples(*[st.sampled_from([1, 2, 8])] * 3),
    st.floats(1, 200),
)
def test_chosen_sizes_fit_and_divide(name, num_tokens, mesh, gib):
    config, architecture = (
        config_lib.default(),
        pretrained.read_model_config(MODELS[name]),
    )
    least = step_plan.step_memory(config, architecture, mesh, 1, 256)
    if least > sizing.USABLE * gib * GIB:
        with pytest.raises(InputError, match="of one row of 256 tokens needs"):
            choose(name, num_tokens, mesh, gib)
        return
    found = choose(name, num_tokens, mesh, gib)
    assert found.memory <= gib * GIB
    assert 256 <= found.row_length <= 4096
    sharers = mesh[0] * mesh[1]
    at_once = found.batch_size // found.accumulation_steps
    assert found.batch_size == at_once * found.accumulation_steps
    assert at_once % sharers == found.eval_batch_size % sharers == 0
    tokens = found.batch_size * found.row_length
    assert tokens <= 262_144 or found.batch_size == sharers
    more = choose(name, num_tokens, mesh, 2 * gib)
    assert more.accumulation_steps <= found.accumulation_steps or (
        more.row_length > found.row_length
    )


def test_ten_times_the_corpus_takes_three_times_the_steps():
    sizes = [
        choose("smollm2_135m", n, (1, 1, 1), 1000) for n in 10.0 ** np.arange(5, 9)
    ]
    steps = [
        n / (s.batch_size * s.row_length)
        for n, s in zip(10.0 ** np.arange(5, 9), sizes, strict=True)
    ]
    assert 30 < steps[0] < 100
    assert all(1.5 < b / a < 6.4 for a, b in itertools.pairwise(steps))


def test_a_given_row_length_is_kept():
    found = choose("smollm2_135m", 1e7, (1, 1, 1), 100, **{"data.row_length": 768})
    assert found.row_length == 768
    with pytest.raises(InputError, match="one row of 768 .*set lora.rank=16"):
        choose("llama3_8b", 1e7, (1, 1, 1), 20, **{"data.row_length": 768})


@pytest.fixture
def auto(project, tiny_model, tmp_path):
    """Makes `configs/mixcpt.py:auto` on ninety texts."""
    (tmp_path / "text").mkdir()
    for i in range(90):
        words = " ".join(f"word {i * j % 97}" for j in range(60))
        (tmp_path / "text" / f"{i}.txt").write_text(f"Text {i}. {words}")

    def make():
        config = runpy.run_path(f"{project}/configs/mixcpt.py")["get_config"]("auto")
        config.model.path = tiny_model
        config.sources.domain.path = str(tmp_path / "text")
        config.mesh.data = 8  # whatever the devices of the tests
        return config

    return make


def test_a_run_is_sized_whole_and_keeps_its_sizes(auto, tmp_path, monkeypatch, capsys):
    phases = main.phase_configs(auto(), str(tmp_path / "run"))
    assert "tokens in all; estimated memory" in capsys.readouterr().err
    for phase in phases.values():
        config_lib.validate(phase, jax.device_count())
        assert phase.data.row_length == phase.eval.row_length == 256
    folder = tmp_path / "run" / "cpt"
    folder.mkdir(parents=True)
    stored = phases["cpt"].to_dict()
    stored["data"]["batch_size"], stored["eval"]["batch_size"] = 48, 24
    (folder / "config.json").write_text(json.dumps(stored))
    again = config_lib.default()
    again.update(
        model={"path": "nowhere"}, data={"batch_size": 0, "row_length": 0},
        eval={"batch_size": 0},
    )  # fmt: skip
    again.phases = ("cpt",)
    found = main.phase_configs(again, str(tmp_path / "run"))["cpt"]
    assert (found.data.batch_size, found.eval.batch_size) == (48, 24)


@pytest.mark.parametrize(
    ("num_records", "held_out"), [(2, 1), (35, 3), (639, 63), (700, 64)]
)
def test_a_tenth_of_the_records_at_most_is_held_out(
    auto, tmp_path, num_records, held_out
):
    file = tmp_path / "domain.jsonl"
    lines = [json.dumps({"text": f"Text {i} of many."}) for i in range(num_records)]
    file.write_text("\n".join(lines))

    def settings(holdout):
        config = auto()
        config.sources.domain.path = str(file)
        config.sources.domain.holdout = holdout
        return config

    found = main.phase_configs(settings(64), str(tmp_path / "run"))["cpt"]
    assert found.sources.domain.holdout == held_out
    assert found.sources.instructions.holdout == 50  # of 506
    assert found.sources.preferences.holdout == 25  # of 252
    assert found.eval.pairs.preferences.holdout == 25
    folder = tmp_path / "run" / "cpt"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(found.to_json())
    # A run that has begun keeps its holdouts, also where the source has grown.
    file.write_text("\n".join(lines * 100))
    again = main.phase_configs(settings(64), str(tmp_path / "run"))["cpt"]
    assert again.sources.domain.holdout == held_out


def test_what_has_begun_resumes_on_devices_with_less_memory(
    auto, tmp_path, monkeypatch
):
    """The same command finds each phase as it was begun; only the others change."""
    workdir = str(tmp_path / "run")
    first = main.phase_configs(auto(), workdir)
    stored = {
        name: json.loads(phase.to_json())
        for name, phase in first.items()
        if phase.job == "train"
    }
    architecture = pretrained.read_model_config(first["cpt"].model.path)
    mesh, _ = sizing._devices(first["cpt"])
    least = step_plan.step_memory(first["cpt"], architecture, mesh, 1, 256)
    found = mesh, 1.01 * least / sizing.USABLE
    monkeypatch.setattr(sizing, "_devices", lambda _: found)

    def changed():
        again = main.phase_configs(auto(), workdir)
        return [
            name
            for name, config in stored.items()
            if config_lib.first_difference(again[name], config, is_finished=True)
        ]

    expected = changed()
    assert expected
    for name, config in stored.items():
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "config.json").write_text(json.dumps(config))
        expected = [other for other in expected if other != name]
        assert changed() == expected


@pytest.mark.slow
def test_the_formula_is_not_far_below_the_compiler(tiny_config, tiny_model):
    config = tiny_config
    config.mesh.fsdp = config.mesh.data = config.mesh.tensor = 1
    config.data.batch_size, config.data.row_length = 16, 256
    config.model.remat = "full"
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    step = step_plan.compile_step(config, mesh)
    analysis = step.compiled.memory_analysis()
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    architecture = pretrained.read_model_config(tiny_model)
    found = step_plan.step_memory(config, architecture, (1, 1, 1), 16, 256)
    assert needed < found < 4 * needed
