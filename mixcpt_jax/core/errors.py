"""The exception for user errors."""

import contextlib
from collections.abc import Iterator

from mixcpt_jax.core import text


class InputError(Exception):
    """A config, a file or a folder given by the user is wrong.

    The message is one line: the place (key, file, line), the problem and the remedy.
    Control characters in it are escaped, and words of more than 300 characters are cut.
    Commands print it without a traceback and exit with status 1.
    """

    def __init__(self, message: str):
        super().__init__(text.lines(" ".join(str(message).split("\n"))))


def in_place(message: str, place: str) -> str:
    """A message of code that reads any source, with `place` for "sources.NAME"."""
    return message.replace("sources.NAME", place)


@contextlib.contextmanager
def naming(place: str) -> Iterator[None]:
    """Names the source in an error: its key in the config, such as "sources.domain"."""
    try:
        yield
    except InputError as error:
        if (message := in_place(str(error), place)) == str(error):
            raise
        raise InputError(message) from error
