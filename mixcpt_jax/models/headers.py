"""Values of file headers, checked: the JSON files of a model folder, and GGUF's metadata.

A header is untrusted input: every value that is used is read here by its key, with the
type and the range that it must have. Null counts as absent, as in transformers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mixcpt_jax.core import small_files
from mixcpt_jax.core.errors import InputError

AGAIN = "download it again"
# Number of characters of the found value that an error shows.
_SHOWN = 80
# The largest values are RoPE bases, up to 4.5e10 in models for long contexts.
_LARGEST = 1e12
# The default of a key that must be present.
_REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Header:
    """Keys and values of a file.

    The methods that return a value return `default` where the key is absent. On a wrong
    value they raise `InputError`, which names the file, the key, the value and what is
    allowed.

    Attributes:
      file: where they are from.
      values: as the file's parser returns them.
      prefix: prepended to all keys; callers omit it.
    """

    file: epath.Path | str
    values: Mapping[str, Any]
    prefix: str = ""

    def get(self, key: str) -> Any:
        """The value as it is, unchecked; None if it is absent."""
        return self.values.get(self.prefix + key)

    def within(self, prefix: str) -> "Header":
        """The same values, with `prefix` put before every key."""
        return dataclasses.replace(self, prefix=self.prefix + prefix)

    def integer(
        self,
        key: str,
        default: Any = _REQUIRED,
        least: int = 1,
        most: int = 2**31 - 1,
    ) -> Any:
        """An integer from `least` to `most`."""

        def is_right(value):
            return is_integer(value) and least <= value <= most

        return self._checked(
            key, default, f"an integer from {least} to {most}", is_right
        )

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        least: float = 0.0,
        most: float = _LARGEST,
    ) -> Any:
        """A positive number from `least` to `most`."""

        def is_right(value):
            is_number = is_integer(value) or isinstance(value, float)
            return is_number and value > 0 and least <= value <= most

        expected = (
            f"a positive number{f' from {least:g}' * (least > 0)} up to {most:.0e}"
        )
        return self._checked(key, default, expected, is_right)

    def flag(self, key: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._instance(key, default, bool, "true or false")

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._instance(key, default, str, "a string")

    def mapping(self, key: str, default: Any = _REQUIRED) -> Any:
        """An object of JSON."""
        return self._instance(key, default, dict, "an object")

    def many(
        self, key: str, is_one: Callable[[Any], bool], expected: str, default=_REQUIRED
    ) -> Any:
        """A list; each item passes `is_one`."""

        def is_right(value):
            return isinstance(value, list) and all(map(is_one, value))

        return self._checked(key, default, expected, is_right)

    def require(self, key: str, supported: Sequence[Any]) -> None:
        """Checks that a value is one of the supported ones."""
        value = self.get(key)
        # 1 and True are equal in Python, but must not be confused.
        if not any(value == s and type(value) is type(s) for s in supported):
            raise self.unsupported(key, ", ".join(map(str, supported)))

    def unsupported(self, key: str, supported: Any) -> InputError:
        """The error for a value that is not supported."""
        return InputError(f"{self._found(key)}; supported: {supported}")

    def wrong(self, key: str, expected: str) -> InputError:
        """The error for a value that does not have the expected form."""
        return InputError(f"{self._found(key)}; must be {expected}")

    def _instance(self, key: str, default: Any, kind: type, expected: str) -> Any:
        return self._checked(key, default, expected, lambda v: isinstance(v, kind))

    def _checked(self, key: str, default: Any, expected: str, is_right) -> Any:
        value = self.get(key)
        if value is None:
            if default is _REQUIRED:
                raise InputError(
                    f"{self.file}: {self.prefix}{key} is missing; must be {expected}"
                )
            return default
        if not is_right(value):
            raise self.wrong(key, expected)
        return value

    def _found(self, key: str) -> str:
        found = repr(self.get(key))
        found = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."
        return f"{self.file}: {self.prefix}{key} is {found}"


def is_integer(value: Any) -> bool:
    """Whether a value is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def read(file: epath.Path) -> Header:
    """Reads a JSON file that holds an object.

    Raises:
      InputError: see `small_files.read_json`.
    """
    return Header(file, small_files.read_json(file, remedy=AGAIN, is_ours=False))


def read_if_there(file: epath.Path) -> Header:
    """Like `read`; a missing file has no values."""
    return read(file) if file.exists() else Header(file, {})
