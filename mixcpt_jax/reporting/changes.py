"""What phases changed: in the domain, in what nothing trained on, in what was rehearsed.

Only the second says what is kept: what the mixture rehearses is trained on, too. A change
has an interval where the run left what each measure is a mean of.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mixcpt_jax.core import intervals
from mixcpt_jax.reporting.run_records import Arm

# What a measure can be about, in the order of tables.
ROLES = ("domain", "untouched", "rehearsed")
SHORT = {"exam": "exam", "exact": "continued exactly", "accuracy": "token accuracy"}
MATCHED = "Exams and pairs: matched pairs, question by question (Agresti and Min)"


def starts(arms: Sequence[Arm]) -> dict[str, Arm]:
    """Run -> the arm that measured what the run started from."""
    starts = {}
    for arm in arms:
        if arm.before:
            starts.setdefault(arm.run, arm)
    return starts


def domain_names(arms: Sequence[Arm], given: Sequence[str]) -> set[str]:
    """Names of what is about the domain: sources of documents, and exams made of them.

    Where sources are called domain or domain_SOMETHING these alone.
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
    """A measure's name for a table, such as "general, untouched"."""
    return name if name == role else f"{name}, {role}"


def role(name: str, arms: Sequence[Arm], domain: set[str]) -> str:
    """One of `ROLES`: "domain", "rehearsed" for what is trained on besides, "untouched".

    Args:
      name: of a text, exam or pairs.
      arms: what was run.
      domain: see `domain_names`.
    """
    if name in domain:
        return "domain"
    trained = {row["name"] for a in arms for row in a.results.get("mixture", [])
               if row.get("share_asked")}  # fmt: skip
    weighted = {n: s for a in arms for n, s in (a.setting("sources") or {}).items()
                if s.get("weight")}  # fmt: skip
    trained |= weighted.keys()
    # Held-out text of a source's own files is of that source's kind.
    files = {s["path"]: n for n, s in weighted.items()}
    for arm in arms:
        for section in ("eval.texts", "eval.pairs"):
            entry = (arm.setting(section) or {}).get(name)
            if entry and entry["path"] in files:
                return "domain" if files[entry["path"]] in domain else "rehearsed"
    return "rehearsed" if name in trained else "untouched"


def interval(key: str, start: Arm, arm: Arm) -> tuple[intervals.Interval | None, str]:
    """The interval of a change, and how it was made in words; (None, "") without data."""
    name, _, suffix = key.rpartition("/")
    before = start.items.get(0, {})
    after = arm.items.get(arm.after.get("step", max(arm.items, default=0)), {})
    if suffix in ("exam", "pair_accuracy") and are_alike(before, after, key):
        return intervals.change_of_share(before[key], after[key]), MATCHED
    count = arm.setting(f"eval.exams.{name}.num_questions")
    if suffix == "exam" and count:
        return (
            intervals.change_of_counts(start.before[key], arm.after[key], count),
            "Exams of which only the number of questions is known: from both shares "
            "(Newcombe), wider than need be",
        )
    column = {"accuracy": "correct", "loss": "loss", "exact": "correct"}.get(suffix)
    needed = [f"{name}/{column}", f"{name}/tokens"]
    if column is None or not all(are_alike(before, after, k) for k in needed):
        return None, ""
    (was, tokens), (now, _) = ([x[k] for k in needed] for x in (before, after))
    if suffix == "exact":
        return intervals.change_of_share(was == tokens, now == tokens), MATCHED
    return intervals.change_of_ratio(was, now, tokens), (
        "Texts: a ratio of sums over the same texts, where texts, not tokens, are what "
        "is counted (Student’s t)"
    )


def are_alike(before: dict, after: dict, key: str) -> bool:
    return key in before and key in after and len(before[key]) == len(after[key])


def measured(results: dict) -> set[str]:
    """Names of the texts, exams and pairs that a phase's `results.json` has."""
    keys = {*(results.get("before") or {}), *(results.get("after") or {})}
    return {key.rpartition("/")[0] for key in keys if "/" in key}


class Change(NamedTuple):
    """Of one measure since the start of the run, in per cent points.

    Attributes:
      role: one of `ROLES`.
      name: of the text or exam.
      what: of `SHORT`.
      points: after less before.
      interval: 95 %; None where the run did not leave enough to tell.
    """

    role: str
    name: str
    what: str
    points: float
    interval: intervals.Interval | None

    def __str__(self) -> str:
        text = f"{self.points:+.1f}"
        if self.interval:
            text += " ({:+.1f} to {:+.1f})".format(*self.interval)
        return text


def changes(arm: Arm, arms: Sequence[Arm], domain: set[str]) -> list[Change]:
    """What an arm changed since the start of its run, domain first; shares alone."""
    start = starts(arms).get(arm.run)
    found = []
    for suffix, what in SHORT.items():
        for key in sorted(arm.after):
            name, _, last = key.rpartition("/")
            if start is None or last != suffix or key not in start.before:
                continue
            bounds, _ = interval(key, start, arm)
            points = 100 * (arm.after[key] - start.before[key])
            found.append(
                Change(
                    role(name, arms, domain),
                    name,
                    what,
                    points,
                    bounds and tuple(100 * bound for bound in bounds),
                )
            )
    return sorted(found, key=lambda change: ROLES.index(change.role))


def ends(arms: Sequence[Arm]) -> list[Arm]:
    """The trained phases that no other trained one starts from."""
    trained = [arm for arm in arms if arm.trains and arm.after]
    followed = {(arm.run, arm.begins_with) for arm in trained}
    return [arm for arm in trained if (arm.run, arm.phase) not in followed]


def verdict(arms: Sequence[Arm], domain: Sequence[str] = ()) -> list[str]:
    """For each of `ends`: changes of the domain and of what is untouched, and advice.

    Args:
      arms: from `run_records.load`.
      domain: see `domain_names`.
    """
    names, sentences = domain_names(arms, domain), []
    for arm in ends(arms):
        found = changes(arm, arms, names)
        untouched = [change for change in found if change.role == "untouched"]
        parts = [
            ", ".join(f"{c.name} {c.what} {c}" for c in part)
            for part in ([c for c in found if c.role == "domain"], untouched)
            if part
        ]
        lost = [
            f"{c.name} {c.what}" for c in untouched if c.interval and c.interval[1] < 0
        ]
        gained = any(
            (c.interval[0] if c.interval else c.points) > 0
            for c in found
            if c.role == "domain"
        )
        if not untouched:
            parts.append("what is kept is not known, as nothing untouched was measured")
            advice = "measure general text, --config.eval.texts.general.path=FILE"
        elif lost:
            parts.append(f"lost: {', '.join(lost)}")
            advice = "lower the learning rate, or raise the weights of general sources"
        else:
            parts.append("no loss is shown in what is untouched")
            advice = "read its answers" if gained else "train for more steps"
        sentences.append(
            f"{arm.name}: {'; '.join(parts)} (points, 95 % intervals). Next: {advice}."
        )
    return sentences
