"""Where wall time goes: activities, restarts, and the run's own record of them."""

import json
import math
import sys
import types

import jax
import pytest
from etils import epath

from mixcpt_jax import main
from mixcpt_jax.core import chips
from mixcpt_jax.planning import utilization
from mixcpt_jax.runtime import goodput, record, timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand: `clock.now += seconds`."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(timing.time, "time", lambda: clock.now)
    return clock


def test_each_second_belongs_to_one_activity(clock):
    times = timing.Timing()
    clock.now += 3
    times.enter("steps")
    clock.now += 5
    with times.of("evaluation"):
        clock.now += 7
    clock.now += 11
    row = times.row(4, mfu=0.5, tflops_per_device=math.nan)
    seconds = {name: value for name, value in row["seconds"].items() if value}
    assert seconds == {"starting": 3, "steps": 16, "evaluation": 7}
    assert (row["step"], row["began"], row["time"]) == (4, 1000, 1026)
    assert row["mfu"] == 0.5
    assert "tflops_per_device" not in row


def test_what_a_kill_cost_is_lost(clock):
    """Two steps after the checkpoint, the time after the last row, and the break."""
    rows = []
    first = timing.Timing()
    first.enter("steps")
    rows.append(first.row(0))
    for step in range(1, 5):
        clock.now += 10
        rows.append(first.row(step))
    clock.now += 4 + 100  # killed in step 5, and restarted later
    second = timing.Timing()
    with second.of("restoring"):
        clock.now += 6
    second.enter("steps")
    rows.append(second.row(2))
    clock.now += 30
    rows.append(second.row(5))
    spent = timing.spent(rows)
    assert {name: value for name, value in spent.items() if value} == {
        "steps": 20 + 30,
        "restoring": 6,
        timing.LOST: 2 * 10 + 4 + 100,
    }
    assert sum(spent.values()) == clock.now - 1000
    assert timing.describe(spent) == (
        "28 % of 3 min in steps; lost to restarts 69 %, restoring 3 %"
    )


def test_no_rows_no_time():
    assert timing.spent([]) == {}
    assert timing.describe({}) == ""


def test_damaged_row_costs_what_follows_it_and_is_said(tmp_path, caplog):
    row = timing.Timing().row(1)
    text = record.text_of(row)
    (tmp_path / record.TIMING).write_text(text + "{}\n" + text)
    assert record.read_timing(epath.Path(tmp_path)) == [row]
    assert f"{record.TIMING}:2" in caplog.text


def test_run_records_its_time(tiny_config, tmp_path, capsys):
    """All of it, and the file survives a second process that resumes."""
    tiny_config.train.num_steps, tiny_config.train.save_every = 4, 2
    tiny_config.train.profile = "2:3"
    tiny_config.metrics.progress = True
    main.run(tiny_config, str(tmp_path / "run"))
    rows = record.read_timing(epath.Path(tmp_path / "run"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 4]
    spent = timing.spent(rows)
    assert min(spent[name] for name in ("starting", "compilation", "evaluation")) > 0
    wall = rows[-1]["time"] - rows[0]["began"]
    most = max(0.5, 0.02 * wall)  # on a slow machine, more
    assert sum(spent.values()) == pytest.approx(wall, abs=most)
    assert spent[timing.LOST] < most
    assert all(row["tflops_per_device"] > 0 for row in rows[2:-1])
    assert "in steps" in capsys.readouterr().err
    (trace,) = (tmp_path / "run/tensorboard/plugins/profile").glob("*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = {
        event.name for plane in planes for line in plane.lines for event in line.events
    }
    assert any("train_step" in name for name in names)


class FakeRecorder:
    """The methods of `ml_goodput_measurement`'s that are called, as it declares them."""

    def __init__(self, job_name, logger_name, logging_enabled=False):
        self.calls = [("job", job_name, logger_name, logging_enabled)]

    def record_job_start_time(self, start_time=None):
        self._add("job start", start_time)

    def record_job_end_time(self, end_time=None):
        self._add("job end", end_time)

    def record_step_start_time(self, step, start_time=None):
        self._add(f"step {step}", start_time)

    def record_training_preparation_start_time(self, start_time=None):
        self._add("preparation start", start_time)

    def record_training_preparation_end_time(self, end_time=None):
        self._add("preparation end", end_time)

    def record_data_loading_start_time(self, start_time=None):
        self._add("data start", start_time)

    def record_data_loading_end_time(self, end_time=None):
        self._add("data end", end_time)

    def record_custom_badput_event_start_time(
        self, start_time=None, custom_badput_event_type="unknown"
    ):
        self._add(f"{custom_badput_event_type} start", start_time)

    def record_custom_badput_event_end_time(
        self, end_time=None, custom_badput_event_type="unknown"
    ):
        self._add(f"{custom_badput_event_type} end", end_time)

    def flush(self):
        self.calls.append("flush")

    def _add(self, what, when):
        assert when.tzinfo is not None
        self.calls.append(what)


def test_activities_are_recorded_for_google_cloud(monkeypatch):
    module = types.ModuleType("ml_goodput_measurement")
    module.goodput = types.SimpleNamespace(GoodputRecorder=FakeRecorder)
    monkeypatch.setitem(sys.modules, "ml_goodput_measurement", module)
    recorder = goodput.Recorder("mine-cpt")
    times = timing.Timing(recorder)
    with times.of("restoring"):
        pass
    times.begin_step(1)
    times.enter("compilation")
    times.enter("steps")
    with times.of("evaluation"):
        times.row(1)
    times.begin_step(2)
    times.enter("saving")
    times.finish()
    assert recorder._recorder.calls == [
        ("job", "mine-cpt", "goodput_mine-cpt", True),
        "job start",
        "preparation start",
        *("preparation end", "restoring start", "restoring end", "preparation start"),
        *("step 1", "preparation end", "data start", "data end"),
        *("evaluation start", "evaluation end"),
        *("step 2", "data start", "data end", "saving start"),
        *("saving end", "job end", "flush"),
    ]


def test_signal_traces_the_next_steps(tmp_path):
    from mixcpt_jax.runtime import tracing

    with tracing.Tracer(epath.Path(tmp_path), "") as tracer:
        tracer.before(7)
        tracing.signal.raise_signal(tracing.signal.SIGUSR1)
        for step in range(8, 13):
            tracer.before(step)
            tracer.after(step, jax.numpy.zeros(3) + step)
    assert len(list(tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("value", ["3", "0:2", "a:b", "1:2:3", "1-2"])
def test_profile_of_another_form_is_refused(tiny_config, value):
    from mixcpt_jax import config
    from mixcpt_jax.core.errors import InputError

    tiny_config.train.profile = value
    with pytest.raises(InputError, match=r"train\.profile.*FIRST:LAST"):
        config.validate(tiny_config, 1)


def test_peaks_of_known_devices_alone():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("NVIDIA H200") == 989e12
    sizes = [chips.peak_flops(f"NVIDIA {name}") for name in ("L40S", "L40", "L4")]
    assert sizes == sorted(sizes, reverse=True)
    # A chunk of the head's tokens keeps either busy.
    assert 256 < chips.flops_per_byte("NVIDIA H100 80GB HBM3") < 512
    assert 128 < chips.flops_per_byte("NVIDIA A100-SXM4-40GB") < 256
    assert chips.flops_per_byte("cpu") is None
    assert chips.peak_flops("cpu") is None


def test_use_of_a_device_with_a_known_peak(tiny_config, monkeypatch, tmp_path):
    from mixcpt_jax.training import phase as phase_lib

    monkeypatch.setattr(utilization.chips, "peak_flops", lambda kind: 1e12)
    stats = {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**31, "bytes_limit": 2**34}
    monkeypatch.setattr(utilization, "_memory", lambda device: tuple(stats.values()))
    phase = phase_lib.start(tiny_config, str(tmp_path / "run"), "cpt")
    use = utilization.Utilization(phase, phase.load_data())
    one, two = use.of(1000.0), use.of(2000.0)
    assert two["mfu"] == pytest.approx(2 * one["mfu"])
    assert one["mfu"] == pytest.approx(one["tflops_per_device"])
    assert (one["memory_gib"], one["peak_memory_gib"]) == (1, 2)
    assert json.dumps(one)
