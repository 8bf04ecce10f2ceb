"""A bad config is named before anything is loaded."""

import json

import ml_collections
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax.errors import InputError


def valid():
    config = config_lib.default()
    config.model.path = "somewhere"
    config.sources.domain = config_lib.source(path="a.jsonl")
    return config


def test_a_good_config_passes():
    config_lib.validate(valid(), num_devices=8)


BAD = [
    ("train.num_stepz", 3, "train.num_stepz: unknown key.*num_steps"),
    ("data.batch_size", "eight", "data.batch_size='eight': int is wanted, found str"),
    ("data.batch_size", True, "data.batch_size=True: int is wanted, found bool"),
    ("data.batch_size", 0, "data.batch_size=0: a number above 0"),
    ("optimizer.learning_rate", -1.0, "optimizer.learning_rate=-1.0: a number above 0"),
    ("optimizer.schedule", "linear", "optimizer.schedule='linear': one of cosine"),
    ("optimizer.warmup_steps", 1000, "warmup_steps=1000: less than train.num_steps"),
    ("optimizer.accumulation_steps", 3, "accumulation_steps=3 does not divide.*=8"),
    ("data.batch_size", 12, "12 rows do not divide.*1 x 8; use a multiple of 8"),
    ("eval.batch_size", 6, "eval.batch_size = 6 rows do not divide"),
    ("mesh.tensor", 3, "mesh:.*does not lay out 8 devices"),
    ("model.path", "", "model.path='': a folder or a GGUF file"),
    ("model.remat", "some", "model.remat='some': one of none, dots, full"),
    ("sources.domain.path", "", "sources.domain.path='': a path"),
    ("sources.domain.weight", 0.0, "sources: none has a weight above 0"),
    ("sources.domain.format", "poem", "sources.domain.format='poem': one of document"),
    ("sources.domain.lssd_weight", 0.0, "sources.domain: objective weights"),
    ("sources.domain.lssd_weight", "1", "sources.domain.lssd_weight='1'.*number"),
    ("sources.domain.holdout", -1, "sources.domain.holdout=-1: 0 or more"),
    ("optimizer.beta1", 1.5, "optimizer.beta1=1.5: 0 to below 1"),
    ("train.keep_best", 1, "train.keep_best=1: needs train.save_every"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_the_key_the_value_and_the_remedy_are_named(key, value, message):
    config = json.loads(valid().to_json())
    *sections, last = key.split(".")
    section = config
    for name in sections:
        section = section[name]
    section[last] = value
    config["phases"] = ()
    with pytest.raises(InputError, match=message) as caught:
        config_lib.validate(ml_collections.ConfigDict(config), 8)
    assert "\n" not in str(caught.value)


def test_a_source_with_an_unknown_setting():
    with pytest.raises(InputError, match=r"source\(weights=...\): unknown.*weight"):
        config_lib.source(weights=1.0)


def test_an_exam_needs_exactly_one_origin():
    config = valid()
    config.eval.exams.quiz = config_lib.exam()
    with pytest.raises(InputError, match="eval.exams.quiz: give either path or source"):
        config_lib.validate(config)


def test_a_phase_overrides_only_what_exists():
    config = valid()
    config.phases = ("later",)
    config.overrides.later = ml_collections.ConfigDict({"train": {"num_steps": 7}})
    merged = config_lib.for_phase(config, "later")
    assert merged.train.num_steps == 7
    assert config.train.num_steps == 1000
    config.overrides.later.train.steps = 3
    with pytest.raises(InputError, match="overrides.later.train.steps: unknown key"):
        config_lib.for_phase(config, "later")


def test_overrides_of_a_phase_that_does_not_exist():
    config = valid()
    config.phases = ("first",)
    config.overrides.frist = ml_collections.ConfigDict({"seed": 1})
    with pytest.raises(InputError, match="overrides.frist: no such phase"):
        config_lib.for_phase(config, "first")


def test_sources_inherit_objectives():
    config = valid()
    config.sources.domain.ntp_weight = 0.25
    weights = config_lib.objective_weights(config, "domain")
    assert weights == {"ntp": 0.25, "lssd": 1.0, "kd": 0.0}


def test_what_may_change_between_runs_of_a_workdir():
    stored = json.loads(valid().to_json())
    config = valid()
    config.train.log_every, config.mesh.tensor = 5, 2
    assert config_lib.first_difference(config, stored) is None
    config.optimizer.learning_rate = 0.5
    key, then, now = config_lib.first_difference(config, stored)
    assert (key, then, now) == ("optimizer.learning_rate", 1e-5, 0.5)
