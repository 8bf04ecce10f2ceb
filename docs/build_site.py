"""Builds the documentation site from the project's Markdown pages.

    python docs/build_site.py [FOLDER]

Collects the pages in the layout that they have in the project, so that their links hold on
the site as they do in a clone; adds a page of all keys, made from `config/defaults.py`, and
a page of the library, made from its docstrings; then runs `mkdocs build --strict`, which
fails on a dead link.
"""

import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator

import ml_collections
from mkdocs.commands import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort as Abort

import mixcpt_jax
from mixcpt_jax.config import defaults, settings

PROJECT = pathlib.Path(__file__).parent.parent
_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
_SECTION = re.compile(r"    config\.(\w+)(?:\.(\w+))? = (.*)")
_SECTION_ROW = "a section"
# Keys in tables stay whole.
_STYLE = ".md-typeset td:first-child code { white-space: nowrap }\n"
_KEY = re.compile(r'            "(\w+)": (.*)')


def collect(folder: pathlib.Path) -> None:
    """Copies the pages and the files that they link to, and writes the generated pages."""
    pages = [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]
    pages += (PROJECT / "experiments").rglob("*.md")
    files = set(pages)
    for page in pages:
        for link in _LINK.findall(page.read_text()):
            target = (page.parent / link).resolve()
            if target.is_relative_to(PROJECT) and target.is_file():
                files.add(target)
    for file in files:
        copy = folder / file.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (folder / "site.css").write_text(_STYLE)
    (folder / "docs" / "keys.md").write_text(keys_page())
    (folder / "docs" / "api.md").write_text(library_page())


def keys_page() -> str:
    """A table of every key: its default, what it may be, and its meaning."""
    lines = [
        "# All settings",
        "",
        "Set a key with a flag, `--config.train.num_steps=100`, or in a config file. This "
        "page is made from `mixcpt_jax/config/defaults.py`; `config.source` and "
        "`config.exam` describe the keys of a source and of an exam.",
    ]
    section = None
    for key, default, allowed, meaning in settings_rows():
        if key.partition(".")[0] != section or section is None:
            section = key.partition(".")[0]
            lines += ["", f"## {section}", "", "| key | default | may be | meaning |"]
            lines += ["|---|---|---|---|"]
        shown = "" if allowed == _SECTION_ROW else f"`{default!r}`"
        cells = f"`{key}`", shown, allowed, meaning
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    for function in (defaults.source, defaults.exam):
        lines += ["", f"## {function.__name__}(...)", "", "```text"]
        lines += [*(function.__doc__ or "").splitlines(), "```"]
    return "\n".join(lines) + "\n"


def settings_rows() -> Iterator[tuple[str, object, str, str]]:
    """Yields (dotted key, default, what it may be, its meaning) of each key.

    The meaning is the comment above the key or beside it. The comment of a section goes
    with the section's own row.
    """
    tree = defaults.bounded_config()
    meanings = dict(_comments())
    for name, value in tree.items():
        if isinstance(value, ml_collections.ConfigDict) and len(value):
            if name in meanings:
                yield name, "", _SECTION_ROW, meanings[name]
            for key, entry in value.items():
                yield _row(f"{name}.{key}", entry, meanings)
        else:
            yield _row(name, value, meanings)


def _row(key: str, value, meanings: dict[str, str]) -> tuple[str, object, str, str]:
    meaning = meanings.get(key, "")
    if isinstance(value, settings.Setting):
        return key, value.default, value.allowed, meaning
    if isinstance(value, ml_collections.ConfigDict):
        return key, {}, "a section of names", meaning
    kind = {bool: "true or false", str: "text", tuple: "a tuple"}[type(value)]
    return key, value, kind, meaning


def _comments() -> Iterator[tuple[str, str]]:
    """Yields (dotted key, comment) from the source of `bounded_config`."""
    text = pathlib.Path(defaults.__file__).read_text()
    body = text.partition("def bounded_config")[2].partition("\ndef ")[0]
    section, said = "", []
    for line in body.splitlines():
        code, _, comment = line.partition("  # ")
        if line.strip().startswith("#"):
            said.append(line.strip(" #"))
            continue
        if found := _SECTION.match(code):
            section, key = found[1], found[1]
        elif found := _KEY.match(code):
            key = f"{section}.{found[1]}"
        elif comment and said == [] and code.strip().startswith(")"):
            yield key, comment  # of a call over several lines
            continue
        else:
            said = []
            continue
        if comment:
            said.append(comment.strip())
        if said:
            yield key, " ".join(said)
        said = []


def library_page() -> str:
    """The docstring of each name that the package offers."""
    lines = ["# The library, name by name", "", "See [the library](library.md).", ""]
    for name in mixcpt_jax.__all__:
        value = getattr(mixcpt_jax, name)
        lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
    return "\n".join(lines)


def main(output: str = "site") -> None:
    """Builds the site into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        collect(pathlib.Path(folder))
        config = load_config(
            str(PROJECT / "mkdocs.yml"),
            docs_dir=folder,
            site_dir=str(pathlib.Path(output).resolve()),
            strict=True,
        )
        config.plugins.on_startup(command="build", dirty=False)
        build.build(config)
        config.plugins.on_shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
