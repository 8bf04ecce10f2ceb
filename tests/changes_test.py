"""Roles of measures, the verdict at the end of a run, and a phase's loss in words."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mixcpt_jax.reporting import changes, model_card, page
from mixcpt_jax.reporting import report as report_lib
from mixcpt_jax.reporting.run_records import Arm

SOURCES = {
    "domain": {"format": "document", "weight": 0.6, "path": "a"},
    "instructions": {"format": "instruction", "weight": 0.4, "path": "b"},
    "unused": {"format": "chat", "weight": 0.0, "path": "c"},
}
TEXTS = {"general": {"path": "d"}, "fixed": {"path": "b"}, "facts": {"path": "a"}}
ROLES = {
    "domain": "domain",
    "facts": "domain",
    "instructions": "rehearsed",
    "fixed": "rehearsed",
    "general": "untouched",
    "unused": "untouched",
}

_GENERAL_TEXT = "--config.eval.texts.general.path=FILE."


def arm(name="cpt", init_from="", seed=0, **settings):
    """An arm with ten texts of ten tokens; `settings` change their correct tokens."""
    rng = np.random.default_rng(seed)
    was = {key: rng.integers(3, 7, 10) for key in settings}
    now = {key: was[key] + change for key, change in settings.items()}

    def evaluation(step, correct):
        return {"step": step} | {
            f"{k}/accuracy": v.sum() / 100 for k, v in correct.items()
        }

    def items(correct):
        columns = {f"{k}/correct": v for k, v in correct.items()}
        return columns | {f"{k}/tokens": np.full(10, 10) for k in correct}

    config = {
        "job": "train",
        "init_from": init_from,
        "sources": SOURCES,
        "eval": {"texts": TEXTS},
    }
    before, after = evaluation(0, was), evaluation(9, now)
    results = {"before": before, "after": after, "seconds": 1.0}
    files = {0: items(was), 9: items(now)}
    return Arm(0, name, "run", name, config, results, {}, [], [], [], files)


def test_each_measure_has_its_role():
    arms = [arm(**dict.fromkeys(ROLES, 0))]
    names = changes.domain_names(arms, ())
    assert {n: changes.role(n, arms, names) for n in ROLES} == ROLES


@hypothesis.given(st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3))
def test_rehearsed_measures_do_not_enter_the_verdict(domain, general, rehearsed):
    arms = [arm(domain=domain, general=general, instructions=rehearsed)]
    [sentence] = changes.verdict(arms)
    assert ("lost: general token accuracy" in sentence) == (general < 0)
    assert ("no loss shown: general" in sentence) == (general >= 0)
    assert ("learned: " in sentence) == (domain > 0)
    *_, advice = sentence.split(" Next: ")
    assert advice == (
        "lower the learning rate, or raise the weights of general sources."
        if general < 0
        else "read its answers."
        if domain > 0
        else "train for more steps."
    )
    assert (
        f"domain token accuracy {10 * domain:+.1f} ({10 * domain:+.1f} to" in sentence
    )
    assert f"general token accuracy {10 * general:+.1f} (" in sentence
    assert "instructions" not in sentence
    assert "instructions" not in str(
        [p["caption"] for p in page._planes(arms, {"domain"})]
    )


def test_without_untouched_measures_forgetting_is_unknown():
    arms = [arm(domain=1, instructions=2)]
    [sentence] = changes.verdict(arms)
    assert "kept: unknown" in sentence
    assert "loss" not in sentence
    assert sentence.endswith("Next: measure general text, " + _GENERAL_TEXT)
    assert not list(page._planes(arms, {"domain"}))


def test_few_items_could_hide_a_loss(monkeypatch):
    """Nine questions show no loss, whatever happened."""
    arms = [arm(domain=1, general=0)]
    monkeypatch.setattr(
        changes, "interval", lambda key, start, end: ((-0.2, 0.2), changes.MATCHED)
    )
    [sentence] = changes.verdict(arms)
    assert "could hide a loss of 20 points" in sentence
    monkeypatch.setattr(
        changes, "interval", lambda key, start, end: ((-0.01, 0.2), changes.MATCHED)
    )
    [sentence] = changes.verdict(arms)
    assert "hide" not in sentence


def test_the_verdict_is_on_the_last_phase_of_a_chain():
    first = arm(domain=1, general=0)
    last = arm("sft", "phase:cpt", domain=2, general=-1)
    assert [a.name for a in changes.ends([first, last])] == ["sft"]
    beside = arm("plain", domain=2, general=-1)
    assert [a.name for a in changes.ends([first, beside])] == ["cpt", "plain"]


@pytest.mark.parametrize("suffix", ["perplexity", "accuracy", "exam"])
def test_the_table_is_sorted_domain_untouched_rehearsed(suffix):
    evaluation = {f"{name}/{suffix}": 0.5 for name in ROLES}
    results = {"cpt": {"before": evaluation, "after": evaluation}}
    lines = report_lib.comparison(results, ROLES).splitlines()[2:]
    order = [line.strip("| ").partition(":")[0].partition(", ") for line in lines]
    assert [ROLES[name] for name, _, _ in order] == sorted(
        ROLES.values(), key=changes.ROLES.index
    )
    assert all(role in ("", ROLES[name]) for name, _, role in order)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"objective": {"ntp_weight": 1.0, "lssd_weight": 0.0}},
            "next-token prediction",
        ),
        (
            {"objective": {"ntp_weight": 0.8, "lssd_weight": 0.2}, "lora": {"rank": 4}},
            "0.8 next-token prediction + 0.2 logit swap self-distillation; adapters of "
            "rank 4",
        ),
        (
            {"objective": {"kd_weight": 0.5}, "sources": {"a": {"kd_weight": 0.0}}},
            "0.5 distillation; some sources have weights of their own",
        ),
        (
            {
                "objective": {"kind": "preference", "ntp_weight": 0.8},
                "preference": {"loss": "sigmoid", "beta": 0.1},
            },
            "DPO, beta 0.1",
        ),
        ({"job": "select", "objective": {"ntp_weight": 1.0}}, "select"),
    ],
)
def test_page_and_card_have_the_same_words_for_a_loss(config, words):
    sizes = {
        "data": {"batch_size": 4, "row_length": 64},
        "optimizer": {"learning_rate": 1e-3},
        "train": {"num_steps": 2},
    }
    said = dataclasses.replace(arm(), config={"job": "train"} | config | sizes)
    assert page._work(said)["objective"] == words
    if said.trains:
        assert f" {words} " in model_card.render([said], "", {}, "")
