"""The exception for user errors."""


class InputError(Exception):
    """A config, a file or a folder given by the user is wrong.

    The message is one line: the place (key, file, line), the problem and the remedy.
    Commands print it without a traceback and exit with status 1.
    """
