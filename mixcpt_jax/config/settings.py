"""A default with its bounds, and the checks that every key shares."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from mixcpt_jax.core import text as text_lib
from mixcpt_jax.core.errors import InputError


@dataclasses.dataclass(frozen=True)
class Setting:
    """A default, and the other values that its key may hold.

    Attributes:
      default: the value unless the config sets another; None only for a number that may
        be left out.
      allowed: what the key must be, as text: "one of text, json", ">= 0 and <= 1".
      holds: whether a value of the right type is allowed.
    """

    default: Any
    allowed: str
    holds: Callable[[Any], bool]


def one_of(default: str, *others: str) -> Setting:
    """A choice by name."""
    choices = (default, *others)
    return Setting(default, f"one of {', '.join(choices)}", choices.__contains__)


def matching(default: str, pattern: str, allowed: str) -> Setting:
    """A text of a form, given as a regular expression and in words."""
    return Setting(default, allowed, re.compile(pattern).fullmatch)


def number(
    default: float | None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    also: float | None = None,
) -> Setting:
    """A number between two bounds.

    Args:
      default: its type is the key's: an int refuses floats; None is a float or None.
      least, above: the lower bound, itself allowed or not.
      most, below: the upper bound, itself allowed or not.
      also: a value outside the bounds that is allowed, such as 0 for "off".
    """
    bounds = {">=": least, ">": above, "<=": most, "<": below}
    allowed = " and ".join(
        f"{sign} {bound:g}" if isinstance(bound, float) else f"{sign} {bound:,}"
        for sign, bound in bounds.items()
        if bound is not None
    )
    if also is not None or default is None:
        allowed = f"{also}, or {allowed}"

    def holds(value: float | None) -> bool:
        if value is None or value == also:
            return value == also
        return (
            (least is None or value >= least)
            and (above is None or value > above)
            and (most is None or value <= most)
            and (below is None or value < below)
        )

    return Setting(default, allowed, holds)


def check_key(tree: ml_collections.ConfigDict, key: str, place: str) -> None:
    """Checks that a config has a key.

    Args:
      tree: the config.
      key: dotted, such as "train.num_steps".
      place: the origin of the key for the message, such as a flag.

    Raises:
      InputError: names the first part that is unknown, and similar keys.
    """
    above = ""
    for part in key.split("."):
        if not isinstance(tree, ml_collections.ConfigDict) or part not in tree:
            known = tree if isinstance(tree, ml_collections.ConfigDict) else ()
            raise InputError(
                f"{place}: unknown key {part!r}{f' in {above}' if above else ''}; "
                f"{text_lib.advice(part, known)}"
            )
        tree = tree[part]
        above = f"{above}.{part}" if above else part


def defaults_of(tree: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Replaces each `Setting` in a config by its default; returns the config."""
    with tree.ignore_type():
        for key, value in tree.items():
            if isinstance(value, Setting):
                is_optional = value.default is None
                tree[key] = (
                    config_dict.placeholder(float) if is_optional else value.default
                )
            elif isinstance(value, ml_collections.ConfigDict):
                defaults_of(value)
    return tree


def check(value: Any, reference: Any, place: str) -> None:
    """Checks the keys, types and bounds of a config, of a section or of one key.

    Args:
      value: a section, or what a key holds.
      reference: a `Setting`, a value of the same type, or a section of these. An empty
        section takes any keys, which are not checked.
      place: the dotted key; empty: the whole config.

    Raises:
      InputError: names the key, what was found, and what it must be.
    """
    if isinstance(reference, ml_collections.ConfigDict):
        if not isinstance(value, ml_collections.ConfigDict):
            raise InputError(f"{place}={shown(value)}: must be a section of keys")
        for key in value if len(reference) else ():
            inner = f"{place}.{key}" if place else key
            if key not in reference:
                raise InputError(
                    f"{inner}: unknown key; {text_lib.advice(key, reference)}"
                )
            check(value[key], reference[key], inner)
        return
    setting = reference if isinstance(reference, Setting) else None
    default = setting.default if setting else reference
    example = 0.0 if default is None else default
    is_number = setting and isinstance(default, int | float)
    such_as = f", such as {default}" if is_number else ""
    if not same_type(value, example) and not (value is default is None):
        allowed = f"{_TYPES[type(example)]}, not {type(value).__name__}{such_as}"
    elif isinstance(value, float) and not math.isfinite(value):
        allowed = f"a finite number{such_as}"
    elif setting and not setting.holds(value):
        allowed = f"{setting.allowed}{such_as}"
    else:
        return
    raise InputError(f"{place}={shown(value)}: must be {allowed}")


def check_complete(value: Any, reference: Any, place: str) -> None:
    """Checks that a section has every key of the reference.

    Raises:
      InputError: names the first key that is missing.
    """
    for key in reference:
        inner = f"{place}.{key}" if place else key
        if key not in value:
            raise InputError(
                f"{inner}: is missing; begin the config with mixcpt_jax.config.default()"
            )
        if isinstance(reference[key], ml_collections.ConfigDict):
            check_complete(value[key], reference[key], inner)


_TYPES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
}


def shown(value: Any) -> str:
    """A value as text for a message, cut after 100 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4,300 digits.
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 100 else f"{text[:97]}..."


def same_type(value: Any, reference: Any) -> bool:
    if isinstance(reference, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(reference, bool)
    if isinstance(reference, list | tuple):
        return isinstance(value, list | tuple)
    if isinstance(reference, float):
        return isinstance(value, int | float)
    return isinstance(value, type(reference))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
