"""Whatever a run's files hold, `report` makes a page or says in one line why not."""

import json
import random
import shutil

import pytest
from etils import epath
from mutations import EXAMPLES, change
from page_test import write_phase

from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import report
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import token_cache
from mixcpt_jax.data.formats import Examples
from mixcpt_jax.training import phase


@pytest.fixture
def run(tmp_path):
    """A run of two phases."""
    folder = tmp_path / "run"
    plain = {"objective.lssd_weight": 0.0, "objective.ntp_weight": 1.0}
    results = {
        "mixcpt": write_phase(folder, "mixcpt", 0.5, {"init_from": "phase:plain"}),
        "plain": write_phase(folder, "plain", 1.0, plain),
    }
    (folder / "report.json").write_text(json.dumps(results))
    return folder


def changed_copies(folder):
    """Copies of a folder, in each of which one file or two are changed."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for seed in range(EXAMPLES):
        rng = random.Random(seed)
        copy = folder.with_name(f"copy-{seed}")
        shutil.copytree(folder, copy)
        for file in rng.sample(files, rng.choice([1, 1, 2])):
            change(copy / file.relative_to(folder), files, rng)
        yield seed, copy
        shutil.rmtree(copy)


def refusal(work, *args):
    """What a user reads if it is refused; '' if not."""
    try:
        work(*args)
    except InputError as error:
        message = str(error)
        assert "\n" not in message
        return message
    return ""


def test_a_report_of_changed_files_is_a_page_or_a_line(run):
    made = 0
    for seed, copy in changed_copies(run):
        message = refusal(report.main, [str(copy)])
        if not message:
            made += 1
            page = (copy / "report.html").read_text()
            assert page.endswith("</html>"), seed
    assert 0 < made < EXAMPLES


def test_a_phase_with_changed_files_is_finished_or_refused(run, tiny_model):
    config = config_lib.default()
    config.model.path = tiny_model
    for file in run.glob("*/config.json"):
        file.write_text(config.to_json())
    for _, copy in changed_copies(run):
        for name in ("mixcpt", "plain"):
            refusal(phase.finished, config, str(copy / name))


def read_caches(folder):
    """Everything that a run reads again of what was prepared for it."""
    folder = epath.Path(folder)
    token_cache.finished_shard(folder, 0, {"input": "a"})
    if manifest := token_cache.read_manifest(folder):
        token_cache.difference(manifest, {"tokenizer": "a"})
        token_cache.is_undamaged(folder, manifest)
        prepared = token_cache.PreparedExamples(folder, manifest)
        assert len(prepared.load().tokens) == prepared.num_tokens
        assert prepared.num_loss_tokens >= 0


def test_changed_caches_are_read_or_refused(tmp_path):
    folder = epath.Path(tmp_path / "cache")
    folder.mkdir()
    examples = Examples.collect([([1, 2, 3], [0, 1, 1]), ([4] * 5000, [1] * 5000)])
    entry = token_cache.write_examples(folder, 0, examples, {"input": "a", "found": {}})
    token_cache.finish_examples(
        folder, {"tokenizer": "a"}, [entry], {"unread": {"x": 1}}
    )
    assert refusal(read_caches, folder) == ""
    refused = [
        refusal(read_caches, copy) for _, copy in changed_copies(tmp_path / "cache")
    ]
    assert any(refused)
