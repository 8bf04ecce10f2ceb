"""What a resumed run needs is what was written, or is restored, or refused in one line."""

import collections
import json
import pathlib
import random
import re
import shutil

import hypothesis
import jax
import ml_collections
import mutations
import numpy as np
import pytest
from etils import epath
from hypothesis import strategies as st
from mutations import EXAMPLES

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import metrics, record
from mixcpt_jax.training import phase

STEP = 4
NAMES = (record.METRICS, record.SAMPLES, record.ITEMS)
KINDS = ("delete", "repeat", "swap", "wrong", "cut", "bytes", "gone")
DEEP = "[" * 3000
WRONG = ['{"step": 1, "loss": NaN}', '{"step": -1}', '{"step": "1"}', "[]", "null", "{"]
WRONG += [
    "1",
    "",
    " ",
    "\0",
    '{"step": 1, "x": 1e999}',
    '{"step": 1, "loss": {}}',
    DEEP,
]
WRONG += ['{"step": 1, "items": 3}', '{"step": 1, "messages": [], "answer": ""}']
WRONG += ['{"step": 1, "x": "' + "y" * 10_000 + '"}', '{"step": ' + "9" * 5000 + "}"]


def write_record(folder):
    """A record up to `STEP` and a copy of it, then rows of work that will be lost."""
    config = config_lib.default().metrics
    config.tensorboard = False
    with metrics.Writer(epath.Path(folder), config, -1, {}) as writer:
        for step in range(STEP + 3):
            if step == STEP + 1:
                copies = writer.texts()
            writer.write(step, {"loss": 1 / (step + 3), "learning_rate": 1e-3})
            if step % 2 == 0:
                items = {"a/loss": np.array([0.1, step]), "a/correct": np.array([0, 1])}
                writer.write_items(step, items)
                writer.write(step, {"eval/a/loss": 0.3 + step})
                prompt = [{"role": "user", "content": "x\u2028\ny"}]
                writer.write_samples(step, [prompt], [f"answer {step}"])
    return copies


def outcome(function, *args):
    """What a function returns, and what it says if it refuses to."""
    try:
        return function(*args), ""
    except InputError as error:
        return None, str(error)


def read_all(folder):
    return {name: record.read(epath.Path(folder), name) for name in NAMES}


@st.composite
def changes(draw):
    """A function that changes the lines of a file; it may change nothing."""
    kind = draw(
        st.sampled_from(("delete", "repeat", "swap", "wrong", "cut", "bytes", "gone"))
    )
    place, other = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    wrong = draw(st.sampled_from(WRONG)).encode() + b"\n"
    noise = draw(st.binary(min_size=1, max_size=6))

    def change(file):
        lines = file.read_bytes().splitlines(keepends=True)
        i, j = place % len(lines), other % len(lines)
        match kind:
            case "delete":
                del lines[i]
            case "repeat":
                lines.insert(i, lines[j])
            case "swap":
                lines[i], lines[j] = lines[j], lines[i]
            case "wrong":
                lines.insert(i, wrong)
            case "cut":
                lines[i] = lines[i][: len(lines[i]) // 2]
            case "bytes":
                middle = len(lines[i]) // 2
                lines[i] = lines[i][:middle] + noise + lines[i][middle:]
        if kind == "gone":
            file.unlink()
        else:
            file.write_bytes(b"".join(lines))

    return change


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    return folder, write_record(folder)


def changed_copy(tmp_path_factory, source, name, change):
    """A copy of a folder in which one file is changed."""
    folder = tmp_path_factory.mktemp("changed") / "run"
    shutil.copytree(source, folder)
    change(folder / name)
    return folder


@hypothesis.given(name=st.sampled_from(NAMES), change=changes())
def test_whatever_happens_to_a_record_it_is_restored_from_its_copy(
    written, tmp_path_factory, name, change
):
    source, copies = written
    folder = changed_copy(tmp_path_factory, source, name, change)
    expected = {
        k: [r for r in v if r["step"] <= STEP] for k, v in read_all(source).items()
    }
    assert {len(rows) for rows in expected.values()} == {8, 3}
    record.restore(epath.Path(folder), STEP, copies)
    assert read_all(folder) == expected
    shutil.rmtree(folder)


@hypothesis.given(name=st.sampled_from(NAMES), change=changes())
def test_a_damaged_line_is_named_and_none_is_left_out_in_silence(
    written, tmp_path_factory, name, change
):
    source, _ = written
    folder = changed_copy(tmp_path_factory, source, name, change)
    lines = []
    if (folder / name).exists():
        lines = (folder / name).read_bytes().split(b"\n")
    rows, refusal = outcome(record.read, epath.Path(folder), name)
    if refusal:
        found = re.match(re.escape(f"{folder / name}:") + r"(\d+): [^\n]+$", refusal)
        assert found, refusal
        assert 1 <= int(found[1]) < len(lines)
    else:
        # But for the last, which a kill may have cut.
        assert len(rows) >= len(lines) - 1
    shutil.rmtree(folder)


def test_without_a_copy_what_is_damaged_is_refused(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "run")
    file = tmp_path / "run" / record.METRICS
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], "{\n", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl:3: not JSON"):
        record.restore(epath.Path(file).parent, STEP, {})
    # Unless it is of work that is lost anyway.
    file.write_text("".join([*lines, "{\n"]))
    rows = record.restore(epath.Path(file).parent, STEP, {})[record.METRICS]
    assert rows == [
        json.loads(line) for line in lines if json.loads(line)["step"] <= STEP
    ]


def test_what_was_measured_after_the_checkpoint_stays(written, tmp_path):
    shutil.copytree(written[0], tmp_path / "run")
    copies = dict(written[1])
    *lines, last = copies[record.METRICS].splitlines(keepends=True)
    copies[record.METRICS] = "".join(lines)
    record.restore(epath.Path(tmp_path) / "run", STEP, copies)
    assert record.read(epath.Path(tmp_path) / "run")[-1] == json.loads(last)


def grown(texts, rng, step):
    """Later texts of a record: rows are added, and sometimes earlier ones replaced."""
    texts = dict(texts)
    if rng.random() < 0.2:
        texts[record.ITEMS] = ""
    for name in NAMES:
        for _ in range(rng.randrange(3)):
            texts[name] += (
                json.dumps({"step": step, "x": rng.randbytes(40).hex()}) + "\n"
            )
    return texts


def write_copies(folder, rng):
    """Copies of processes, some of which resume from the last but one checkpoint.

    Returns:
      The steps of the two last checkpoints -> lengths and texts.
    """
    saved = [(0, {}, dict.fromkeys(NAMES, ""))]
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.3 and len(saved) > 1:
            saved.pop()
        step, _, texts = saved[-1]
        copy = record.Copy(folder)
        for _ in range(rng.randint(1, 4)):
            step += rng.randint(1, 3)
            texts = grown(texts, rng, step)
            kept = [entry[0] for entry in saved]
            saved = [*saved[-1:], (step, copy.add(step, texts, kept), texts)]
    return {step: (lengths, texts) for step, lengths, texts in saved if lengths}


def test_a_copy_in_parts_is_whole_after_any_restarts(tmp_path):
    for seed in range(EXAMPLES):
        folder = epath.Path(tmp_path / str(seed))
        for step, (lengths, texts) in write_copies(folder, random.Random(seed)).items():
            assert record.read_copy(folder / "no", folder, step, lengths) == texts


def test_a_changed_copy_or_file_is_never_taken_for_what_was_written(tmp_path):
    """If only one of the two is changed, the other is read."""
    outcomes = collections.Counter()
    for seed in range(EXAMPLES):
        rng = random.Random(seed)
        folder = epath.Path(tmp_path / str(seed))
        step, (lengths, texts) = write_copies(folder / "copy", rng).popitem()
        for name, content in texts.items():
            (folder / name).write_text(content + '{"step": 99}\n')
        parts = sorted(pathlib.Path(folder / "copy").iterdir())
        files = [pathlib.Path(folder / name) for name in NAMES if texts[name]]
        what = rng.choice(("parts", "files", "both"))
        for name, changed in (("parts", parts), ("files", files)):
            if what in (name, "both") and changed:
                file = rng.choice(changed)
                others = [other for other in parts + files if other != file]
                mutations.change(file, others or [__file__], rng)
        arguments = folder, folder / "copy", step, lengths
        found, refusal = outcome(record.read_copy, *arguments)
        assert found == texts if found is not None else what == "both"
        assert "\n" not in refusal
        outcomes[what, bool(refusal)] += 1
        shutil.rmtree(folder)
    assert outcomes["both", True]
    assert outcomes["both", False]


def test_a_save_costs_what_is_new(tmp_path):
    folder, rng = epath.Path(tmp_path), random.Random(0)
    copy, texts, kept = record.Copy(folder), dict.fromkeys(NAMES, ""), []
    for step in range(100):
        line = json.dumps({"step": step, "x": rng.randbytes(500).hex()}) + "\n"
        texts[record.METRICS] += line
        copy.add(step, texts, kept)
        kept = [*kept[-1:], step]
    sizes = [file.stat().length for file in folder.iterdir()]
    assert len(sizes) == 100
    assert max(sizes) < 2 * min(sizes)
    # The first save of the next process holds everything; what nobody needs is deleted.
    record.Copy(folder).add(100, texts, [])
    assert [file.name for file in folder.iterdir()] == ["100.json"]


@pytest.mark.parametrize("name", ["../x", "results.json", ""])
def test_no_other_file_is_read_as_a_record(tmp_path, name):
    with pytest.raises(InputError, match="no file of a record"):
        record.read_copy(epath.Path(tmp_path), epath.Path(tmp_path), 1, {name: [1, ""]})


FILES = (*NAMES, "results.json", "provenance.json", "config.json")
VALUES = st.sampled_from(
    [None, 0, -1, 10**30, "", "x", [], {}, True, 1.5, [[]], {"a": 1}]
)


@st.composite
def json_changes(draw):
    """A function that changes a value of a JSON file, or the file as a whole."""
    choices = draw(st.lists(st.integers(0, 10**6), min_size=6, max_size=6))
    text = draw(
        st.sampled_from(["", "{", "[]", "null", "NaN", "\0", DEEP, "gone", *[""] * 8])
    )
    value, is_deleted = draw(VALUES), draw(st.booleans())

    def change(file):
        if text == "gone":
            file.unlink()
        elif text:
            file.write_text(text)
        else:
            content = json.loads(file.read_text())
            change_value(content, choices, value, is_deleted)
            file.write_text(json.dumps(content))

    return change


def change_value(tree, choices, value, is_deleted):
    """Changes or deletes one value somewhere in a tree."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return
    key = keys[choices[0] % len(keys)]
    if (
        isinstance(tree[key], dict | list)
        and tree[key]
        and choices[1:]
        and choices[0] % 3
    ):
        change_value(tree[key], choices[1:], value, is_deleted)
    elif is_deleted:
        del tree[key]
    else:
        tree[key] = value


@pytest.mark.slow
@hypothesis.given(name=st.sampled_from(FILES), change=changes(), other=json_changes())
def test_of_a_finished_phase_nothing_damaged_is_taken(
    tiny_run, tmp_path_factory, name, change, other
):
    """It counts as finished with what was written, or not, or is refused in a line."""
    run = tmp_path_factory.mktemp("runs") / "run"
    # No arrays are read.
    ignored = shutil.ignore_patterns("adapters", "export", "params", "optimizer")
    shutil.copytree(tiny_run, run, ignore=ignored)
    given = ml_collections.ConfigDict(
        json.loads((run / "whole/config.json").read_text())
    )
    before = read_all(run / "whole")
    file = run / "whole" / name
    if file.exists():
        (change if name in NAMES else other)(file)
    results, refusal = outcome(phase.finished, given, str(run / "whole"))
    assert "\n" not in refusal
    if results is not None:
        after = read_all(run / "whole")
        assert all(after[n][: len(rows)] == rows for n, rows in before.items())
        assert isinstance(results["after"], dict)
    shutil.rmtree(run.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        lambda run: (run / "metrics.jsonl").unlink(),
        lambda run: (run / "metrics.jsonl").write_text("x\n"),
        lambda run: (run / "results.json").write_text("[]"),
        lambda run: (run / "provenance.json").write_text("{}"),
        lambda run: (run / "config.json").unlink(),
        lambda run: (run / "config.json").write_text("{"),
        lambda run: [
            (run / "results.json").unlink(),
            (run / "items.jsonl").unlink(),
            (run / "samples.jsonl").write_text('{"step": 0}\n'),
        ],
    ],
)
def test_a_run_whose_files_were_damaged_ends_as_if_they_had_not(
    tiny_config, tmp_path, caplog, damage
):
    run = tmp_path / "run"
    folders, results = main.run(tiny_config, str(run))
    before = read_all(run)
    damage(run)
    assert main.run(tiny_config, str(run))[0] == folders
    assert read_all(run) == before
    again = json.loads((run / "results.json").read_text())
    assert again["after"] == results["run"]["after"]
    assert json.loads((run / "provenance.json").read_text())["start"]
    assert json.loads((run / "config.json").read_text())["train"]["num_steps"] == 6
    assert caplog.messages
    jax.clear_caches()
