"""A bad config is named before anything is loaded."""

import functools
import importlib.util
import itertools
import json
import re

import ml_collections
import pytest

from mixcpt_jax import config as config_lib
from mixcpt_jax.config import defaults
from mixcpt_jax.core.errors import InputError


def valid():
    config = config_lib.default()
    config.model.path = "somewhere"
    config.sources.domain = config_lib.source(path="a.jsonl")
    return config


def test_a_good_config_passes():
    config = valid()
    config.eval.texts.facts = config_lib.source(path="b.jsonl", format="cloze")
    config_lib.validate(config, num_devices=8)


BAD = [
    ("train.num_stepz", 3, "train.num_stepz: unknown key; did you mean num_steps?"),
    (
        "data.batch_size",
        "eight",
        "data.batch_size='eight': must be an integer, not str, such as 8",
    ),
    (
        "data.batch_size",
        True,
        "data.batch_size=True: must be an integer, not bool, such as 8",
    ),
    ("data.batch_size", 0, "data.batch_size=0: must be > 0; only phases that train"),
    ("optimizer.learning_rate", -1.0, "optimizer.learning_rate=-1.0: must be > 0"),
    ("optimizer.epsilon", 0.0, "optimizer.epsilon=0.0: must be > 0"),
    ("optimizer.decay_fraction", -0.5, "optimizer.decay_fraction=-0.5: must be > 0"),
    ("seed", -1, "seed=-1: must be >= 0"),
    (
        "optimizer.schedule",
        "linear",
        "optimizer.schedule='linear': must be one of cosine",
    ),
    (
        "optimizer.warmup_steps",
        1000,
        "warmup_steps=1000: must be less than train.num_steps",
    ),
    ("optimizer.accumulation_steps", 3, "accumulation_steps=3 does not divide.*=8"),
    ("data.batch_size", 12, "12 rows do not divide.*1 x 8; use a multiple of 8"),
    ("eval.batch_size", 6, "eval.batch_size = 6 rows do not divide"),
    ("mesh.tensor", 3, "mesh:.*does not lay out 8 devices"),
    ("model.path", "", "^model.path: no path.* add --config.model.path=...$"),
    (
        "model.remat",
        "some",
        "model.remat='some': must be one of full, none, dots, offload",
    ),
    ("model.weights", "new", "model.weights='new': must be one of pretrained, random"),
    ("sources.domain.path", "", "^sources.domain.path: no path is given"),
    ("sources.domain.weight", 0.0, "sources: none has a weight above 0"),
    (
        "sources.domain.format",
        "poem",
        "sources.domain.format='poem': must be one of document",
    ),
    ("sources.domain.lssd_weight", -0.2, "lssd_weight=-0.2: must be None, or >= 0"),
    ("sources.domain.lssd_weight", "1", "sources.domain.lssd_weight='1'.*number"),
    ("sources.domain.selective_weight", -0.5, "selective_weight=-0.5: must be None"),
    ("objective.selective_weight", -0.5, "selective_weight=-0.5: must be >= 0"),
    ("sources.domain.holdout", -1, "sources.domain.holdout=-1: must be >= 0"),
    ("optimizer.beta1", 1.5, "optimizer.beta1=1.5: must be >= 0 and < 1"),
    ("optimizer.spike_factor", 0.5, "spike_factor=0.5: must be 0, or > 1 and <= 1e"),
    (
        "optimizer.spike_factor",
        5.0,
        "spike_factor=5.0: .*train.max_skipped, which is 0",
    ),
    ("head.block_size", 48, "block_size=48: must be a multiple of.*chunk_size, .* 0;"),
    (
        "data.batch_size",
        2**20,
        r"data.batch_size=1048576: .* 2,048 tokens .* must be <= 67,108,864: lower",
    ),
    ("sources.domain", 3, "sources.domain=3: must be a section of keys"),
    ("train.timeout", -1.0, "train.timeout=-1.0: must be >= 0"),
    ("job", "learn", "job='learn': must be one of train, generate, merge, select, "),
    (
        "objective.kind",
        "dpo",
        "objective.kind='dpo': must be one of tokens, preference",
    ),
    ("objective.kind", "preference", "format='document' does not go with objective.ki"),
    ("sources.domain.format", "chat_preference", "does not go with.*kind='tokens'"),
    (
        "sources.domain.on_bad_record",
        "drop",
        "on_bad_record='drop': must be one of by_kind, refuse, skip",
    ),
    (
        "data.overlong",
        "cut",
        "data.overlong='cut': must be one of split, truncate, drop",
    ),
    (
        "preference.label_smoothing",
        0.5,
        "preference.label_smoothing=0.5: must be >= 0 and < 0.5",
    ),
    (
        "lora.targets",
        ["query", "bias"],
        "lora.targets=query,bias: must be some of query",
    ),
    ("select.origin_share", 0.0, "select.origin_share=0.0: must be > 0 and"),
    ("select.origin_share", 1.5, "select.origin_share=1.5: must be > 0 and <= 1"),
    ("select.keep", {"other": 3}, "select.keep.other: no such source; known: domain"),
    ("select.keep", {"domain": 0}, "select.keep.domain=0: must be >= 1 and"),
    (
        "select.keep",
        {"domain": 3},
        "sources.domain.format='document': must be instruction",
    ),
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


OF_NO_NUMBER = [float("nan"), float("inf"), -float("inf"), 2**63, -(2**63), "1", True]


def test_every_number_has_bounds_and_a_default_within():
    for key, setting in flat(defaults.bounded_config()):
        value = getattr(setting, "default", setting)
        assert isinstance(value, str | bool | tuple) or setting.holds(value), key
        if not isinstance(value, str | bool | tuple):
            assert {"<", ">"} <= set(setting.allowed), key


def test_no_number_of_a_shipped_config_takes_another_value(project, monkeypatch):
    """None takes a value out of bounds or of another type, in any phase."""
    configs = shipped_configs(project, monkeypatch)
    of_one_slice = [name for name in configs if ":v" not in name or "llama3_8b" in name]
    assert len(of_one_slice) > 20
    for config in map(configs.get, of_one_slice):
        values = itertools.cycle([*OF_NO_NUMBER, None])
        seen = set()  # most settings are the same in all phases
        for phase in config.phases or [""]:
            one = config_lib.for_phase(config, phase) if phase else config
            config_lib.check_values(one)
            for key, held in [*flat(one)]:
                if (key, held) in seen:
                    continue
                seen.add((key, held))
                value = next(values)
                is_optional = re.search(
                    r"\.(sources|texts|pairs)\..*_weight$", f".{key}"
                )
                if isinstance(held, str | bool | tuple) or (is_optional and not value):
                    continue
                refuses(one, key, value)


def refuses(config, key, value):
    """Checks that the key refuses the value; the config is unchanged afterwards."""
    *sections, last = key.split(".")
    section = functools.reduce(ml_collections.ConfigDict.__getitem__, sections, config)
    held = section[last]
    with section.unlocked(), section.ignore_type():
        del section[last]
        section[last] = value
        with pytest.raises(InputError, match=re.escape(f"{key}={value!r}: must be ")):
            config_lib.check_values(config)
        del section[last]
        section[last] = held


@pytest.mark.parametrize("value", OF_NO_NUMBER)
def test_no_number_takes_it(value):
    config = valid()
    config.eval.texts.one = config_lib.source(path="b.jsonl")
    config.eval.exams.two = config_lib.exam(path="c.jsonl")
    numbers = [k for k, v in flat(config) if not isinstance(v, str | bool | tuple)]
    assert {"sources.domain.kd_weight", "eval.texts.one.holdout", "mesh.data"} <= set(
        numbers
    )
    for key in numbers:
        refuses(config, key, value)


def test_a_section_that_is_missing_is_named():
    with pytest.raises(InputError, match="^clean: is missing; begin the config with"):
        config_lib.validate(ml_collections.ConfigDict({"job": "train"}))


def flat(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize(
    ("key", "package"),
    [("wandb_project", "wandb"), ("goodput_job", "ml-goodput-measurement")],
)
def test_the_package_of_a_setting_must_be_installed(monkeypatch, key, package):
    config = valid()
    config.metrics[key] = "mine"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"metrics\.{key}.*pip install {package}"):
        config_lib.validate(config)


def test_a_source_with_an_unknown_setting():
    with pytest.raises(InputError, match=r"source\(weights=...\): unknown.*weight"):
        config_lib.source(weights=1.0)


@pytest.mark.parametrize(
    "name", ["a/b", "/a", "", "a\nb", "a\0b", "\u202ea", "a" * 256]
)
def test_names_become_files_of_the_run(name):
    """So they are names: no paths, and nothing that a terminal obeys."""
    sections = {
        "sources": lambda config: config.sources,
        "eval.texts": lambda config: config.eval.texts,
        "eval.exams": lambda config: config.eval.exams,
    }
    for place, section in sections.items():
        section(config := valid())[name] = config_lib.source(path="b.jsonl")
        with pytest.raises(InputError, match=f"^{place}: .* must be a name: printable"):
            config_lib.validate(config)
    config = valid()
    config.phases = ("cpt", name)
    with pytest.raises(InputError, match="^phases: .* must be a name: printable"):
        config_lib.for_phase(config, "cpt")


def test_an_exam_needs_a_path():
    config = valid()
    config.eval.exams.quiz = config_lib.exam()
    with pytest.raises(InputError, match="eval.exams.quiz: has no path"):
        config_lib.validate(config)


def test_a_phase_overrides_only_what_exists():
    config = valid()
    config.phases = ("later",)
    config.overrides.later = ml_collections.ConfigDict({"train": {"num_steps": 7}})
    merged = config_lib.for_phase(config, "later")
    assert merged.train.num_steps == 7
    assert config.train.num_steps == 1000
    config.overrides.later.train.steps = 3
    with pytest.raises(
        InputError, match="overrides.later.train.steps: unknown key; did"
    ):
        config_lib.for_phase(config, "later")


def test_overrides_of_a_phase_that_does_not_exist():
    config = valid()
    config.phases = ("first",)
    config.overrides.frist = ml_collections.ConfigDict({"seed": 1})
    with pytest.raises(InputError, match="overrides.frist: no such phase"):
        config_lib.for_phase(config, "first")


def test_a_source_needs_an_objective():
    config = valid()
    config.sources.domain.update(ntp_weight=0.0, lssd_weight=0.0)
    with pytest.raises(InputError, match="sources.domain: objective weights.*above 0"):
        config_lib.validate(config)


def test_sources_inherit_objectives():
    config = valid()
    config.sources.domain.ntp_weight = 0.25
    weights = config_lib.objective_weights(config, "domain")
    others = dict.fromkeys(config_lib.OBJECTIVES, 0.0)
    assert weights == others | {"ntp": 0.25, "lssd": config.objective.lssd_weight}


def test_settings_that_may_change_between_runs_of_a_workdir():
    stored = json.loads(valid().to_json())
    config = valid()
    config.train.log_every, config.mesh.tensor = 5, 2
    assert config_lib.first_difference(config, stored) is None
    config.optimizer.learning_rate = 0.5
    key, then, now = config_lib.first_difference(config, stored)
    assert (key, then, now) == ("optimizer.learning_rate", 1e-5, 0.5)


def test_a_removed_setting_of_an_exam_has_no_effect():
    config = valid()
    config.eval.exams.quiz = config_lib.exam(path="quiz.jsonl")
    stored = json.loads(config.to_json())
    stored["eval"]["exams"]["quiz"]["source"] = ""
    assert config_lib.first_difference(config, stored) is None


@pytest.mark.parametrize(
    ("key", "value", "is_free"),
    [
        ("select.min_tokens", 1, True),
        ("select.min_tokens", 2, False),
        ("objective.anneal", "none", True),
        ("objective.teacher_temperature", 1.0, True),
        ("objective.anneal", "to_ntp", False),
        ("objective.of_another_version", 3, False),
        ("another_section.key", 3, False),
    ],
)
def test_a_removed_setting_differs_only_if_it_had_an_effect(key, value, is_free):
    config = valid()
    config.job = "select" if key.startswith("select") else "train"
    stored = json.loads(config.to_json())
    section, name = key.split(".")
    stored.setdefault(section, {})[name] = value
    difference = config_lib.first_difference(config, stored)
    if is_free:
        assert difference is None
    else:
        assert difference[:2] == (key, value)


def preference_config():
    config = valid()
    config.sources.domain.format = "chat_preference"
    config.objective.kind = "preference"
    config.data.overlong = "drop"
    return config


def test_pairs_are_for_preferences_and_are_never_split():
    config_lib.validate(preference_config(), 8)
    config = preference_config()
    config.data.overlong = "split"
    with pytest.raises(InputError, match="a pair cannot be split; use truncate"):
        config_lib.validate(config, 8)
    config = preference_config()
    config.preference.loss, config.preference.label_smoothing = "ipo", 0.1
    with pytest.raises(InputError, match="preference.loss=ipo has none"):
        config_lib.validate(config, 8)
    config = valid()
    config.eval.pairs.some = config_lib.source(path="b.jsonl", format="document")
    with pytest.raises(
        InputError, match=r"eval.pairs.some.format='document': must be chat_"
    ):
        config_lib.validate(config, 8)


def test_phase_paths_lie_under_the_run():
    config = valid()
    config.init_from = "phase:cpt"
    config.sources.domain.path = "phase:select/a.jsonl,/data/b.jsonl"
    resolved = config_lib.resolve_phases(config, "/runs/mine")
    assert resolved.init_from == "/runs/mine/cpt"
    assert resolved.sources.domain.path == "/runs/mine/select/a.jsonl,/data/b.jsonl"
    assert config.init_from == "phase:cpt"


def load_config_file(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped_configs(project, monkeypatch):
    """Name -> config, of every file in `configs/` and each of its variants."""
    asked, check = [], config_lib.check_variant

    def note(variant, known):
        asked.append(known)
        check(variant, known)

    monkeypatch.setattr(config_lib, "check_variant", note)
    configs = {}
    for file in sorted((project / "configs").glob("*.py")):
        module = load_config_file(file)
        if not hasattr(module, "get_config") or file.stem == "presets":
            continue
        asked.clear()
        configs[file.stem] = module.get_config()
        # Arms that the paper compares have other objectives.
        if file.stem == "paper":
            continue
        # The first call is the preset's, the second that of the config it builds on.
        for variant in asked[0] if asked else ():
            configs[f"{file.stem}:{variant}"] = module.get_config(variant)
    return configs


def mixtures(configs):
    """(config, phase), objective weights of each source, of phases with several sources."""
    for name, config in configs.items():
        for phase in config.phases or [""]:
            one = config_lib.for_phase(config, phase) if phase else config
            trained = [n for n, entry in one.sources.items() if entry.weight]
            # Replay has an objective of its own.
            trained = [n for n in trained if n != "replay"]
            if one.job == "train" and len(trained) > 1:
                yield (
                    (name, phase),
                    [config_lib.objective_weights(one, source) for source in trained],
                )


def test_every_mixture_has_the_default_objective(project, monkeypatch):
    default = {"ntp": 0.8, "lssd": 0.2, "kd": 0.0, "selective": 0.0}
    found = dict(mixtures(shipped_configs(project, monkeypatch)))
    assert {("cpt", ""), ("mixcpt", "cpt"), ("quickstart", "mixcpt")} <= found.keys()
    assert {("cpt:tiny", ""), ("mixcpt:laptop", "cpt"), ("llama3_8b:v5e-64", "")} <= (
        found.keys()
    )
    assert found == {place: [default] * len(w) for place, w in found.items()}


def test_every_mixture_measures_texts_that_no_phase_trains_on(project, monkeypatch):
    configs = shipped_configs(project, monkeypatch)
    for (name, phase), _ in mixtures(configs):
        config = configs[name]
        one = config_lib.for_phase(config, phase) if phase else config
        trained = {entry.path for entry in one.sources.values() if entry.weight}
        measured = [*one.eval.texts.values(), *one.eval.exams.values()]
        untouched = [entry for entry in measured if entry.path not in trained]
        assert len(untouched) == len(measured) == 2, (name, phase)
        assert one.eval.max_tokens > 0


@pytest.mark.parametrize("variant", ["", "tiny"])
def test_the_arms_of_the_quickstart_differ_in_the_mixture_alone(project, variant):
    """As many rows of the domain a step, and `mixcpt`, which a chat finds, comes last."""
    config = load_config_file(project / "configs/quickstart.py").get_config(variant)
    assert config.phases == ("plain_cpt", "mixcpt")
    plain, mixed = (config_lib.for_phase(config, name) for name in config.phases)
    settings = [one.to_dict() for one in (plain, mixed)]
    rows = []
    for one in settings:
        weights = {name: entry.pop("weight") for name, entry in one["sources"].items()}
        share = weights["domain"] / sum(weights.values())
        rows.append(one["data"].pop("batch_size") * share)
        del one["objective"], one["train"]["eval_before"]
    assert rows[0] == pytest.approx(rows[1])
    assert settings[0] == settings[1]
    assert (plain.train.eval_before, mixed.train.eval_before) == (True, False)
    assert config_lib.objective_weights(plain, "domain")["ntp"] == 1.0


@pytest.mark.parametrize("num_steps", [1, 30])
def test_a_shipped_config_suits_a_phase_of_any_length(project, monkeypatch, num_steps):
    for config in shipped_configs(project, monkeypatch).values():
        config.model.path = "somewhere"
        # A batch size of 0 is resolved by `sizing`.
        config.data.batch_size = config.data.batch_size or 4
        for entry in config.sources.values():
            entry.path = entry.path or "somewhere"
        for phase in config.phases or [""]:
            one = config_lib.for_phase(config, phase) if phase else config
            one.train.num_steps = num_steps
            one.data.batch_size = one.data.batch_size or 4
            one.data.row_length = one.data.row_length or 64
            one.eval.batch_size = one.eval.batch_size or 4
            config_lib.validate(one)
            config_lib.check_schedule(one, num_steps)


def test_no_config_repeats_the_default_objective(project, monkeypatch):
    """With another default, every mixture has the other default."""
    default, other = config_lib.default, {"ntp_weight": 0.625, "lssd_weight": 0.375}

    def changed():
        config = default()
        config.objective.update(other)
        return config

    monkeypatch.setattr(config_lib, "default", changed)
    for place, sources in mixtures(shipped_configs(project, monkeypatch)):
        for weights in sources:
            assert (weights["ntp"], weights["lssd"]) == (0.625, 0.375), place


def test_a_folder_of_an_earlier_default_keeps_its_objective():
    """A stored config holds every weight, so a new default changes no stored run."""
    stored = json.loads(valid().to_json())
    assert config_lib.first_difference(valid(), stored) is None
    stored["objective"].update(ntp_weight=0.0, lssd_weight=1.0)
    difference = config_lib.first_difference(valid(), stored)
    assert difference == ("objective.lssd_weight", 1.0, 0.2)
    config = valid()
    config.objective.ntp_weight, config.objective.lssd_weight = 0.0, 1.0
    assert config_lib.first_difference(config, stored) is None


@pytest.mark.parametrize("name", ["mixcpt", "sft", "dpo", "cpt", "quickstart"])
def test_the_configs_of_the_project_are_valid(name, project):
    config = load_config_file(project / f"configs/{name}.py").get_config()
    config.model.path = "somewhere"
    for source in config.sources.values():
        source.path = source.path or "a.jsonl"
    for phase in config.phases or [None]:
        one = config_lib.for_phase(config, phase) if phase else config
        config_lib.validate(one)


def test_keys_that_follow_a_source_in_the_config_of_all_phases(project):
    config = load_config_file(project / "configs/mixcpt.py").get_config("tiny")
    config.sources.preferences.path = "mine.jsonl"
    config.sources.preferences.fields.chosen = "good"
    config.select.keep.preferences = 7
    dpo = config_lib.for_phase(config, "dpo")
    assert dpo.eval.pairs.preferences.path == "mine.jsonl"
    assert dpo.eval.pairs.preferences.holdout == dpo.sources.preferences.holdout
    assert dpo.sources.dpo.max_records == 7
    assert dpo.sources.dpo.fields.chosen == "good"
    assert json.loads(dpo.to_json())["sources"]["dpo"]["max_records"] == 7


def test_a_source_and_a_measured_text_cannot_be_the_same_files():
    config = valid()
    config.eval.texts.same = config_lib.source(path="a.jsonl")
    with pytest.raises(
        InputError, match="eval.texts.same: measures all records of the files"
    ):
        config_lib.validate(config, 8)
    config.eval.texts.same.holdout = config.sources.domain.holdout = 5
    config_lib.validate(config, 8)


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_from", "phase:b"), ("init_from", "phase:d"), ("eval.prompts", "phase:d/x")],
)
def test_a_missing_phase_is_named(key, value):
    config = valid()
    config.phases = ("a", "b")
    config.overrides.b = (
        {key: value} if "." not in key else {"eval": {"prompts": value}}
    )
    config_lib.for_phase(config, "a")
    with pytest.raises(InputError, match=f"{key}='{value}'.*there is no phase"):
        config_lib.for_phase(config, "b")


def test_only_settings_that_a_job_reads_bind_its_folder():
    config = valid()
    config.sources.later = config_lib.source(path="phase:x/b.jsonl", weight=0.0)
    stored = json.loads(config.to_json())
    config.select.origin_share = 0.5
    config.preference.beta = 0.3
    config.export.dtype = "float32"
    config.sources.later.max_records = 3
    assert config_lib.first_difference(config, stored) is None
    config.sources.later.weight = 1.0
    assert config_lib.first_difference(config, stored)[0].startswith("sources.later.")
    config.sources.later.weight = 0.0
    config.objective.kind = "preference"
    stored["objective"]["kind"] = "preference"
    assert config_lib.first_difference(config, stored) == ("preference.beta", 0.1, 0.3)
    config.job = stored["job"] = "select"
    assert config_lib.first_difference(config, stored)[0] == "select.origin_share"
