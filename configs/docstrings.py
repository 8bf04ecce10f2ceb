"""The docstrings of installed Python packages as JSON lines: text that any machine has.

The quickstart and the `:tiny` configs use them as their domain. Source files are parsed,
never imported or run.
"""

import ast
import importlib.metadata
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterator, Sequence

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import terminal

# Parts of a package that are not its documentation: tests, generated or foreign code.
_SKIPPED_PARTS = frozenset({"conftest", "dialects", "lib", "proto", "tools"}) | {
    *("test", "tests", "testing", "test_util", "test_utils", "internal_test_util"),
    *("benchmarks", "examples", "example_libraries", "third_party", "vendored"),
}
_MIN_DOC_CHARS = 80
_MAX_DEFAULT_CHARS = 24

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)

# Hidden, so that `runs/*` are runs.
FOLDER = pathlib.Path("runs", ".docstrings")


def file_of(*packages: str) -> str:
    """The path of a JSONL file of `records`; writes it below `runs` if it does not exist.

    Its name holds the versions of the packages, so each version has its own file.

    Raises:
      InputError: see `records`; or the file cannot be written.
    """
    installed = importlib.metadata.packages_distributions()
    versions = (
        "+".join(map(importlib.metadata.version, installed.get(package, [])))
        for package in packages
    )
    names = map("-".join, zip(packages, versions, strict=True))
    file = FOLDER / f"{'_'.join(names)}.jsonl"
    if file.exists():
        return str(file)
    terminal.say(f"{file}: writing the docstrings of {', '.join(packages)}")
    lines = "".join(json.dumps(record) + "\n" for record in records(packages))
    # Other processes may write the same file at the same time.
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
        temporary.write_text(lines)
        temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"{file.absolute()}: cannot be written ({error.strerror}); run the command in "
            "a folder where you may write, or name another sources.domain.path"
        ) from error
    return str(file)


def records(packages: Sequence[str]) -> list[dict]:
    """One document per public module, class, function and method that is documented.

    Names are the ones that a user imports: an object that public modules re-export has
    its shortest public name. Private, test, example and generated code is left out, and
    so are docstrings of fewer than 80 characters and exact copies.

    Args:
      packages: names of installed top-level packages.

    Returns:
      Dicts of strings, sorted by `id`: 'id' (dotted name) and 'text' (name and
      signature, a blank line, the docstring).

    Raises:
      InputError: a package is not installed, or none of them has documentation.
    """
    texts = {}
    for package in packages:
        for name, node in _public_objects(_parse_package(package)).items():
            for document, text in _documents(name, node):
                texts.setdefault(document, text)
    unique = {}
    for name, text in sorted(texts.items()):
        unique.setdefault(text.partition("\n\n")[2], {"id": name, "text": text})
    if not unique:
        raise InputError(f"{', '.join(packages)}: no public docstring was found")
    return list(unique.values())


def _parse_package(package: str) -> dict[str, tuple[ast.Module, bool]]:
    """Dotted module name -> (syntax tree, whether it is an `__init__`)."""
    folders = paths.package_folders(package)
    if not folders:
        raise InputError(
            f"{package}: is not an installed top-level package; "
            f"run `pip install {package.partition('.')[0]}` or correct the name"
        )
    modules = {}
    for root in folders:
        for file in sorted(pathlib.Path(root).rglob("*.py")):
            parts = [package, *file.relative_to(root).with_suffix("").parts]
            is_init = parts[-1] == "__init__"
            if is_init:
                parts.pop()
            if _is_skipped(parts):
                continue
            with warnings.catch_warnings():
                # Invalid escapes in other people's docstrings.
                warnings.simplefilter("ignore")
                try:
                    tree = ast.parse(file.read_bytes())
                except SyntaxError:  # a template, or for another Python
                    continue
            modules[".".join(parts)] = (tree, is_init)
    return modules


def _is_skipped(parts: list[str]) -> bool:
    return (
        not _SKIPPED_PARTS.isdisjoint(parts)
        or parts[-1].startswith("test_")
        or parts[-1].endswith(("_test", "_pb2", "_pb2_grpc", "__main__"))
    )


def _is_public(dotted: str) -> bool:
    return not any(part.startswith("_") for part in dotted.split("."))


def _public_objects(modules: dict) -> dict[str, ast.AST]:
    """Public dotted name -> syntax node."""
    defined, imported = {}, {}
    public = []
    for module, (tree, is_init) in modules.items():
        nodes = [node for node in tree.body if isinstance(node, _DEFINITIONS)]
        for node in nodes:
            # The last definition is the one after the overloads.
            defined[f"{module}.{node.name}"] = node
            if _is_public(f"{module}.{node.name}"):
                public.append(f"{module}.{node.name}")
        for node in tree.body:
            if not isinstance(node, ast.ImportFrom):
                continue
            origin = _origin(node, module, is_init)
            for alias in node.names:
                name = f"{module}.{alias.asname or alias.name}"
                imported[name] = f"{origin}.{alias.name}"
                # Other modules import for their own use, unless they say `x as x`.
                is_export = is_init or not nodes or alias.asname == alias.name
                if is_export and _is_public(name):
                    public.append(name)

    names = {}
    for name in public:
        target = name
        for _ in range(10):  # a chain of re-exports; imports can be circular
            target = imported.get(target, target)
        if target in defined:
            names.setdefault(target, []).append(name)
    objects = {
        module: tree for module, (tree, _) in modules.items() if _is_public(module)
    }
    for target, candidates in names.items():
        best = min(candidates, key=lambda name: (name.count("."), len(name), name))
        objects[best] = defined[target]
    return objects


def _origin(node: ast.ImportFrom, module: str, is_init: bool) -> str:
    """The absolute name of the module that `from ... import` names."""
    if not node.level:
        return node.module
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_init]
    return ".".join([*parts, *filter(None, [node.module])])


def _documents(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Name and text of an object, and of a class's public methods."""
    doc = ast.get_docstring(node) or ""
    if len(doc) >= _MIN_DOC_CHARS:
        is_module = isinstance(node, ast.Module)
        heading = f"module {name}" if is_module else name + _signature(node)
        yield name, f"{heading}\n\n{doc}\n"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, _FUNCTIONS) and not child.name.startswith("_"):
                yield from _documents(f"{name}.{child.name}", child)


def _signature(node: ast.AST) -> str:
    """`(x, axis=None)`: no annotations, and long defaults cut to an ellipsis."""
    if isinstance(node, ast.ClassDef):
        inits = [
            child for child in node.body if getattr(child, "name", "") == "__init__"
        ]
        if not inits:
            return ""
        node = inits[0]
    arguments = node.args
    for group in (arguments.posonlyargs, arguments.args, arguments.kwonlyargs):
        for argument in group:
            argument.annotation = None
    for argument in filter(None, (arguments.vararg, arguments.kwarg)):
        argument.annotation = None
    arguments.defaults = [_short(default) for default in arguments.defaults]
    arguments.kw_defaults = [_short(default) for default in arguments.kw_defaults]
    return re.sub(r"^\((self|cls)(, |(?=\)))", "(", f"({ast.unparse(arguments)})")


def _short(default: ast.AST | None) -> ast.AST | None:
    if default is None or len(ast.unparse(default)) <= _MAX_DEFAULT_CHARS:
        return default
    return ast.Constant(...)
