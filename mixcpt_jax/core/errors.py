"""The exception for user errors."""

from mixcpt_jax.core import text


class InputError(Exception):
    """A config, a file or a folder given by the user is wrong.

    The message is one line: the place (key, file, line), the problem and the remedy.
    Control characters in it are escaped, and words of more than 300 characters are cut.
    Commands print it without a traceback and exit with status 1.
    """

    def __init__(self, message: str):
        super().__init__(text.lines(" ".join(str(message).split("\n"))))
