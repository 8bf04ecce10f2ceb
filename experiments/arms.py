"""The arms of the studies: objectives and the texts that they train on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from mixcpt_jax import config as config_lib

NTP = {"ntp": 1.0}
BUDGET = 0.15  # of the arms with a budget
EVALUATIONS = 8  # of the arms with a budget, after the start
# The path of a source that the phase "generate" writes.
GENERATED = "phase:generate/generated"
# General text of an arm -> its sources: (name, file, format, part of the text).
SOURCES = {
    "questions": (
        ("instructions", "instructions.jsonl", "instruction", 0.6),
        ("preferences", "preferences.jsonl", "preference", 0.4),
    ),
    "documents": (("replay", "rehearsed_documents.jsonl", "document", 1.0),),
    "samples": (("samples", GENERATED, "document", 1.0),),
    "comprehension": (("comprehension", GENERATED, "document", 1.0),),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """An objective and the texts that it trains on.

    Attributes:
      label: for tables.
      domain: objective weights on domain documents.
      general: objective weights on the general text; None: there is none.
      text: what the general text is: "questions" and answers, and preference pairs;
        "documents"; "samples" of the start; or "comprehension", the documents of the
        domain with questions and answers that rules make of them.
      share: of the domain in the tokens, if there is general text.
      lora_rank: of adapters; 0: all weights are trained.
      rate_scale: multiplies the learning rates of the sweep.
      token_weighting: the factor on next-token prediction at each token.
      is_merged: weights between the start and the end are measured too.
      budget: training stops before the KL from the start on held-out general text exceeds
        it, in nats per token; 0: no budget.
      has_longer_teacher: the teacher is the start after more training on general text.
    """

    label: str
    domain: dict[str, float]
    general: dict[str, float] | None = None
    text: str = "questions"
    share: float = 0.5
    lora_rank: int = 0
    rate_scale: float = 1.0
    token_weighting: str = "none"
    is_merged: bool = False
    budget: float = 0.0
    has_longer_teacher: bool = False

    @property
    def domain_share(self) -> float:
        """The share of the domain in the tokens; 1 without general text."""
        return 1.0 if self.general is None else self.share


def _everywhere(label: str, **weights: float) -> Arm:
    return Arm(label, weights, weights)


ARMS = {
    "plain": Arm("domain documents, NTP (plain CPT)", NTP),
    "mixture_ntp": _everywhere("mixture, NTP", ntp=1.0),
    "mixture_lssd": _everywhere("mixture, LSSD", lssd=1.0),
    # MFT's target (1 - m) p + m e_y, m = 0.8 and 0.5; the latter is also next-token
    # prediction and vanilla distillation half and half.
    "mixture_mft80": _everywhere("mixture, 0.8 NTP + 0.2 KD (MFT)", ntp=0.8, kd=0.2),
    "mixture_mft50": _everywhere(
        "mixture, 0.5 NTP + 0.5 KD (vanilla KD, MFT)", ntp=0.5, kd=0.5
    ),
    "mixture_lssd20": _everywhere("mixture, 0.8 NTP + 0.2 LSSD", ntp=0.8, lssd=0.2),
    "mixture_lssd50": _everywhere("mixture, 0.5 NTP + 0.5 LSSD", ntp=0.5, lssd=0.5),
    "lssd": Arm("domain documents, LSSD", {"lssd": 1.0}),
    "lssd20": Arm("domain documents, 0.8 NTP + 0.2 LSSD", {"ntp": 0.8, "lssd": 0.2}),
    "ntp_kl": Arm("domain NTP, general KL", NTP, {"kd": 1.0}),
    "lssd_ntp": Arm("domain LSSD, general NTP", {"lssd": 1.0}, NTP),
    "lssd50_ntp": Arm(
        "domain 0.5 NTP + 0.5 LSSD, general NTP", {"ntp": 0.5, "lssd": 0.5}, NTP
    ),
    "lssd20_ntp": Arm(
        "domain 0.8 NTP + 0.2 LSSD, general NTP", {"ntp": 0.8, "lssd": 0.2}, NTP
    ),
    "replay": Arm(
        "domain and general documents, NTP (replay)", NTP, NTP, text="documents"
    ),
    "lora_lssd20": dataclasses.replace(
        _everywhere("mixture, 0.8 NTP + 0.2 LSSD, LoRA", ntp=0.8, lssd=0.2),
        lora_rank=16,
        rate_scale=4.0,
    ),
    # Targets with more confidence where the teacher is wrong.
    "selective50": _everywhere(
        "mixture, LSSD, gold raised by 0.5 where the teacher is wrong",
        lssd=0.5,
        selective=0.5,
    ),
    "selective80": _everywhere(
        "mixture, LSSD, gold raised by 0.8 where the teacher is wrong",
        lssd=0.2,
        selective=0.8,
    ),
    "selective": _everywhere(
        "mixture, NTP where the teacher is wrong, else KL", selective=1.0
    ),
    # No general data: samples of the start, by plain distillation.
    "self_replay": Arm("domain NTP, own samples KL", NTP, {"kd": 1.0}, text="samples"),
    "self_replay_lssd20": Arm(
        "domain 0.8 NTP + 0.2 LSSD, own samples KL",
        {"ntp": 0.8, "lssd": 0.2},
        {"kd": 1.0},
        text="samples",
    ),
    "comprehension": Arm(
        "domain documents and questions about them by rules, NTP",
        NTP,
        NTP,
        text="comprehension",
    ),
}


def _variant(arm: str, words: str, **changes) -> Arm:
    """An arm that differs from another in some fields."""
    label = f"{ARMS[arm].label}, {words}"
    return dataclasses.replace(ARMS[arm], label=label, **changes)


ARMS |= {
    f"{arm}_{name}": _variant(arm, f"weighted by {words}", token_weighting=weighting)
    for arm in ("plain", "mixture_ntp")
    for name, words, weighting in (
        ("teacher", "the teacher's probability", "teacher_probability"),
        ("excess", "excess loss", "excess_loss"),
    )
}
for _arm in ("plain", "mixture_lssd20"):
    ARMS |= {
        f"{_arm}_merged": _variant(_arm, "merged with the start", is_merged=True),
        f"{_arm}_budget": _variant(
            _arm, f"a budget of {BUDGET:g} nats of KL", budget=BUDGET
        ),
    }
for _arm in ("mixture_lssd", "mixture_lssd20"):
    ARMS[f"{_arm}_longer"] = _variant(
        _arm, "a teacher trained longer", has_longer_teacher=True
    )


def source_weights(objectives: dict[str, float]) -> dict[str, float]:
    """The settings of a source with these weights and no others."""
    return {f"{o}_weight": objectives.get(o, 0.0) for o in config_lib.OBJECTIVES}


def add_alignment(
    config: ml_collections.ConfigDict,
    folder: str,
    samples: int,
    start: str,
    rates: tuple[float, float],
    settings: Mapping[str, Any],
) -> None:
    """Adds the phases "sft" and "dpo" on a few general samples, in the chat format.

    Args:
      config: of a run; its other sources are not read in these phases.
      folder: with `instructions.jsonl` and `preferences.jsonl`, such as "phase:select".
      samples: number of samples of each file, the first ones.
      start: `init_from` of SFT.
      rates: peak learning rates of SFT and DPO.
      settings: of both phases.
    """
    sources = config.sources
    for name, file, format in (
        ("sft", "instructions", "chat"),
        ("dpo", "preferences", "chat_preference"),
    ):
        sources[name] = config_lib.source(
            path=f"{folder}/{file}.jsonl",
            format=format,
            weight=0.0,
            max_records=samples,
            **source_weights(NTP),
        )
    none = {name: {"weight": 0.0} for name in sources}
    for name, init_from, rate in zip(
        ("sft", "dpo"), (start, "phase:sft"), rates, strict=True
    ):
        config.overrides[name] = settings | {
            "init_from": init_from,
            "sources": none | {name: {"weight": 1.0}},
        }
        config.overrides[name].optimizer.learning_rate = rate
    config.overrides.dpo.objective = {"kind": "preference"}
    config.phases = (*config.phases, "sft", "dpo")


def set_phases(
    config: ml_collections.ConfigDict,
    arm: Arm,
    generate: Mapping[str, Mapping[str, Any]],
    budget_measure: str,
    merged_shares: Sequence[float],
) -> None:
    """Sets the phases of an arm up to a merge, and its budget.

    Args:
      config: of a run whose `train.num_steps` is set.
      arm: the arm.
      generate: kind of general text that is generated -> the settings `generate`.
      budget_measure: the KL that a budget limits.
      merged_shares: `merge.shares`.
    """
    config.phases = ("cpt",)
    if arm.text in generate:
        config.phases = ("generate", *config.phases)
        config.overrides.generate = {
            "job": "generate",
            "generate": generate[arm.text],
            "eval": {"batch_size": 128},
        }
    if arm.budget:
        config.train.keep_budget = {budget_measure: arm.budget}
        config.train.eval_every = config.train.num_steps // EVALUATIONS
        config.train.eval_before = True
        config.eval.kl_from_start = "always"
    if arm.is_merged:
        config.phases = (*config.phases, "merge")
        config.overrides.merge = {
            "job": "merge",
            "init_from": "phase:cpt",
            "merge": {"shares": merged_shares},
        }
