"""Weights between start and end: exact at both ends, and chosen by budget."""

import json
import pathlib

import jax
import numpy as np
import pytest

from mixcpt_jax import main
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.jobs import merge
from mixcpt_jax.models import pretrained
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import phase

ASSETS = "package:mixcpt_jax/assets"


@pytest.fixture
def config(tiny_config):
    config = tiny_config
    config.sources.domain.holdout = 2
    config.train.num_steps = 2
    config.train.eval_before = False
    config.phases = ("cpt", "merge")
    config.overrides.merge = {
        "job": "merge",
        "init_from": "phase:cpt",
        "merge": {"keep": {"instructions/loss": 0.0}},
    }
    return config


def params_at(folder, config, share=1.0, dtype="float32"):
    model_config = pretrained.read_model_config(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        params = phase.load_params(
            str(folder), model_config, mesh, dtype, config.model.path, share
        )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def start_of(config):
    model_config = pretrained.read_model_config(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    params = pretrained.load_params(
        config.model.path, phase.abstract_params(model_config, mesh, "float32")
    )
    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_ends_are_bit_equal_and_between_is_the_line(config, tmp_path, rank):
    config.lora.rank = rank
    config.optimizer.learning_rate = 3e-2
    config.overrides.merge.merge = {"shares": (0.0, 0.25, 1.0), "keep": {}}
    _, results = main.run(config, str(tmp_path))
    start, end = start_of(config), params_at(tmp_path / "cpt", config)
    assert any(np.any(a != b) for a, b in zip(start, end))
    for share, ends in ((0.0, start), (1.0, end)):
        for leaf, expected in zip(params_at(tmp_path / "cpt", config, share), ends):
            assert leaf.tobytes() == expected.tobytes()
    for leaf, a, b in zip(params_at(tmp_path / "cpt", config, 0.25), start, end):
        line = a.astype(float) + 0.25 * (b.astype(float) - a)
        np.testing.assert_allclose(leaf, line, rtol=1e-6, atol=1e-7)
    # What is saved is read as whole weights, whatever was trained.
    for leaf, expected in zip(params_at(tmp_path / "merge", config), end):
        assert leaf.tobytes() == expected.tobytes()
    curve = results["merge"]["curve"]
    assert [row["share"] for row in curve] == [0.0, 0.25, 1.0]
    assert results["merge"]["share"] == 1.0
    at_end = results["cpt"]["after"]["instructions/loss"]
    assert curve[-1]["instructions/loss"] == pytest.approx(at_end, abs=1e-6)


@pytest.mark.slow
def test_a_killed_merge_measures_only_what_is_left(config, tmp_path, monkeypatch):
    _, whole = main.run(config, str(tmp_path / "whole"))
    folder = tmp_path / "killed"
    config.phases = ("cpt",)
    del config.overrides["merge"]
    main.run(config, str(folder))
    config.phases = ("cpt", "merge")
    config.overrides.merge = {
        "job": "merge",
        "init_from": "phase:cpt",
        "merge": {"keep": {"instructions/loss": 0.0}},
    }
    asked = []
    load = phase.load_params

    def load_until_killed(*args):
        asked.append(args[-1])
        if len(asked) == 3:
            raise KeyboardInterrupt
        return load(*args)

    monkeypatch.setattr(phase, "load_params", load_until_killed)
    with pytest.raises(KeyboardInterrupt):
        main.run(config, str(folder))
    _, resumed = main.run(config, str(folder))
    assert asked[:3] == [0.0, 0.25, 0.5]
    assert asked[3] == 0.5
    for key in ("curve", "share", "after", "before"):
        assert resumed["merge"][key] == whole["merge"][key]
    files = [tmp_path / run / "merge" / "metrics.jsonl" for run in ("whole", "killed")]
    assert files[0].read_text() == files[1].read_text()
    for one, other in zip(
        params_at(tmp_path / "whole/merge", config), params_at(folder / "merge", config)
    ):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("keep", "chosen"),
    [
        ({}, 3),
        ({"general/loss": 0.0}, 0),
        ({"general/loss": 0.1}, 1),
        ({"general/loss": 0.1, "exam/exam": 0.0}, 0),
        ({"exam/exam": 0.05}, 2),
        ({"general/loss": 9.0, "exam/exam": 9.0}, 3),
    ],
)
def test_the_largest_share_within_all_budgets_is_chosen(keep, chosen):
    losses, exams = (2.0, 2.05, 2.2, 2.5), (0.5, 0.46, 0.45, 0.3)
    curve = [
        {"general/loss": loss, "exam/exam": exam} for loss, exam in zip(losses, exams)
    ]
    assert merge.choose(curve, keep) == chosen


def test_a_curve_that_comes_back_is_within_its_budget():
    curve = [{"general/loss": loss} for loss in (2.0, 2.3, 1.9)]
    assert merge.choose(curve, {"general/loss": 0.0}) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shares": (0.5, 1.2)}, "from 0 to 1"),
        ({"shares": (-0.1,)}, "from 0 to 1"),
        ({"shares": (float("nan"),)}, "from 0 to 1"),
        ({"shares": ("half",)}, "merge.shares"),
        ({"shares": ()}, "merge.shares"),
        ({"shares": (0.5, 0.5)}, "different numbers"),
        ({"keep": {"generl/loss": 0.1}}, "'generl/loss' is not measured; measures are"),
        ({"keep": {"instructions/losses": 0.1}}, "is not measured"),
        ({"keep": {"instructions/loss": -0.1}}, "must be >= 0 and"),
        ({"keep": {"instructions/loss": float("nan")}}, "must be a finite number"),
        ({"keep": {"instructions/loss": "little"}}, "must be a number, not str"),
    ],
)
def test_bad_settings_are_a_line_before_anything_is_loaded(
    config, tmp_path, settings, message
):
    config.overrides.merge.merge = settings
    with pytest.raises(InputError, match=message):
        main.run(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_merge_of_no_phase_is_refused(config, tmp_path):
    config.overrides.merge.init_from = ""
    with pytest.raises(InputError, match="init_from: is empty"):
        main.run(config, str(tmp_path / "run"))


def test_later_phases_start_from_the_merge(config, tmp_path):
    config.overrides.merge.merge = {"shares": (0.5,), "keep": {}}
    config.phases = ("cpt", "merge", "export")
    config.export.dtype = "float32"
    config.overrides.export = {"job": "export", "init_from": "phase:merge"}
    main.run(config, str(tmp_path))
    exported = json.loads((tmp_path / "export" / "results.json").read_text())["folder"]
    model_config = pretrained.read_model_config(exported)
    mesh = sharding.make_mesh(config.mesh)
    got = pretrained.load_params(
        exported, phase.abstract_params(model_config, mesh, "float32")
    )
    expected = params_at(tmp_path / "cpt", config, 0.5)
    for leaf, other in zip(jax.tree.leaves(got), expected):
        assert np.asarray(leaf).tobytes() == other.tobytes()


@pytest.mark.slow
def test_the_exported_merge_is_what_torch_interpolates(config, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    config.overrides.merge.merge = {"shares": (0.3,), "keep": {}}
    config.phases = ("cpt", "merge", "export", "end")
    config.export.dtype = "float32"
    config.overrides.export = {"job": "export", "init_from": "phase:merge"}
    config.overrides.end = {"job": "export", "init_from": "phase:cpt"}
    main.run(config, str(tmp_path))
    start = load_file(pathlib.Path(config.model.path) / "model.safetensors")
    end = load_file(tmp_path / "end/hf/model.safetensors")
    merged = load_file(tmp_path / "export/hf/model.safetensors")
    assert merged.keys() == end.keys()
    for name, tensor in merged.items():
        line = torch.lerp(start[name].float(), end[name], 0.3)
        torch.testing.assert_close(tensor, line, rtol=1e-6, atol=1e-7)
