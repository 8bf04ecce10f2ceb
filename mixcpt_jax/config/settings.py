"""A default with its bounds, and the checks that every key shares."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections


@dataclasses.dataclass(frozen=True)
class Setting:
    """A default, and what else its key may hold.

    Attributes:
      default: the value unless the config says otherwise.
      allowed: what the key must be, in words: "one of text, json", ">= 0".
      holds: whether a value of the right type is allowed.
    """

    default: Any
    allowed: str
    holds: Callable[[Any], bool]


def one_of(default: str, *others: str) -> Setting:
    """A choice by name."""
    choices = (default, *others)
    return Setting(default, f"one of {', '.join(choices)}", lambda v: v in choices)


def number(
    default: float,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Setting:
    """A number within bounds; `least` and `most` may be reached, `above` and `below` not.

    NaN is within no bounds.
    """
    words = {">=": least, ">": above, "<=": most, "<": below}
    allowed = " and ".join(f"{sign} {x}" for sign, x in words.items() if x is not None)

    def holds(value: float) -> bool:
        return (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
            and value == value
        )

    return Setting(default, allowed, holds)


def defaults_of(tree: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Replaces each `Setting` in a config by its default; returns the config."""
    for key in tree:
        value = tree[key]
        if isinstance(value, Setting):
            with tree.ignore_type():
                tree[key] = value.default
        elif isinstance(value, ml_collections.ConfigDict):
            defaults_of(value)
    return tree


def bounds_of(tree: Any, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Dotted key -> what it may hold, of every key that has bounds."""
    for key, value in tree.items():
        if isinstance(value, Setting):
            yield f"{prefix}{key}", value
        elif isinstance(value, ml_collections.ConfigDict):
            yield from bounds_of(value, f"{prefix}{key}.")


def same_type(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(wanted, bool)
    if isinstance(wanted, tuple):
        return isinstance(value, (list, tuple))
    if isinstance(wanted, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(wanted))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
