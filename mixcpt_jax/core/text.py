"""Text that comes from data: names that stay in their folder."""

from typing import Any

# Of file systems' names.
_MOST_NAME_BYTES = 255


def is_name(text: Any) -> bool:
    """Whether it is the name of a file or folder, rather than a path to elsewhere."""
    return (
        isinstance(text, str)
        and text not in ("", ".", "..")
        and text.isprintable()
        and not set(text) & {"/", "\\"}
        and len(text.encode()) <= _MOST_NAME_BYTES
    )
