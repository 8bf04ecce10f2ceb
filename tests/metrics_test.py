import importlib.machinery
import importlib.util
import math
import re
import struct
import sys
import threading
import types

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import paths
from mixcpt_jax.runtime import metrics


def open_writer(folder, resume_step, tensorboard=False, wandb="", run_config=None):
    config = config_lib.default().metrics
    config.tensorboard = tensorboard
    config.wandb_project = wandb
    return metrics.Writer(epath.Path(folder), config, resume_step, run_config or {})


class FakeWandb(types.ModuleType):
    """A fake wandb; each call of `log` calls the given function."""

    def __init__(self, log=lambda: None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.calls, self._log = [], log

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, values, step):
        self._log()
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")

    def Table(self, columns, data):
        return {"columns": columns, "data": data}


@pytest.fixture
def fake_wandb(monkeypatch):
    def install(log=lambda: None):
        module = FakeWandb(log)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    return install


@pytest.fixture
def warnings(monkeypatch):
    told = []
    monkeypatch.setattr(
        metrics.logging, "warning", lambda text, *values: told.append(text % values)
    )
    return told


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


def values(content):
    """Reads TFRecords: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        yield from ((event.step, value) for value in event.summary.value)
        content = content[16 + length :]


def scalars(content):
    return [(step, value.tag, value.simple_value) for step, value in values(content)]


def test_tensorboard_gets_the_config_and_the_samples_as_text(tmp_path):
    with open_writer(tmp_path, -1, tensorboard=True, run_config={"seed": 3}) as writer:
        writer.write_samples(2, [[{"role": "user", "content": "Why?"}]], ["So."])
    (file,) = (tmp_path / "tensorboard").iterdir()
    texts = {
        value.tag.removesuffix("/text_summary"): value.tensor.string_val[0].decode()
        for _, value in values(file.read_bytes())
    }
    assert '"seed": 3' in texts["config"]
    assert texts["samples/0"] == "Why?\n\n---\n\nSo."


def test_a_slow_copy_gets_everything_in_order_and_delays_no_step(tmp_path, fake_wandb):
    goes_on = threading.Event()
    wandb = fake_wandb(goes_on.wait)
    with open_writer(tmp_path, 0, wandb="mine", run_config={"seed": 3}) as writer:
        for step in range(100):
            writer.write(step, {"loss": float(step)})
        writer.write_samples(99, [[{"role": "user", "content": "Why?"}]], ["So."])
        assert len(metrics.read(epath.Path(tmp_path))) == 100
        assert len(wandb.calls) <= 1  # of `init`
        goes_on.set()
        writer.save()
        assert len(wandb.calls) == 102
    (_, settings), *rows, (_, samples), end = wandb.calls
    assert settings["project"] == "mine"
    assert settings["name"] == "/".join(tmp_path.parts[-2:])
    with open_writer(tmp_path, 99, wandb="mine"):
        pass
    (_, resumed), _ = wandb.calls[-2:]
    assert resumed["id"] == settings["id"]
    assert settings["config"] == {"seed": 3}
    assert rows == [(step, {"loss": float(step)}) for step in range(100)]
    assert samples["samples"]["data"] == [["Why?", "So."]]
    assert end == "finish"


def test_a_copy_that_fails_is_reported_once(tmp_path, fake_wandb, warnings):
    def fail():
        raise ConnectionError("no route")

    fake_wandb(fail)
    with open_writer(tmp_path, 0, wandb="mine") as writer:
        for step in range(5):
            writer.write(step, {"loss": 1.0})
            writer.save()
    (warning,) = warnings
    assert "W&B fails (ConnectionError: no route)" in warning
    assert len(metrics.read(epath.Path(tmp_path))) == 5


def test_a_copy_that_hangs_does_not_delay_the_run(
    tmp_path, fake_wandb, warnings, monkeypatch
):
    monkeypatch.setattr(metrics, "_PATIENCE", 0.05)
    hangs = threading.Event()
    fake_wandb(hangs.wait)
    with open_writer(tmp_path, 0, wandb="mine") as writer:
        writer.write(1, {"loss": 1.0})
        writer.save()
        (warning,) = warnings
    assert "W&B has done nothing" in warning
    hangs.set()


def test_items_of_a_step_measured_again_replace_the_first(tmp_path):
    for right in (False, True):
        with open_writer(tmp_path, 0) as writer:
            items = {"a/exam": np.array([right, True]), "b/loss": np.array([1.23456])}
            writer.write_items(0, items)
    (row,) = metrics.read(epath.Path(tmp_path), metrics.ITEMS_FILE)
    assert row == {"step": 0, "items": {"a/exam": [1, 1], "b/loss": [1.2346]}}


def test_values_that_are_not_finite_are_left_out(tmp_path):
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


def test_a_bar_yields_what_it_is_given(capsys):
    assert list(metrics.track(iter([3, 4]), "exam", 4)) == [3, 4]
    assert capsys.readouterr().err == ""  # no terminal, and done before a line is due


def test_without_a_terminal_lines_show_the_progress(monkeypatch, capsys):
    monkeypatch.setattr(metrics, "_SECONDS_BETWEEN_LINES", 0.0)
    clock = types.SimpleNamespace(monotonic=lambda: 0.0)
    monkeypatch.setattr(metrics, "time", clock)
    for number in metrics.track(iter([1, 2]), "exam", 4):
        clock.monotonic = lambda now=0.6 * number: now
    assert capsys.readouterr().err.splitlines() == ["exam 1/4", "exam 2/4, 1 s left"]
    with (
        metrics.Progress("cpt", 0, 4, enabled=True) as progress,
        progress.measuring(7) as show,
    ):
        show(3)
    assert capsys.readouterr().err == "cpt: measuring 3/7\n"


def test_a_terminal_shows_steps_and_what_is_measured(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setenv("COLUMNS", "120")
    with metrics.Progress("cpt", 0, 4, enabled=True) as progress:
        draw = progress._bar.refresh  # as a thread does ten times a second
        progress.update(1, {"loss": 2.0}, math.nan)
        draw()
        progress.update(2, {"loss": 1.5}, 1000.0)
        with progress.measuring(7) as show:
            show(3)
            draw()
        progress.update(3, {"loss": 1.25}, 1000.0)
        draw()
        progress.update(4, {"loss": 1.0}, 1000.0)
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().err)
    for text in (
        "1/4 loss 2.0000",
        "2/4 loss 1.5000 1,000 tokens/s",
        "measuring",
        "3/7",
    ):
        assert text in shown
    assert "nan" not in shown
    assert "0 s left" not in shown.rpartition("4/4")[2]
    assert re.search(r"3/4 loss 1.2500 1,000 tokens/s, \d+ s left", shown)
    assert "4/4 loss 1.0000 1,000 tokens/s" in shown
    assert shown.rindex("measuring") < shown.rindex("3/4 loss 1.25")
