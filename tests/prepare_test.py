"""What is prepared is what would be read without it, and damage to it is found."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline, token_cache, token_cache_writer
from mixcpt_jax.data.teacher_cache import Form
from mixcpt_jax.jobs import train
from mixcpt_jax.models import tokenizer as tokenizer_lib
from mixcpt_jax.runtime import metrics
from mixcpt_jax.training import phase as phase_lib
from mixcpt_jax.training import program
from mixcpt_jax.training import teacher_outputs as teacher_lib

SHARD_SIZE = 20_000  # characters, so that there are several


@pytest.fixture
def config(tiny_config, tmp_path):
    (tmp_path / "prepared").mkdir()
    tiny_config.data.prepared = str(tmp_path / "prepared")
    return tiny_config


@pytest.fixture
def few_records(config):
    """A teacher reads all records that there are, so there are few."""
    for source in config.sources.values():
        source.max_records = 60


def tokenizer(config):
    return tokenizer_lib.load(config.model.path)


def make(config, **settings):
    token_cache_writer.prepare(
        config, tokenizer(config), **{"shard_size": SHARD_SIZE} | settings
    )


def load(config):
    return pipeline.load(config, tokenizer(config))


def stream(config, num_batches=30):
    batches = iter(pipeline.batches(config, load(config), 0))
    return [next(batches) for _ in range(num_batches)]


def on_the_fly(config):
    config = config.copy_and_resolve_references()
    config.data.prepared = ""
    return config


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture
def warnings(monkeypatch):
    texts = []

    def warning(text, *args):
        texts.append(text % args)

    monkeypatch.setattr(pipeline.logging, "warning", warning)
    return texts


def shard(config, number=0, source="domain"):
    return pathlib.Path(config.data.prepared, source, f"{number:05d}.array_record")


@pytest.mark.parametrize("packing", ["by_format", "best_fit"])
def test_the_stream_is_the_same_either_way(config, packing, warnings):
    config.data.packing = packing
    make(config)
    data = load(config)
    assert all(
        isinstance(rows.source.examples, token_cache.PreparedExamples)
        for rows in data.packed
    )
    assert [row["prepared"] for row in data.report] == [True, True]
    assert len(list(shard(config).parent.glob("*.array_record"))) > 2
    assert_same(stream(config), stream(on_the_fly(config)))
    assert pipeline.fingerprint(data) == pipeline.fingerprint(load(on_the_fly(config)))
    assert not warnings


@pytest.mark.parametrize("format", ["chat", "chat_preference", "preference"])
def test_every_format_is_prepared(config, format):
    settings = {"format": format, "path": "package:mixcpt_jax/assets/preferences.jsonl"}
    if format == "chat":
        settings["path"] = "package:mixcpt_jax/assets/instructions.jsonl"
    if format == "preference":
        settings["preference_side"] = "both"
    config.sources = {"domain": config_lib.source(**settings)}
    config.data.row_length, config.data.overlong = 200, "truncate"
    make(config)
    assert_same(stream(config), stream(on_the_fly(config)))


def test_workers_make_the_same_shards(config, tmp_path):
    config.clean.near_duplicates = 0.8
    make(config)
    alone = {f.name: f.read_bytes() for f in shard(config).parent.iterdir()}
    config.data.prepared = str(tmp_path / "other")
    with pytest.raises(InputError, match="other: no such folder; run"):
        load(config)
    make(config, num_workers=2)
    assert {f.name: f.read_bytes() for f in shard(config).parent.iterdir()} == alone


def test_ranges_are_read_across_blocks_and_shards(config, monkeypatch):
    monkeypatch.setattr(token_cache, "BLOCK_TOKENS", 64)
    make(config)
    examples, whole = (
        load(c).packed[0].source.examples for c in (config, on_the_fly(config))
    )
    assert len(examples) == len(whole)
    assert examples.num_tokens == whole.num_tokens
    assert examples.num_loss_tokens == whole.num_loss_tokens
    np.testing.assert_array_equal(examples.offsets, whole.offsets)
    for begin, end in [(0, 1), (63, 65), (64, 128), (5, 1000), (0, whole.num_tokens)]:
        for actual, expected in zip(examples.read(begin, end), whole.read(begin, end)):
            np.testing.assert_array_equal(actual, expected)


def test_what_is_cleaned_away_is_counted(config, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = ["a b c d e f g"] * 3 + ["other words than those</s>"]
    lines = [{"text": text, "url": "u"} for text in texts]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config.sources = {"domain": config_lib.source(path=str(file))}
    config.clean.exact_duplicates = True
    config.data.max_epochs = 0
    make(config)
    for settings in (config, on_the_fly(config)):
        (row,) = load(settings).report
        assert row["left_out"] == {"duplicate": 2}
        assert (row["unread"], row["spelt"]) == ({"url": 2}, {"</s>": 1})
        assert row["documents"] == 2
    assert_same(stream(config, 3), stream(on_the_fly(config), 3))


def test_whole_shards_are_kept_and_the_rest_is_repaired(config, capsys):
    make(config)
    expected = stream(config)
    make(config)
    assert "domain: is already prepared" in capsys.readouterr().out
    first, second = shard(config), shard(config, 1)
    kept = second.stat().st_mtime_ns
    first.write_bytes(first.read_bytes()[:-100])
    shard(config, 2).with_suffix(".json").unlink()
    make(config)
    number = len(list(first.parent.glob("*.array_record")))
    out = capsys.readouterr().out
    assert f"in {number} shards, {number - 2} of them kept" in out
    assert second.stat().st_mtime_ns == kept
    assert_same(stream(config), expected)


def test_a_maker_that_was_stopped_goes_on(config, monkeypatch, warnings):
    written = []
    original = token_cache.write_shard

    def write_shard(folder, number, *args):
        if number == 2:
            raise KeyboardInterrupt
        written.append(number)
        return original(folder, number, *args)

    monkeypatch.setattr(token_cache, "write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        make(config)
    assert written == [0, 1]
    # Part of a folder is not taken for the whole.
    assert [row["prepared"] for row in load(config).report] == [False, False]
    assert "holds nothing prepared" in warnings[0]
    monkeypatch.setattr(token_cache, "write_shard", original)
    kept = shard(config, 1).stat().st_mtime_ns
    make(config)
    assert shard(config, 1).stat().st_mtime_ns == kept
    assert_same(stream(config), stream(on_the_fly(config)))


def test_shards_of_an_earlier_longer_source_are_removed(config):
    make(config)
    many = len(list(shard(config).parent.glob("*.array_record")))
    config.sources.domain.max_records = 12
    make(config)
    assert 0 < len(list(shard(config).parent.glob("*.array_record"))) < many
    assert_same(stream(config), stream(on_the_fly(config)))


def write_texts(path, form):
    lines = (json.dumps({"text": form.format(i)}) + "\n" for i in range(40))
    pathlib.Path(path).write_text("".join(lines))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda c: c.sources.domain.update(max_records=20), "max_records"),
        (lambda c: c.sources.domain.update(holdout=5), "holdout"),
        (lambda c: c.clean.update(exact_duplicates=True), "clean"),
        (
            lambda c: write_texts(c.sources.domain.path, "another text, {} of many"),
            "files",
        ),
    ],
)
def test_a_changed_source_is_tokenized_again(config, tmp_path, warnings, change, part):
    config.sources.domain.path = str(tmp_path / "texts.jsonl")
    write_texts(config.sources.domain.path, "text number {} of many")
    make(config)
    change(config)
    assert_same(stream(config), stream(on_the_fly(config)))
    assert f"domain was prepared with other {part}, so it is tokenized" in warnings[0]


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    elif how == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "missing"])
@pytest.mark.parametrize("name", ["00000.array_record", "lengths.npy", "manifest.json"])
def test_damage_is_named_with_its_remedy(config, name, how):
    make(config)
    expected = stream(config)
    file = shard(config).parent / name
    damage(file, how)
    if (name, how) == ("manifest.json", "missing"):
        assert_same(stream(config), expected)
        return
    with pytest.raises(InputError) as error:
        stream(config, 60)
    assert str(file) in str(error.value)
    assert "mixcpt_jax prepare` again, which repairs it" in str(error.value)
    make(config)
    assert_same(stream(config), expected)


def test_a_full_disk_loses_nothing(config, monkeypatch):
    original = token_cache.array_record_module.ArrayRecordWriter

    class Full:
        def __init__(self, file, options):
            self._writer, self._number = original(file, options), file

        def write(self, record):
            if "00001" in self._number:
                raise ValueError("No space left on device")
            self._writer.write(record)

        def close(self):
            self._writer.close()

    with monkeypatch.context() as patch:
        patch.setattr(token_cache.array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(InputError, match=r"00001.*No space left.*resumes here"):
            make(config)
    assert not list(shard(config).parent.glob("*.incomplete"))
    kept = shard(config).stat().st_mtime_ns
    make(config)
    assert shard(config).stat().st_mtime_ns == kept
    assert_same(stream(config), stream(on_the_fly(config)))


def test_a_bad_record_is_named_from_a_worker(config, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "good"}\n{"words": "bad"}\n')
    config.sources.domain.update(path=str(file), holdout=0)
    with pytest.raises(InputError, match="texts.jsonl:2: no field 'text'"):
        make(config, num_workers=1)


@pytest.mark.slow
def test_the_command(config, launcher, write_config_file, tmp_path, capsys):
    file = write_config_file(on_the_fly(config))
    flags = [f"--config={file}", f"--workdir={tmp_path / 'run'}", "--workers=0"]

    def prepare(*more):
        module = "mixcpt_jax.cli.prepare"
        return launcher.start(*flags, *more, num_devices=8, module=module)

    failed = prepare()
    assert failed.wait() == 1
    assert (
        "error: data.prepared: is empty; name the folder to write to" in failed.output
    )
    flags.append(f"--config.data.prepared={config.data.prepared}")
    failed = prepare("--phase=sft")
    assert failed.wait() == 1
    assert "error: --phase=sft: the phases of this config that train are run" in (
        failed.output
    )
    done = prepare("--teacher")
    assert done.wait() == 0, done.output
    assert "domain: the teacher has read" in done.output
    assert not (tmp_path / "run").exists()
    config.objective.teacher = "prepared"
    config.metrics.progress = True
    train.run(config, str(tmp_path / "run"), "run")
    said = capsys.readouterr().err
    assert "domain: read from data.prepared" in said
    assert "teacher: its hidden states are read, it is not run" in said


# The teacher.


def prepared_rows(config, folder):
    """Trains from the teacher cache, and returns the metrics by step."""
    phase = config.copy_and_resolve_references()
    phase.objective.teacher = "prepared"
    teacher_lib.prepare(phase, str(folder), "cpt")
    train.run(phase, str(folder), "cpt")
    return rows(folder)


def rows(folder):
    return {
        row["step"]: row for row in metrics.read(epath.Path(folder)) if "loss" in row
    }


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for step, row in expected.items():
        for name in ("loss", "lssd", "kd", "ntp", "domain/lssd", "grad_norm"):
            assert actual[step][name] == pytest.approx(
                row[name], rel=tolerance, abs=tolerance
            ), (step, name)


def test_a_prepared_teacher_gives_the_losses_of_a_running_one(config, tmp_path):
    # Three epochs, so that rows come again.
    config.sources.instructions.max_records = 40
    config.train.num_steps = 12
    train.run(config, str(tmp_path / "step"), "cpt")
    # Hidden states have 8 bits: logits of order 1 are off by 2^-9 of that.
    assert_close(
        prepared_rows(config, tmp_path / "prepared"), rows(tmp_path / "step"), 4e-3
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_records")
def test_in_bfloat16_a_prepared_teacher_is_exact(config, tmp_path):
    config.model.compute_dtype = "bfloat16"
    train.run(config, str(tmp_path / "step"), "cpt")
    assert_close(
        prepared_rows(config, tmp_path / "prepared"), rows(tmp_path / "step"), 1e-6
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_records")
def test_a_compact_teacher_that_keeps_all_is_exact(config, tmp_path):
    train.run(config, str(tmp_path / "step"), "cpt")
    config.objective.teacher = "prepared"
    config.objective.teacher_top_k = 511
    # Log-probabilities in float16, of 10 nats at most.
    assert_close(
        prepared_rows(config, tmp_path / "prepared"), rows(tmp_path / "step"), 6e-3
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_records")
def test_a_compact_teacher_underestimates_the_divergence(config, tmp_path):
    config.objective.kd_weight = 1.0
    train.run(config, str(tmp_path / "step"), "cpt")
    config.objective.teacher = "prepared"
    config.objective.teacher_top_k = 8
    actual, expected = (
        prepared_rows(config, tmp_path / "prepared"),
        rows(tmp_path / "step"),
    )
    assert "kd" not in actual[6]
    assert actual[6]["kd_lower_bound"] < expected[6]["kd"]
    for name in ("ntp", "swapped"):
        assert actual[1][name] == pytest.approx(expected[1][name], abs=2e-3)


@pytest.mark.usefixtures("few_records")
@pytest.mark.parametrize(("top_k", "leaves"), [(0, 1), (8, 0)])
def test_training_holds_no_more_of_the_teacher_than_it_reads(
    config, tmp_path, top_k, leaves
):
    config.objective.teacher, config.objective.teacher_top_k = "prepared", top_k
    teacher_lib.prepare(config, str(tmp_path / "run"), "cpt")
    phase = phase_lib.start(config, str(tmp_path / "run"), "cpt")
    data = phase.load_data()
    data = pipeline.with_teacher(data, teacher_lib.open_rows(phase, data))
    frozen = program.make_program(phase, data).frozen
    assert len(frozen or {}) == leaves


@pytest.mark.slow
@pytest.mark.usefixtures("few_records")
def test_adapters_read_a_prepared_teacher(config, tmp_path):
    config.lora.rank = 4
    train.run(config, str(tmp_path / "step"), "cpt")
    assert_close(
        prepared_rows(config, tmp_path / "prepared"), rows(tmp_path / "step"), 4e-3
    )


@pytest.mark.slow
@pytest.mark.usefixtures("few_records")
def test_a_source_without_a_teacher_is_not_asked(config, tmp_path):
    config.sources.domain.update(ntp_weight=1.0, lssd_weight=0.0)
    train.run(config, str(tmp_path / "step"), "cpt")
    actual = prepared_rows(config, tmp_path / "prepared")
    assert not pathlib.Path(config.data.prepared, "domain", "teacher").exists()
    for step, row in rows(tmp_path / "step").items():
        assert actual[step]["loss"] == pytest.approx(row["loss"], rel=4e-3)


@pytest.mark.usefixtures("few_records")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c: c.data.update(row_length=32),
            "the teacher cache has row_length=64",
        ),
        (lambda c: c.data.update(packing="best_fit"), "has data.packing='by_format'"),
        (lambda c: c.update(seed=1), "has seed=0, this run 1"),
        (lambda c: c.sources.domain.update(max_records=20), "has tokens="),
        (lambda c: c.model.update(compute_dtype="bfloat16"), "has compute_dtype="),
        (
            lambda c: c.objective.update(teacher_top_k=4),
            "holds no complete teacher cache",
        ),
        (lambda c: c.objective.update(teacher_top_k=999), "vocabulary has 512 tokens"),
    ],
)
def test_a_teacher_of_other_rows_is_refused(config, tmp_path, change, words):
    config.objective.teacher = "prepared"
    teacher_lib.prepare(config, str(tmp_path / "run"), "cpt")
    change(config)
    with pytest.raises(InputError, match=words) as error:
        train.run(config, str(tmp_path / "run"), "cpt")
    assert not (tmp_path / "run").exists()
    if config.objective.teacher_top_k < 999:
        assert "mixcpt_jax prepare --teacher` with this config" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_of_each_form_what_is_broken_is_seen(value):
    hidden = np.zeros((5, 8), ml_dtypes.bfloat16)
    logps = np.full((5, 3), -np.inf, np.float32)  # of a token that cannot be
    for place in range(4):
        forms = (
            (Form.of_hidden_states(8), {"teacher_hidden": hidden.copy()}),
            (Form.compact(2, 9), {"teacher_logps": logps.copy()}),
            (Form.compact(2, 9), {"teacher_tail": logps[:, 0].copy()}),
        )
        for form, arrays in forms:
            (name,) = arrays
            whole = arrays[name]
            is_bits = name == "teacher_hidden"
            assert not form.is_broken({name: whole.view("u2") if is_bits else whole}, 5)
            whole[place, ...] = value
            stored = {name: whole.view("u2") if is_bits else whole}
            assert form.is_broken(stored, place + 1)
            assert not form.is_broken(stored, place)  # what follows is padding


@pytest.mark.usefixtures("few_records")
def test_a_teacher_that_says_no_numbers_is_not_stored(config, tmp_path, monkeypatch):
    start = phase_lib.Phase.starting_params

    def overflowing(phase, dtype):
        params = start(phase, dtype)
        return params | {"final_norm": params["final_norm"] * 3e38}

    monkeypatch.setattr(phase_lib.Phase, "starting_params", overflowing)
    config.objective.teacher, config.objective.teacher_top_k = "prepared", 4
    with pytest.raises(InputError, match=r"domain: row \d+: the teacher's outputs are"):
        teacher_lib.prepare(config, str(tmp_path), "cpt")


@pytest.mark.slow
def test_a_teacher_that_was_stopped_goes_on(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(teacher_lib, "_BYTES_PER_SHARD", 2**16)
    config.objective.teacher = "prepared"
    original, count = token_cache.write_shard, 0

    def write_shard(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(token_cache, "write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        teacher_lib.prepare(config, str(tmp_path / "run"), "cpt")
    with pytest.raises(InputError, match="holds no complete teacher cache"):
        train.run(config, str(tmp_path / "run"), "cpt")
    teacher_lib.prepare(config, str(tmp_path / "run"), "cpt")
    again = count
    teacher_lib.prepare(config, str(tmp_path / "run"), "cpt")
    assert count == again
    train.run(config, str(tmp_path / "run"), "cpt")
    damage(next(pathlib.Path(config.data.prepared).rglob("teacher/*.array_record")),
           "flipped")  # fmt: skip
    config.train.num_steps = 40
    with pytest.raises(InputError, match=r"teacher/\d+.array_record: damaged"):
        train.run(config, str(tmp_path / "other"), "cpt")
