"""The one exception for what a user can mend."""


class InputError(Exception):
    """A config, a file or a folder given by the user is wrong.

    The message is one line. It names the place (key, file, line), says what was
    found there and what to do about it. `main` prints it without a traceback and
    exits with status 1.
    """
