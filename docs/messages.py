"""Writes every message that can end a run into `troubleshooting.md`, below its mark.

    python docs/messages.py

What depends on the case is an ellipsis, as in "…: no such file".
"""

import ast
import pathlib
from collections.abc import Iterator

PAGE = pathlib.Path(__file__).parent / "troubleshooting.md"
MARK = "<!-- made by docs/messages.py -->\n"
_PACKAGE = PAGE.parent.parent / "mixcpt_jax"
_ERRORS = ("InputError", "FloatingPointError")


def messages(source: str) -> Iterator[str]:
    """The messages of the errors that a module's source raises."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        if isinstance(node.func, ast.Name) and node.func.id in _ERRORS:
            text = _text(node.args[0])
            if text.strip("…: "):  # else the message is another one's
                yield text


def _text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=value):
            return str(value)
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.IfExp(body=body):
            return _text(body)
        case _:
            return "…"


def _quoted(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def page() -> str:
    """The page as it has to be: what stands above the mark, and the messages."""
    written, _, _ = PAGE.read_text().partition(MARK)
    parts = [written + MARK]
    for file in sorted(_PACKAGE.rglob("*.py")):
        source = file.read_text()
        found = sorted(set(messages(source)))
        if found:
            about = ast.get_docstring(ast.parse(source)).split("\n")[0]
            parts.append(f"**`{file.relative_to(_PACKAGE)}`**: {about}\n")
            parts.append("".join(f"- {_quoted(text)}\n" for text in found))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
