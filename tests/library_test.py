"""The names that `mixcpt_jax` offers, their examples, and the page about them."""

import doctest
import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import mixcpt_jax
from mixcpt_jax import InputError, Mixture, generate, library, load_model, lssd
from mixcpt_jax.objectives import dense

_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, tiny_model, monkeypatch):
    """The current folder, with the model and the files that the examples name."""
    (tmp_path / "model").symlink_to(tiny_model)
    words = ["params", "optimizer", "schedule", "update", "gradient", "state"]
    texts = [" ".join(words[i % 6 :] + words[: i % 6]) * 5 for i in range(60)]
    write_lines(
        tmp_path / "domain.jsonl", [{"text": f"{i} {t}"} for i, t in enumerate(texts)]
    )
    write_lines(
        tmp_path / "instructions.jsonl",
        [{"prompt": f"Say {i}", "response": t} for i, t in enumerate(texts)],
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, mixcpt_jax\n"
        "assert not {'jax', 'numpy', 'grain'} & set(sys.modules)\n"
        "assert set(mixcpt_jax.__all__) <= set(dir(mixcpt_jax))\n"
        "mixcpt_jax.lssd\n"
        "assert 'jax' in sys.modules and 'grain' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_there_and_documented():
    for name in mixcpt_jax.__all__:
        assert getattr(mixcpt_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        getattr(mixcpt_jax, "nothing")  # noqa: B009


@pytest.mark.parametrize("module", [dense, library], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module, folder):
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.mark.parametrize(("page", "number"), [("docs/library.md", 4), ("README.md", 1)])
def test_page_runs_from_top_to_bottom(project, folder, page, number):
    blocks = _PYTHON.findall((project / page).read_text())
    assert len(blocks) == number
    exec("\n".join(blocks), {"__name__": "page"})


def test_readme_is_short(project):
    assert len((project / "README.md").read_text().splitlines()) <= 120


def test_target_outside_the_vocabulary_is_seen():
    logits = jnp.zeros((3, 5))
    losses = lssd(logits, logits, jnp.array([0, 5, 4]))
    assert np.isnan(losses).tolist() == [False, True, False]


def test_mixture_resumes_and_is_split_among_hosts(folder):
    def make(**more):
        return Mixture(
            {"domain": {"path": "domain.jsonl", "weight": 1.0}},
            "model",
            row_length=32,
            batch_size=4,
            num_steps=4,
            **more,
        )

    whole = [batch["tokens"] for batch in make()]
    assert len(whole) == len(make()) == 4
    rest = [batch["tokens"] for batch in make().batches(first=2)]
    np.testing.assert_array_equal(rest, whole[2:])
    parts = [[b["tokens"] for b in make(num_hosts=2, host=host)] for host in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert make().source_names == ("domain",)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"path": "domain.jsonl", "wieght": 1.0}, "sources.domain.wieght: no such"),
        ({"path": "missing.jsonl", "weight": 1.0}, "missing.jsonl"),
        ({"path": "domain.jsonl", "weight": -1.0}, "weight"),
    ],
)
def test_wrong_source_is_one_line(folder, settings, problem):
    with pytest.raises(InputError, match=problem):
        Mixture({"domain": settings}, "model", row_length=32, num_steps=1)


def test_texts_and_conversations_are_not_mixed(folder):
    with pytest.raises(InputError, match="not both"):
        generate(load_model("model"), ["a", [{"role": "user", "content": "b"}]])
