import os
import textwrap

import pytest

from configs import docstrings
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import sources

_LONG = "It is described here at a length that makes it worth keeping as a document."


def _doc(sentence):
    return f'"""{sentence} {_LONG}"""'


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `lib_of_tests` whose import fails, so it is only ever parsed."""
    files = {
        "__init__.py": """
            from lib_of_tests._src.inner import hidden_name as shown
            from .more import *
            from ._src import inner
            raise RuntimeError("was imported")
            """,
        "_src/__init__.py": "",
        "_src/inner.py": f"""
            def hidden_name(x: int, *, axis=None, names={{"one", "two", "and more"}}):
                {_doc("Shifts every entry of x.")}
            def unexported():
                {_doc("Nobody sees this at all.")}
            """,
        "public.py": f"""
            {_doc("A module of public things.")}
            from lib_of_tests._src.inner import unexported
            class Thing:
                {_doc("Holds one thing.")}
                def __init__(self, size): ...
                def turn(self, angle=0):
                    {_doc("Turns the thing round.")}
                def _private(self):
                    {_doc("Private method of it.")}
            def short():
                '''Too short.'''
            def copy(a, /, b):
                {_doc("Shifts every entry of x.")}
            """,
        "tests/thing_test.py": f"def helper():\n    {_doc('A helper of tests.')}",
        "thing_test.py": f"def helper():\n    {_doc('A helper of tests.')}",
        "template.py": "{{ this is not Python }}",
        "_private.py": f"def helper():\n    {_doc('A helper of private use.')}",
    }
    for name, content in files.items():
        file = tmp_path / "lib_of_tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(content))
    monkeypatch.syspath_prepend(tmp_path)
    return "lib_of_tests"


def test_only_public_documented_names_under_their_shortest_name(package):
    documents = docstrings.records([package])
    assert [document["id"] for document in documents] == [
        "lib_of_tests.public",
        "lib_of_tests.public.Thing",
        "lib_of_tests.public.Thing.turn",
        # It has the docstring of `shown`; one of the two copies stays.
        "lib_of_tests.public.copy",
    ]


def test_text_is_name_signature_docstring(package):
    documents = {d["id"]: d for d in docstrings.records([package])}
    thing = documents["lib_of_tests.public.Thing"]
    assert (
        thing["text"]
        == f"lib_of_tests.public.Thing(size)\n\nHolds one thing. {_LONG}\n"
    )
    turn = documents["lib_of_tests.public.Thing.turn"]
    assert turn["text"].startswith("lib_of_tests.public.Thing.turn(angle=0)\n")
    assert documents["lib_of_tests.public.copy"]["text"].startswith(
        "lib_of_tests.public.copy(a, /, b)\n"
    )


def test_reexports_of_private_modules(package, tmp_path):
    public = tmp_path / "lib_of_tests" / "public.py"
    public.unlink()
    (document,) = docstrings.records([package])
    assert document["id"] == "lib_of_tests.shown"
    assert document["text"].startswith(
        "lib_of_tests.shown(x, *, axis=None, names=...)\n"
    )


@pytest.mark.parametrize("name", ["no_such_package", "optax.losses", "six"])
def test_a_package_that_is_not_installed_is_named(name):
    with pytest.raises(InputError, match=f"{name}: is not an installed top-level"):
        docstrings.records([name])


@pytest.fixture(scope="module")
def optax():
    return docstrings.records(["optax"])


def test_a_real_package(optax):
    ids = [document["id"] for document in optax]
    assert ids == sorted(set(ids))
    assert {"optax.adam", "optax.losses.softmax_cross_entropy"} <= set(ids)
    docs = [document["text"].partition("\n\n")[2] for document in optax]
    assert len(set(docs)) == len(docs)
    assert not any("_src" in name for name in ids)


def test_a_file_is_written_once_for_each_version(
    package, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    installed = {package: ["lib-of-tests", "lib-of-tests-more"], "other": ["other"]}
    versions = {"lib-of-tests": "1.0", "lib-of-tests-more": "2"}
    monkeypatch.setattr(
        docstrings.importlib.metadata, "packages_distributions", lambda: installed
    )
    monkeypatch.setattr(docstrings.importlib.metadata, "version", versions.get)
    file = docstrings.file_of(package)
    assert capsys.readouterr().err == f"{file}: writing the docstrings of {package}\n"
    assert file == "runs/.docstrings/lib_of_tests-1.0+2.jsonl"
    read = [record.fields for record in sources.read(file)]
    assert read == docstrings.records([package])
    monkeypatch.setattr(docstrings, "records", pytest.fail)
    assert docstrings.file_of(package) == file
    assert not capsys.readouterr().err
    monkeypatch.undo()
    assert os.listdir(tmp_path / "runs" / ".docstrings") == [file.rpartition("/")[2]]


def test_a_folder_that_cannot_be_written_is_named(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(InputError, match="lib_of_tests.*cannot be written"):
        docstrings.file_of(package)
