import subprocess
import sys
import textwrap

import pytest

from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import docstrings

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
    assert {d["id"]: d["kind"] for d in documents} == {
        "lib_of_tests.public": "module",
        "lib_of_tests.public.Thing": "class",
        "lib_of_tests.public.Thing.turn": "method",
        # It has the docstring of `shown`; one of the two copies stays.
        "lib_of_tests.public.copy": "function",
    }


def test_text_is_name_signature_docstring(package):
    documents = {d["id"]: d for d in docstrings.records([package])}
    thing = documents["lib_of_tests.public.Thing"]
    assert (
        thing["text"]
        == f"lib_of_tests.public.Thing(size)\n\nHolds one thing. {_LONG}\n"
    )
    assert thing["summary"] == "Holds one thing."
    assert thing["module"] == "lib_of_tests.public"
    assert thing["package"] == "lib_of_tests"
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


def test_exam_is_fair_and_deterministic(optax):
    by_id = {document["id"]: document for document in optax}
    questions = docstrings.exam(optax, 30, seed=0)
    assert len(questions) == 30
    assert questions == docstrings.exam(optax[::-1], 30, seed=0)
    assert questions != docstrings.exam(optax, 30, seed=1)
    assert len({q["doc_id"] for q in questions}) == 30
    assert {q["answer"] for q in questions} == {0, 1, 2, 3}
    for q in questions:
        document = by_id[q["doc_id"]]
        assert len(set(q["choices"])) == 4
        assert document["id"] == f"{document['module']}.{q['choices'][q['answer']]}"
        for choice in q["choices"]:
            sibling = by_id[f"{document['module']}.{choice}"]
            assert sibling["kind"] == document["kind"]
        assert q["choices"][q["answer"]] not in q["question"].split("? ")[1].split()
        assert "\n" not in q["question"]


def test_exam_asks_only_about_the_documents_given(optax):
    given = optax[::2]
    ids = {document["id"] for document in given}
    questions = docstrings.exam(given, 10_000, seed=0)
    assert 0 < len(questions) < len(given)
    assert {q["doc_id"] for q in questions} <= ids


def test_packages_take_turns(optax):
    other = [
        {
            **document,
            "id": f"other.{document['id']}",
            "module": f"other.{document['module']}",
            "package": "other",
            "summary": f"Here: {document['summary']}",
        }
        for document in optax
    ]
    questions = docstrings.exam([*optax, *other], 20, seed=0)
    is_other = [question["doc_id"].startswith("other.") for question in questions]
    assert is_other == [False, True] * 10


@pytest.mark.parametrize(
    ("sentence", "name", "fit"),
    [
        ("Compute the sine of every element", "sin", True),
        ("Alias of another function in here", "foo", False),
        ("Computes it well", "foo", False),
        ("Computes the huber loss of the errors", "huber_loss", False),
        ("Scales all updates by L-BFGS here", "scale_by_lbfgs", False),
        ("The state of the SAM optimiser here", "SAMState", False),
    ],
)
def test_what_makes_a_question(sentence, name, fit):
    assert docstrings._is_fit(sentence, name) == fit


def test_jax_is_not_imported():
    code = (
        "import sys; from mixcpt_jax.data import sources; "
        "next(sources.read('optax', 'docstrings')); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
