import math
import struct

from etils import epath
from tensorboardX.proto import event_pb2

from mixcpt_jax import config as config_lib
from mixcpt_jax import metrics, paths


def open_writer(folder, resume_step, tensorboard=False):
    config = config_lib.default().metrics
    config.tensorboard = tensorboard
    return metrics.Writer(epath.Path(folder), config, resume_step, {})


def test_means_are_taken_from_sums_and_counts_and_empty_ones_left_out():
    pairs = {"loss": (6.0, 4.0), "general/loss": (0.0, 0.0)}
    assert metrics.means(pairs) == {"loss": 1.5}


def test_rows_after_the_resumed_step_are_dropped(tmp_path):
    with open_writer(tmp_path, 0) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    with open_writer(tmp_path, 3) as writer:
        writer.write(4, {"loss": 40.0})
    rows = metrics.read(epath.Path(tmp_path))
    assert [(row["step"], row["loss"]) for row in rows] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
    ]  # fmt: skip


def test_tensorboard_gets_the_same_scalars(tmp_path):
    with open_writer(tmp_path, 0, tensorboard=True) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert scalars(file.read_bytes()) == [(1, "loss", 0.5), (2, "loss", 0.25)]


def scalars(content):
    """Reads TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    found = []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        content = content[16 + length :]
    return found


def test_what_is_not_finite_is_left_out_since_json_has_no_word_for_it(tmp_path):
    with open_writer(tmp_path, 0) as writer:
        writer.write(1, {"loss": 2.0, "tokens_per_second": math.nan})
    (row,) = metrics.read(epath.Path(tmp_path))
    assert row == {"step": 1, "loss": 2.0}


def test_replace_writes_whole_files(tmp_path):
    path = epath.Path(tmp_path) / "file"
    paths.replace(path, "one")
    paths.replace(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_table_is_markdown():
    table = metrics.table(["", "a"], [["first", "1.5"], ["second", "10.25"]])
    assert table.splitlines() == [
        "|        |     a |",
        "| ------ | ----: |",
        "| first  |   1.5 |",
        "| second | 10.25 |",
    ]
