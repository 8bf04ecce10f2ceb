"""How phases changed the measures of domain text, untouched text and rehearsed text.

Only untouched text and exams, which no phase trains on, show what the model has kept. A
change has an interval if the run recorded the items that each measure averages
(`items.jsonl`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from mixcpt_jax.core import intervals
from mixcpt_jax.reporting.run_records import Arm

# The roles of a measure, in the order of tables.
ROLES = ("domain", "untouched", "rehearsed")
# An interval that reaches so far below zero shows little.
_WIDE = 0.05
SHORT = {"exam": "exam", "exact": "exact match", "accuracy": "token accuracy"}
# Measure of a text -> the items whose mean it is.
_COLUMNS = {
    "accuracy": "correct",
    "exact": "correct",
    "loss": "loss",
    "kl_from_start": "kl",
    "router_drift": "router_drift",
}
MATCHED = "Exams and pairs: matched pairs, question by question (Agresti and Min)"


def starts(arms: Sequence[Arm]) -> dict[str, Arm]:
    """Run -> the first arm that measured the model before its first step."""
    starts = {}
    for arm in arms:
        if arm.before:
            starts.setdefault(arm.run, arm)
    return starts


def domain_names(arms: Sequence[Arm], given: Sequence[str]) -> set[str]:
    """The names of sources, texts and exams that are about the domain.

    If any of them is called domain or domain_SOMETHING, returns these, else all sources of
    documents; in both cases with the exams made from them.

    Args:
      arms: from `run_records.load`.
      given: the names, if the user gave them.
    """
    if given:
        return set(given)
    documents, exams, measured = set(), set(), set()
    for arm in arms:
        measured |= {key.rpartition("/")[0] for key in arm.before | arm.after}
        for name, source in (arm.setting("sources") or {}).items():
            if source.get("format") == "document" and source.get("weight"):
                documents.add(name)
    named = {n for n in documents | measured if n.split("_")[0] == "domain"}
    names = named or documents
    for arm in arms:
        for name, exam in (arm.setting("eval.exams") or {}).items():
            if exam.get("source") in names:
                exams.add(name)
    return names | exams


def label(name: str, role: str) -> str:
    """A measure's name in tables, such as "general, untouched"."""
    return name if name == role else f"{name}, {role}"


def role(name: str, arms: Sequence[Arm], domain: set[str]) -> str:
    """One of `ROLES`: "rehearsed" is other text that is trained on, "untouched" is not.

    Args:
      name: of a text, an exam or pairs.
      arms: from `run_records.load`.
      domain: from `domain_names`.
    """
    if name in domain:
        return "domain"
    trained = {row["name"] for a in arms for row in a.results.get("mixture", [])
               if row.get("share_asked")}  # fmt: skip
    weighted = {n: s for a in arms for n, s in (a.setting("sources") or {}).items()
                if s.get("weight")}  # fmt: skip
    trained |= weighted.keys()
    # Holdout text from the files of a source has the role of that source.
    files = {s["path"]: n for n, s in weighted.items() if s.get("path")}
    for arm in arms:
        for section in ("eval.texts", "eval.pairs"):
            entry = (arm.setting(section) or {}).get(name)
            if entry and entry.get("path") in files:
                return "domain" if files[entry["path"]] in domain else "rehearsed"
    return "rehearsed" if name in trained else "untouched"


def roles(arms: Sequence[Arm], domain: set[str]) -> dict[str, str]:
    """The role of each text, exam and set of pairs that an arm measured."""
    keys = set().union(*(arm.before | arm.after for arm in arms), set())
    names = {key.rpartition("/")[0] for key in keys - {"step"}}
    return {name: role(name, arms, domain) for name in names}


def interval(key: str, start: Arm, arm: Arm) -> tuple[intervals.Interval | None, str]:
    """The 95 % interval of a change and the name of the method; (None, "") without data."""
    name, _, suffix = key.rpartition("/")
    before = start.items.get(0, {})
    after = arm.items.get(arm.after.get("step", max(arm.items, default=0)), {})
    if suffix in ("exam", "pair_accuracy") and are_alike(before, after, key):
        return intervals.change_of_share(before[key], after[key]), MATCHED
    column = _COLUMNS.get(suffix)
    needed = [f"{name}/{column}", f"{name}/tokens"]
    if column is None or not all(are_alike(before, after, k) for k in needed):
        return None, ""
    (was, tokens), (now, _) = ([x[k] for k in needed] for x in (before, after))
    if len(was) != len(tokens):
        return None, ""
    if suffix == "exact":
        return intervals.change_of_share(was == tokens, now == tokens), MATCHED
    return intervals.change_of_ratio(was, now, tokens), (
        "Texts: a ratio of sums over the same texts, with texts, not tokens, as the "
        "independent items (Student’s t)"
    )


def are_alike(before: dict, after: dict, key: str) -> bool:
    return key in before and key in after and len(before[key]) == len(after[key])


class Change(NamedTuple):
    """The change of a measure since the start of its run.

    Attributes:
      key: of the results, such as "general/accuracy".
      role: one of `ROLES`.
      difference: after minus before.
      interval: 95 %; None if the run did not record the items.
      method: how the interval was computed, as text; empty if there is none.
    """

    key: str
    role: str
    difference: float
    interval: intervals.Interval | None
    method: str

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval; the difference twice if there is none."""
        return self.interval or (self.difference, self.difference)

    @property
    def name(self) -> str:
        """A readable name of the key."""
        name, _, suffix = self.key.rpartition("/")
        return f"{name} {SHORT[suffix]}"

    def __str__(self) -> str:
        """In percentage points, for shares."""
        text = f"{self.name} {100 * self.difference:+.1f}"
        if self.interval:
            low, high = self.interval
            text += f" ({100 * low:+.1f} to {100 * high:+.1f})"
        return text


def changes(arm: Arm, arms: Sequence[Arm], domain: set[str]) -> list[Change]:
    """The change of each measure of an arm since the start of its run, by key."""
    start = starts(arms).get(arm.run)
    if start is None:
        return []
    return [
        Change(
            key,
            role(key.rpartition("/")[0], arms, domain),
            arm.after[key] - start.before[key],
            *interval(key, start, arm),
        )
        for key in sorted(arm.after.keys() & start.before.keys() - {"step"})
    ]


def budgets(arms: Sequence[Arm]) -> list[str]:
    """For each arm with `train.keep_budget`: what it has spent, and where it ended."""
    sentences = []
    for arm in arms:
        if not (result := arm.results.get("keep_budget")):
            continue
        spent = ", ".join(
            f"spent {entry['spent']:.4g} of {entry['budget']:g} of {name}"
            for name, entry in result["measures"].items()
        )
        stopped = result["exceeded_at"]
        where = "" if stopped is None else f", as step {stopped} exceeds the budget"
        sentences.append(
            f"{arm.name}: {spent}; ends with step {result['step']}{where}."
        )
    return sentences


def ends(arms: Sequence[Arm]) -> list[Arm]:
    """The training phases that no other training phase starts from."""
    trained = [arm for arm in arms if arm.trains and arm.after]
    followed = {(arm.run, arm.starts_from) for arm in trained}
    return [arm for arm in trained if (arm.run, arm.phase) not in followed]


def verdict(arms: Sequence[Arm], domain: Sequence[str] = ()) -> list[str]:
    """For each arm of `ends`: what it learned, what it kept, and advice, in words.

    Args:
      arms: from `run_records.load`.
      domain: the names about the domain, if the user gave them.
    """
    names = domain_names(arms, domain)
    return [_verdict(arm, arms, names) for arm in ends(arms)]


def _verdict(arm: Arm, arms: Sequence[Arm], names: set[str]) -> str:
    found = changes(arm, arms, names)
    found = [c for what in SHORT for c in found if c.key.endswith(f"/{what}")]
    of_domain = [change for change in found if change.role == "domain"]
    untouched = [change for change in found if change.role == "untouched"]
    lost = [c for c in untouched if c.bounds[1] < 0]
    # A wide interval includes zero whatever happened.
    blind = [c for c in untouched if c not in lost and c.bounds[0] < -_WIDE]
    gained = any(c.bounds[0] > 0 for c in of_domain)
    parts = []
    if of_domain:
        word = "learned" if gained else "learned nothing that the measures show"
        perplexities = _perplexities(arm, arms, names)
        parts.append(f"{word}: {', '.join([*perplexities, *map(str, of_domain)])}")
    if not untouched:
        parts.append("kept: unknown, as nothing untouched was measured")
        advice = "measure general text, --config.eval.texts.general.path=FILE"
    elif lost:
        parts.append(f"lost: {', '.join(map(str, untouched))}")
        advice = "lower the learning rate, or raise the weights of general sources"
    else:
        word = "no loss shown" if blind else "kept, no loss shown"
        parts.append(f"{word}: {', '.join(map(str, untouched))}")
        advice = "read its answers" if gained else "train for more steps"
    for change in blind:
        parts.append(
            f"{change.name} could hide a loss of {-100 * change.bounds[0]:.0f} points, "
            "as it has few items"
        )
    return f"{arm.name}: {'; '.join(parts)} (points, 95 % intervals). Next: {advice}."


def _perplexities(arm: Arm, arms: Sequence[Arm], names: set[str]) -> list[str]:
    """The domain's perplexities, such as "domain perplexity 17.5 -> 11.2"."""
    before = starts(arms)[arm.run].before
    return [
        f"{name} perplexity {before[key]:.1f} -> {arm.after[key]:.1f}"
        for name in sorted(names)
        if (key := f"{name}/perplexity") in before.keys() & arm.after.keys()
    ]
