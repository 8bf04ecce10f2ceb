"""Killed anywhere and started anew from its files, the stream goes on to the row.

Starting worker processes takes seconds, so of the matrix {format} x {workers} x {hosts}
the usual run takes the cells without workers and one with; `RESUME_MATRIX=whole` takes
them all.
"""

import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from array_record.python import array_record_module
from pyarrow import parquet as pq

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import pipeline
from mixcpt_jax.models import tokenizer as tokenizer_lib

FORMATS = ("jsonl", "parquet", "array_record", "tfds")
HOSTS = {"1 to 1": (1, 1), "2 to 2": (2, 2), "4 to 2": (4, 2)}
EPOCHS = 3


class Cell(NamedTuple):
    file_format: str
    num_workers: int
    hosts: str
    num_kills: int = 5


WHOLE = list(itertools.starmap(Cell, itertools.product(FORMATS, (0, 2), HOSTS)))
USUAL = [cell for cell in WHOLE if not cell.num_workers]
USUAL.append(
    pytest.param(Cell("tfds", 2, "2 to 2", num_kills=1), marks=pytest.mark.slow)
)
CELLS = WHOLE if os.environ.get("RESUME_MATRIX") == "whole" else USUAL


def _records():
    rng = random.Random(0)

    def words(most):
        return " ".join(rng.choices(("ein", "zwei", "drei"), k=rng.randint(1, most)))

    return {
        "documents": [{"text": f"{i} {words(20)}"} for i in range(40)],
        "instructions": [
            {"instruction": f"{i} {words(3)}", "output": words(6)} for i in range(30)
        ],
    }


def _write_tfds(folder, name, records):
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(dict.fromkeys(records[0], text))
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            return enumerate(records)

    Toy(data_dir=folder / name, file_format="array_record").download_and_prepare()


def _write_array_record(file, records):
    writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(json.dumps(record).encode())
    writer.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A folder for each format, with two sources in it, and a tokenizer of bytes."""
    root = tmp_path_factory.mktemp("files")
    for folder in (*FORMATS, "tokenizer"):
        (root / folder).mkdir()
    for name, records in _records().items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (root / "jsonl" / f"{name}.jsonl").write_text(lines)
        table = pa.Table.from_pylist(records)
        file = root / "parquet" / f"{name}.parquet"
        pq.write_table(table, file, row_group_size=7)
        file = root / "array_record" / f"{name}.array_record"
        _write_array_record(file, records)
        _write_tfds(root / "tfds", name, records)
    bpe = tokenizers.ByteLevelBPETokenizer()
    end = "<|endoftext|>"
    bpe.train_from_iterator([], 257, special_tokens=[end], show_progress=False)
    bpe.save(str(root / "tokenizer" / "tokenizer.json"))
    settings = root / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": end}))
    return root


def _config(files, file_format="jsonl", num_workers=0):
    def path(name):
        (found,) = (files / file_format).glob(f"{name}*")
        return str(found)

    config = config_lib.default()
    config.sources.documents = config_lib.source(
        path=path("documents"), weight=0.7, epochs=float(EPOCHS)
    )
    config.sources.instructions = config_lib.source(
        path=path("instructions"),
        format="instruction",
        weight=0.3,
        epochs=float(EPOCHS),
        lssd_weight=0.25,
        ntp_weight=0.75,
    )
    config.data.row_length = 32
    config.data.batch_size = 8
    config.data.num_workers = num_workers
    config.train.num_steps = 0
    return config


def _load(config, files):
    return pipeline.load(config, tokenizer_lib.load(str(files / "tokenizer")))


def _read(config, files, first_row=0, num_batches=None, num_hosts=1):
    """Global batches, of which each host has loaded and read its own rows."""
    parts = []
    for host in range(num_hosts):
        data = _load(config, files)
        iterator = iter(pipeline.batches(config, data, first_row, num_hosts, host))
        parts.append(list(itertools.islice(iterator, num_batches)))
        iterator.close()
    batches = []
    for shares in zip(*parts, strict=True):
        batch = {name: np.concatenate([s[name] for s in shares]) for name in shares[0]}
        batches.append(batch)
    return batches


def _assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def _joined(batches):
    """The rows of the stream, whatever batches they came in."""
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


@pytest.fixture(scope="module")
def whole(files):
    """Format -> the batches of a stream that nothing disturbs, to its end."""
    return {name: _read(_config(files, name), files) for name in FORMATS}


def test_the_stream_is_worth_cutting(files, whole):
    """Several epochs, both sources from one end to the other, rows of several pieces."""
    report = _load(_config(files), files).report
    assert [source["epochs"] for source in report] == [EPOCHS, EPOCHS]
    for batches in whole.values():
        rows = _joined(batches)
        halves = np.array_split(rows["source_ids"][:, 0], 2)
        assert all(set(half) == {0, 1} for half in halves)
        assert rows["segment_ids"].max() > 2
        assert len(np.unique(rows["tokens"], axis=0)) < len(rows["tokens"]) / 2
    for name in ("parquet", "array_record"):
        _assert_same(whole[name], whole["jsonl"])


@pytest.mark.parametrize(
    "cell", CELLS, ids=lambda cell: "-".join(map(str, cell)).replace(" ", "_")
)
def test_kills_at_random_points_change_nothing(files, whole, cell):
    """Everything is loaded anew after each; at one, the number of hosts may change."""
    expected = whole[cell.file_format]
    rng = random.Random(str(cell))
    kills = sorted(rng.sample(range(1, len(expected)), cell.num_kills))
    before, after = HOSTS[cell.hosts]
    change = rng.choice(kills)
    config = _config(files, cell.file_format, cell.num_workers)
    read = []
    for start, stop in itertools.pairwise([0, *kills, None]):
        read += _read(
            config,
            files,
            first_row=start * config.data.batch_size,
            num_batches=None if stop is None else stop - start,
            num_hosts=before if start < change else after,
        )
    _assert_same(read, expected)


@pytest.mark.parametrize("file_format", FORMATS)
def test_batches_of_another_size_go_on_with_the_next_row(files, whole, file_format):
    rng = random.Random(file_format)
    config = _config(files, file_format)
    read, num_rows = [], 0
    for batch_size in (8, 12, 2, 20, 6):
        config.data.batch_size = batch_size
        read += _read(
            config, files, num_rows, rng.randint(1, 4), num_hosts=rng.choice((1, 2))
        )
        num_rows = sum(len(batch["tokens"]) for batch in read)
    config.data.batch_size = 3
    read += _read(config, files, num_rows)
    rows, expected = _joined(read), _joined(whole[file_format])
    # The two fill up their last batch with empty rows, and not with equally many.
    for array in (rows, expected):
        is_real = array["segment_ids"].any(axis=1)
        assert is_real[: is_real.sum()].all()
        for name in array:
            array[name] = array[name][is_real]
    _assert_same([rows], [expected])


def test_shares_that_move_go_on_where_they_were(files):
    config = _config(files)
    for source, share in zip(config.sources.values(), (0.2, 0.8)):
        source.epochs, source.final_weight = 0.0, share
    config.train.num_steps = 30
    expected = _read(config, files, num_batches=40)
    sources = _joined(expected)["source_ids"][:, 0]
    assert sources[-80:].mean() > sources[:80].mean() + 0.1
    kills = sorted(random.Random(0).sample(range(1, 40), 5))
    read = []
    for start, stop in itertools.pairwise([0, *kills, 40]):
        read += _read(config, files, start * config.data.batch_size, stop - start)
    _assert_same(read, expected)


def _endless(files):
    config = _config(files, num_workers=2)
    for source in config.sources.values():
        source.epochs = 0.0
    config.train.num_steps = 1000
    config.data.max_epochs = 0.0
    return config


def append_rows(files, output):
    """What the process does that is killed: row after row to a file, without end."""
    files, output = pathlib.Path(files), pathlib.Path(output)
    config = _endless(files)
    data = _load(config, files)
    row_bytes = sum(array.nbytes for array in data.packed[0].empty_row().values())
    num_rows = output.stat().st_size // row_bytes
    os.truncate(output, num_rows * row_bytes)  # a row that was cut off
    with output.open("ab", buffering=0) as content:
        for batch in pipeline.batches(config, data, num_rows):
            for row in range(config.data.batch_size):
                for name in sorted(batch):
                    content.write(batch[name][row].tobytes())


def _wait_for_the_end_of_its_workers(group):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers outlive the process that they work for")


@pytest.mark.slow
def test_a_reader_with_workers_is_killed_while_it_writes(files, tmp_path, project):
    output = tmp_path / "rows"
    output.touch()
    command = "import resume_test, sys; resume_test.append_rows(*sys.argv[1:])"
    env = os.environ | {
        "PYTHONPATH": f"{project}{os.pathsep}{project / 'tests'}",
        "TMPDIR": str(tmp_path),
    }
    rng = random.Random(0)
    sizes = [0]
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(files), str(output)],
            env=env,
            start_new_session=True,
        )
        wanted = sizes[-1] + rng.randint(5_000, 200_000)
        while process.poll() is None and output.stat().st_size < wanted:
            time.sleep(0.001)
        process.kill()
        returncode = process.wait()
        _wait_for_the_end_of_its_workers(process.pid)
        assert returncode == -signal.SIGKILL
        sizes.append(output.stat().st_size)
    config = _endless(files)
    config.data.num_workers = 0
    read, rows = output.read_bytes(), b""
    for batch in pipeline.batches(config, _load(config, files), first_row=0):
        for row in range(config.data.batch_size):
            rows += b"".join(batch[name][row].tobytes() for name in sorted(batch))
        if len(rows) >= len(read):
            break
    # Not by `==`, whose explanation of a failure would take minutes.
    assert rows.startswith(read), f"killed at {sizes[1:]} bytes"
