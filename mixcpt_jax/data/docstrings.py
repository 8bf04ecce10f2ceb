"""The documentation that comes with installed Python packages, and an exam on it.

A corpus of technical text that any machine has. Source files are parsed, never
imported or run.
"""

import ast
import difflib
import importlib.metadata
import pathlib
import random
import re
import warnings
from collections.abc import Sequence

from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError

# Parts of a package that are not its documentation: tests, generated or foreign code.
_SKIPPED_PARTS = frozenset({"conftest", "dialects", "lib", "proto", "tools"}) | {
    *("test", "tests", "testing", "test_util", "test_utils", "internal_test_util"),
    *("benchmarks", "examples", "example_libraries", "third_party", "vendored"),
}
_MIN_DOC_CHARS = 80
_MAX_DEFAULT_CHARS = 24

_NUM_CHOICES = 4
_ASKS = {
    "function": "does the following",
    "method": "does the following",
    "class": "is described as follows",
}
_MIN_QUESTION_WORDS = 5
_MAX_QUESTION_CHARS = 250
_NO_QUESTION = re.compile(r"(?i)(alias|deprecated|see|same as|this function)\b")
_STEM_CHARS = 4
# difflib ratios above which two names, or two sentences, are too alike to tell apart.
_SAME_NAME = 0.75
_SAME_TEXT = 0.8

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (*_FUNCTIONS, ast.ClassDef)


def records(packages: Sequence[str]) -> list[dict]:
    """One document per public module, class, function and method that is documented.

    Names are those a user imports: what a public module re-exports stands under its
    shortest public name. Private, test, example and generated code is left out, and so
    are docstrings of fewer than 80 characters and exact copies.

    Args:
      packages: names of installed top-level packages.

    Returns:
      Dicts of strings, sorted by `id`: 'id' (dotted name), 'title' (the same), 'text'
      (name and signature, a blank line, the docstring), 'kind' ('module', 'class',
      'function' or 'method'), 'package', 'module' (where it is imported from) and
      'summary' (the docstring's first sentence).

    Raises:
      InputError: a package is not installed, or none of them has documentation.
    """
    documents = {}
    for package in packages:
        modules = _parse_package(package)
        for name, (kind, node) in _public_objects(modules).items():
            for document in _documents(name, kind, node):
                documents.setdefault(document["id"], document | {"package": package})
    unique = {}
    for _, document in sorted(documents.items()):
        _, _, doc = document["text"].partition("\n\n")
        unique.setdefault(doc, document)
    if not unique:
        raise InputError(f"{', '.join(packages)}: no public docstring was found")
    return list(unique.values())


def version(package: str) -> str:
    """The version of the distribution that an import name belongs to, or "unknown"."""
    names = importlib.metadata.packages_distributions().get(package, [])
    return " ".join(importlib.metadata.version(name) for name in names) or "unknown"


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


def _public_objects(modules: dict) -> dict[str, tuple[str, ast.AST]]:
    """Public dotted name -> (kind, syntax node)."""
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
        module: ("module", tree)
        for module, (tree, _) in modules.items()
        if _is_public(module)
    }
    for target, candidates in names.items():
        best = min(candidates, key=lambda name: (name.count("."), len(name), name))
        node = defined[target]
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        objects[best] = (kind, node)
    return objects


def _origin(node: ast.ImportFrom, module: str, is_init: bool) -> str:
    """The absolute name of the module that `from ... import` names."""
    if not node.level:
        return node.module
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_init]
    return ".".join([*parts, *filter(None, [node.module])])


def _documents(name: str, kind: str, node: ast.AST) -> list[dict]:
    """The document of an object, and those of a class's public methods."""
    documents = []
    doc = ast.get_docstring(node) or ""
    if len(doc) >= _MIN_DOC_CHARS:
        heading = f"module {name}" if kind == "module" else name + _signature(node)
        documents.append(
            {
                "id": name,
                "title": name,
                "text": f"{heading}\n\n{doc}\n",
                "kind": kind,
                "module": name.rpartition(".")[0],
                "summary": _first_sentence(doc),
            }
        )
    if kind == "class":
        for child in node.body:
            if isinstance(child, _FUNCTIONS) and not child.name.startswith("_"):
                documents += _documents(f"{name}.{child.name}", "method", child)
    return documents


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


def _first_sentence(doc: str) -> str:
    """The first sentence of the first paragraph, without markup."""
    paragraph = " ".join(doc.partition("\n\n")[0].split())
    plain = re.sub(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", paragraph)
    plain = re.sub(r"`+([^`]*)`+_*|\*\*([^*]*)\*\*", r"\1\2", plain)
    return re.split(r"(?<=[.!?])\s+(?=[A-Z(])", plain, maxsplit=1)[0]


def exam(documents: Sequence[dict], num_questions: int, seed: int) -> list[dict]:
    """Multiple-choice questions: which function does what its docstring says?

    The answer is one of four functions, classes or methods from the same place, all of
    them among `documents`. A sentence that is short, gives the name away or fits
    another one there makes no question. The wrong answers are those that share about
    as many words with the sentence as the right one does, and one of them at least as
    many, so that matching words is no way to pass.

    Args:
      documents: of `records`.
      num_questions: how many to make; there are fewer if the documents do not yield
        as many.
      seed: of the choice of documents, of the wrong answers and of the order.

    Returns:
      Dicts, the packages taking turns: 'question' (it ends with the docstring's own
      sentence), 'choices' (4 names), 'answer' (index of the right one) and 'doc_id'.
    """
    rng = random.Random(seed)
    siblings, packages = {}, {}
    for document in sorted(documents, key=lambda document: document["id"]):
        siblings.setdefault((document["module"], document["kind"]), []).append(document)
        packages.setdefault(document["package"], []).append(document)
    for group in packages.values():
        rng.shuffle(group)

    questions, asked = [], set()
    while packages and len(questions) < num_questions:
        for package, group in sorted(packages.items()):
            question = None
            while group and question is None:
                document = group.pop()
                if document["summary"] in asked:
                    continue
                others = siblings[document["module"], document["kind"]]
                question = _question(document, others, rng)
            if question is None:
                del packages[package]
            else:
                asked.add(document["summary"])
                questions.append(question)
    return questions[:num_questions]


def _question(document: dict, siblings: list[dict], rng: random.Random) -> dict | None:
    """A question on one document, or None if it makes no fair one."""
    name, sentence = _name(document), document["summary"].rstrip(".:")
    if document["kind"] == "module" or not _is_fit(sentence, name):
        return None
    others = [_name(sibling) for sibling in siblings if sibling is not document]
    rng.shuffle(others)
    shared = _shared_words(name, sentence)
    others.sort(key=lambda other: abs(_shared_words(other, sentence) - shared))
    choices = [name]
    for other in others:
        if len(choices) < _NUM_CHOICES and not any(
            _same_name(other, choice) for choice in choices
        ):
            choices.append(other)
    if len(choices) < _NUM_CHOICES or shared > max(
        _shared_words(other, sentence) for other in choices[1:]
    ):
        return None
    for sibling in siblings:
        if sibling is not document and _alike(sentence, sibling["summary"], _SAME_TEXT):
            return None
    rng.shuffle(choices)
    return {
        "question": f"Which {document['kind']} of {document['module']} "
        f"{_ASKS[document['kind']]}? {sentence}.",
        "choices": choices,
        "answer": choices.index(name),
        "doc_id": document["id"],
    }


def _name(document: dict) -> str:
    return document["id"].rpartition(".")[2]


def _words(text: str) -> list[str]:
    """Lower-case words, also those of a `snake_case` or `CamelCase` name."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
    return re.findall(r"[a-z0-9]+", spaced.lower())


def _shared_words(name: str, sentence: str) -> int:
    """Words of the name that begin like a word of the sentence: `clip`, `clipping`."""
    stems = {word[:_STEM_CHARS] for word in _words(sentence)}
    return sum(word[:_STEM_CHARS] in stems for word in _words(name))


def _is_fit(sentence: str, name: str) -> bool:
    """Whether the sentence says something, and not all the words of the name."""
    words = _words(sentence)
    joined = "".join(words)
    # Short words must stand by themselves: "sine" does not give `sin` away, while
    # "L-BFGS" does give `lbfgs` away.
    is_told = all(
        word in words or (len(word) >= _STEM_CHARS and word in joined)
        for word in _words(name)
    )
    return (
        not is_told
        and "".join(_words(name)) not in words
        and len(words) >= _MIN_QUESTION_WORDS
        and len(sentence) <= _MAX_QUESTION_CHARS
        and not _NO_QUESTION.match(sentence)
    )


def _same_name(one: str, other: str) -> bool:
    one, other = "".join(_words(one)), "".join(_words(other))
    return one in other or other in one or _alike(one, other, _SAME_NAME)


def _alike(one: str, other: str, ratio: float) -> bool:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    return matcher.quick_ratio() >= ratio and matcher.ratio() >= ratio
