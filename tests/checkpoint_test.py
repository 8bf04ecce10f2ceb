import itertools
import json
import random
import shutil
import time

import jax
import jax.numpy as jnp
import mutations
import numpy as np
import optax
import pytest
from etils import epath
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from mixcpt_jax import config as config_lib
from mixcpt_jax.core import mesh_shape
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.runtime import record, sharding
from mixcpt_jax.training import checkpoint
from mixcpt_jax.training.steps import TrainState

# Threads of TensorStore call into Orbax after the read that they belong to has failed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)

SOURCES = {"domain": "00ff"}
PROVENANCE = {"start": {"weights": "somewhere"}, "files": {}}


def make_state(step, mesh_sizes=(1, 8, 1)):
    mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, mesh_sizes, strict=True)))
    where = sharding.shardings(mesh, {"kernel": ("hidden", "mlp"), "norm": (None,)})
    params = jax.device_put(
        {"kernel": jnp.arange(64.0).reshape(8, 8) + step, "norm": jnp.ones(8)}, where
    )
    counts = sharding.replicated(mesh)
    moments = jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, counts),
        optax.adam(1e-3).init(params),
    )
    return TrainState(jax.device_put(step, counts), params, moments)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def save(folder, steps, **options):
    with checkpoint.Checkpoints(epath.Path(folder), **options) as checkpoints:
        for step in steps:
            checkpoints.save(
                make_state(step),
                step,
                8 * step,
                {"seed": 0},
                SOURCES,
                PROVENANCE,
            )


def restore(folder, template, sources=SOURCES, provenance=PROVENANCE):
    return checkpoint.restore(
        epath.Path(folder), abstract(template), sources, provenance
    )


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    save(tmp_path, [1, 2])
    state = make_state(2)
    step, rows, restored = restore(tmp_path, state)
    assert (step, rows) == (2, 16)
    assert_equal(restored, state)
    assert restored.params["kernel"].sharding == state.params["kernel"].sharding


def test_another_mesh_reads_the_same_numbers(tmp_path):
    save(tmp_path, [2])
    other = make_state(2, mesh_sizes=(2, 2, 2))
    restored = restore(tmp_path, other).state
    assert_equal(restored, other)
    assert restored.params["kernel"].sharding == other.params["kernel"].sharding


def test_the_last_are_kept(tmp_path):
    save(tmp_path, range(1, 8), keep_last=2)
    kept = {int(path.name) for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert kept == {6, 7}


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save(tmp_path, [1])
    folder = tmp_path / checkpoint.FOLDER
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    (folder / "2.orbax-checkpoint-tmp" / "junk").write_text("half")
    assert restore(tmp_path, make_state(1)).step == 1


def test_changed_sources_are_named(tmp_path):
    save(tmp_path, [1])
    with pytest.raises(InputError, match="sources.domain: holds other text"):
        restore(tmp_path, make_state(1), {"domain": "1234"})
    with pytest.raises(InputError, match="sources.general: holds other text"):
        restore(tmp_path, make_state(1), SOURCES | {"general": "1234"})


def test_another_start_is_named(tmp_path):
    save(tmp_path, [1])
    other = {"start": {"init_from": "elsewhere", "step": 3, "id": "ab"}}
    with pytest.raises(InputError, match="trained from .*somewhere.*elsewhere"):
        restore(tmp_path, make_state(1), provenance=other)


def test_another_dtype_is_not_cast_in_silence(tmp_path):
    save(tmp_path, [1])
    state = make_state(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    with pytest.raises(InputError, match=r"\['kernel'\] is .*float32.*bfloat16"):
        restore(tmp_path, state._replace(params=half))


def test_no_two_saves_have_one_identity(tmp_path):
    save(tmp_path / "a", [1, 2])
    save(tmp_path / "b", [2])
    a, b = (checkpoint.identity(str(tmp_path / name)) for name in "ab")
    assert a["step"] == b["step"] == 2
    assert a["id"] != b["id"]
    assert checkpoint.read_config(str(tmp_path / "a")) == {"seed": 0}


def test_hand_over_reads_parameters_alone(tmp_path):
    save(tmp_path, [4, 5])
    params = make_state(5).params
    for folder in (tmp_path, tmp_path / checkpoint.FOLDER):
        loaded = checkpoint.load_params(str(folder), abstract(params))
        assert_equal(loaded, params)


def test_hand_over_names_what_does_not_fit(tmp_path):
    save(tmp_path, [1])
    template = abstract(make_state(1).params)
    wrong = template | {"kernel": jax.ShapeDtypeStruct((8, 9), jnp.float32)}
    with pytest.raises(
        InputError, match=r"\['kernel'\] is \(8, 8\) there and \(8, 9\)"
    ):
        checkpoint.load_params(str(tmp_path), wrong)
    extra = template | {"bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with pytest.raises(InputError, match=r"\['bias'\] is absent there"):
        checkpoint.load_params(str(tmp_path), extra)


def test_hand_over_from_nothing(tmp_path):
    with pytest.raises(InputError, match="has no folder"):
        checkpoint.load_params(str(tmp_path / "none"), {})
    (tmp_path / checkpoint.FOLDER).mkdir()
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.load_params(str(tmp_path), {})


def checksum(x):
    return int(jax.jit(checkpoint.checksum)(x))


def literal_checksum(x):
    """In Python's integers."""
    bits = np.asarray(x).reshape(-1)
    bits = bits.view(f"u{min(bits.dtype.itemsize, 4)}")
    return sum(int(b) * (2 * i + 1) for i, b in enumerate(bits)) % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_every_bit_of_an_array_is_in_its_checksum(dtype):
    rng = np.random.default_rng(0)
    bits = (
        rng.integers(0, 2, (3, 4, 5)) if dtype == "bool" else rng.normal(size=(3, 4, 5))
    )
    array = np.asarray(jnp.asarray(bits).astype(dtype))
    whole = checksum(array)
    assert whole == literal_checksum(array)
    width = 1 if dtype == "bool" else 8 * array.dtype.itemsize
    for bit in range(width):
        index = rng.integers(array.size)
        changed = array.copy()
        changed.reshape(-1).view(f"u{array.dtype.itemsize}")[index] ^= 1 << bit
        assert checksum(changed) != whole
    # Two elements that change places keep the plain sum.
    assert dtype == "bool" or checksum(array[::-1].copy()) != whole


def test_elements_of_eight_bytes_count_as_two():
    with jax.enable_x64(True):
        array = np.random.default_rng(0).normal(size=(3, 5))
        assert checksum(array) == literal_checksum(array)


def test_a_checksum_does_not_depend_on_the_mesh():
    values = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    for sizes in [(1, 8, 1), (2, 2, 2), (8, 1, 1)]:
        mesh = sharding.make_mesh(dict(zip(mesh_shape.MESH_AXES, sizes, strict=True)))
        where = sharding.shardings(mesh, {"kernel": ("hidden", "mlp")})["kernel"]
        assert checksum(jax.device_put(values, where)) == literal_checksum(values)


def damage(file, kind, rng):
    """Deletes a file, cuts it short or flips one of its bits."""
    content = bytearray(file.read_bytes())
    if kind == "delete":
        file.unlink()
    elif kind == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


@pytest.mark.slow
def test_whatever_happens_to_a_file_of_the_newest_the_state_is_one_that_was_saved(
    tmp_path,
):
    save(tmp_path / "whole", [1, 2], keep_last=2)
    states = {step: make_state(step) for step in (1, 2)}
    newest = tmp_path / "whole" / checkpoint.FOLDER / "2"
    rng, fallen_back = random.Random(0), 0
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        for kind in rng.sample(("delete", "truncate", "flip"), 2):
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "whole", copy)
            damage(copy / file.relative_to(tmp_path / "whole"), kind, rng)
            step, rows, state = restore(copy, states[2])
            assert rows == 8 * step
            assert_equal(state, states[step])
            names = {path.name for path in (copy / checkpoint.FOLDER).iterdir()}
            assert names == ({"1", "2"} if step == 2 else {"1", "damaged-2"})
            # A run can resume in this folder and save the same step again.
            with checkpoint.Checkpoints(epath.Path(copy)) as checkpoints:
                assert checkpoints.latest_step() == step
            fallen_back += step == 1
            shutil.rmtree(copy)
    assert fallen_back > 10


def spoil(folder, step):
    (folder / checkpoint.FOLDER / str(step) / "params" / "manifest.ocdbt").unlink()


def test_a_step_that_was_damaged_is_saved_again_and_again(tmp_path, caplog):
    save(tmp_path, [1])
    for _ in range(3):
        save(tmp_path, [2])
        spoil(tmp_path, 2)
        assert restore(tmp_path, make_state(1)).step == 1
        assert "2 is damaged: its file params/manifest.ocdbt is missing" in caplog.text
        assert "the run resumes from step 1" in caplog.text
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {"1", "damaged-2", "damaged-2-2", "damaged-2-3"}


def test_an_older_damaged_checkpoint_is_renamed_too(tmp_path):
    """Orbax reads the metadata of all of them when it opens the folder."""
    save(tmp_path, [1, 2])
    metadata = tmp_path / checkpoint.FOLDER / "1" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace("item_", "itim_"))
    assert restore(tmp_path, make_state(2)).step == 2
    save(tmp_path, [3])
    names = {path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()}
    assert names == {"2", "3", "damaged-1"}


def test_without_a_whole_checkpoint_nothing_is_loaded_or_changed(tmp_path):
    assert restore(tmp_path, make_state(1)) is None
    save(tmp_path, [1, 2])
    spoil(tmp_path, 1)
    spoil(tmp_path, 2)
    folder = tmp_path / checkpoint.FOLDER
    for _ in range(2):
        with pytest.raises(
            InputError,
            match=r"no checkpoint is whole: 2 \(.*\), 1 \(.*delete the folder",
        ):
            restore(tmp_path, make_state(2))
        assert {path.name for path in folder.iterdir()} == {"1", "2"}
    (folder / "2").rename(folder / "damaged-2")
    shutil.rmtree(folder / "1")
    with pytest.raises(InputError, match=r"damaged-2 \(renamed before\)"):
        restore(tmp_path, make_state(2))


def test_what_is_handed_over_is_whole_or_refused(tmp_path):
    save(tmp_path, [1, 2])
    folder, params = tmp_path / checkpoint.FOLDER, abstract(make_state(2).params)
    metadata = folder / "2" / "_CHECKPOINT_METADATA"
    content = metadata.read_text()
    metadata.write_text(content.replace('"rows": 16', '"rows": 17'))
    for read in (
        checkpoint.identity,
        checkpoint.read_config,
        checkpoint.read_provenance,
        lambda folder: checkpoint.load_params(folder, params),
    ):
        with pytest.raises(InputError, match="2 is damaged: its metadata is not what"):
            read(str(tmp_path))
    metadata.write_text(content)
    spoil(tmp_path, 2)
    with pytest.raises(InputError, match="restore a copy of it, or delete that phase"):
        checkpoint.load_params(str(tmp_path), params)
    assert {path.name for path in folder.iterdir()} == {"1", "2"}


def test_values_that_read_well_but_are_others_are_found_out(tmp_path, monkeypatch):
    save(tmp_path, [1, 2])
    load = checkpoint.ocp.load_checkpointables

    def flipped(path, items):
        loaded = load(path, items)
        if path.name == "2":
            kernel = np.array(loaded["params"]["kernel"])
            kernel.view("u4")[3, 3] ^= 1
            where = loaded["params"]["kernel"].sharding
            loaded["params"]["kernel"] = jax.device_put(kernel, where)
        return loaded

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", flipped)
    message = r"array \['params'\]\['kernel'\] has other bits than were saved"
    with pytest.raises(InputError, match=message):
        checkpoint.load_params(str(tmp_path), abstract(make_state(2).params))
    assert restore(tmp_path, make_state(1)).step == 1


def test_an_interruption_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, [1, 2])

    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interruption:
            raise ValueError("as Orbax does") from interruption

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(tmp_path, make_state(2))
    assert {p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()} == {"1", "2"}


def test_hand_over_rounds_as_orbax_did(tmp_path):
    save(tmp_path, [3])
    params = make_state(3).params
    params["kernel"] = params["kernel"] / 7
    half = abstract(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    loaded = checkpoint.load_params(str(tmp_path), half)
    path = epath.Path(tmp_path) / checkpoint.FOLDER / "3"
    expected = checkpoint.ocp.load_checkpointables(path, {"params": half})["params"]
    assert_equal(loaded, expected)
    assert loaded["kernel"].dtype == jnp.bfloat16
    assert loaded["kernel"].sharding == half["kernel"].sharding


def test_a_checkpoint_of_a_version_without_checksums_is_read(tmp_path, monkeypatch):
    original = checkpoint.ocp.training.Checkpointer.save_checkpointables_async

    def save_as_before(self, *args, custom_metadata, **kwargs):
        for key in ("digest", "leaves"):
            del custom_metadata[key]
        return original(self, *args, custom_metadata=custom_metadata, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint.ocp.training.Checkpointer,
            "save_checkpointables_async",
            save_as_before,
        )
        save(tmp_path, [2])
    state = make_state(2)
    assert_equal(restore(tmp_path, state).state, state)
    loaded = checkpoint.load_params(str(tmp_path), abstract(state.params))
    assert_equal(loaded, state.params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    with pytest.raises(InputError, match=r"\['kernel'\] is .*float32.*bfloat16"):
        restore(tmp_path, state._replace(params=half))


def test_a_disk_that_is_full_ends_the_run_in_one_line(tmp_path, monkeypatch):
    save(tmp_path, [1])

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        checkpoint.ocp.training.Checkpointer, "save_checkpointables_async", full
    )
    with pytest.raises(
        InputError, match="cannot be written .*No space left.*free space"
    ):
        save(tmp_path, [2])
    assert restore(tmp_path, make_state(1)).step == 1


def test_a_version_with_another_holdout_is_named(tmp_path):
    save(tmp_path, [1])
    now = PROVENANCE | {"split_version": 2}
    restore(tmp_path, make_state(1), provenance=now)
    with pytest.raises(InputError, match="written by a version with another holdout"):
        restore(tmp_path, make_state(1), {"domain": "1234"}, provenance=now)


def change(tree, rng):
    """Changes, renames or deletes one value somewhere in a tree, or in JSON within it."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = rng.choice(keys)
    if isinstance(tree[key], dict | list) and tree[key] and rng.random() < 0.75:
        change(tree[key], rng)
    elif isinstance(tree[key], str) and tree[key][:1] == "{" and rng.random() < 0.8:
        inner = json.loads(tree[key])
        change(inner, rng)
        tree[key] = json.dumps(inner)
    elif (what := rng.random()) < 0.25:
        del tree[key]
    elif what < 0.35 and isinstance(tree, dict):
        tree[rng.choice(("", "x", "['params']", "files"))] = tree.pop(key)
    else:
        values = (None, 0, -1, 10**30, "", "x", "../x", [], {}, True, 1.5, [[]], "\0")
        tree[key] = rng.choice(values)


def forge(folder, rng):
    """Changes the metadata of the newest checkpoint, with the right digests of it."""
    file = folder / checkpoint.FOLDER / "2" / "_CHECKPOINT_METADATA"
    stored = json.loads(file.read_text())
    record = stored["custom_metadata"]
    change(record, rng)
    record.pop("digest", None)
    record["digest"] = checkpoint._digest(record)
    file.write_text(json.dumps(stored))
    file = file.parent / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["digest"]
    manifest["metadata"] = checkpoint._hash_of_metadata(stored)
    file.write_text(json.dumps(manifest | {"digest": checkpoint._hash(manifest)}))


QUICK_SEEDS = (7, 11, 24, 25)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(seed, marks=() if seed in QUICK_SEEDS else pytest.mark.slow)
        for seed in range(30)
    ],
)
def test_a_forged_checkpoint_is_refused_in_a_line_or_its_state_is_one_that_was_saved(
    two_saved, tmp_path, seed
):
    states = {step: make_state(step) for step in (1, 2)}
    shutil.copytree(two_saved, tmp_path / "run")
    forge(tmp_path / "run", random.Random(seed))
    folder = str(tmp_path / "run")
    for read in (
        checkpoint.identity,
        checkpoint.read_config,
        checkpoint.read_provenance,
        lambda folder: checkpoint.load_params(folder, abstract(states[2].params)),
        lambda folder: checkpoint.newest_readable(epath.Path(folder)),
        lambda folder: assert_one_of(restore(folder, states[2]), states),
    ):
        try:
            read(folder)
        except InputError as error:
            message = str(error)
            assert "\n" not in message


@pytest.mark.slow
def test_a_changed_small_file_is_found_before_orbax_reads_it(
    two_saved, tmp_path, monkeypatch
):
    """Or only the time of the save was changed."""
    state, load, outcomes = make_state(2), checkpoint.ocp.load_checkpointables, []
    monkeypatch.setattr(
        checkpoint.ocp,
        "load_checkpointables",
        lambda *args: outcomes.append("read") or load(*args),
    )
    monkeypatch.setattr(checkpoint.gc, "collect", int)  # which takes most of the time
    for seed in range(mutations.EXAMPLES):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        shutil.copytree(two_saved, folder)
        path = folder / checkpoint.FOLDER
        shutil.rmtree(path / "1")
        files = [file for file in sorted((path / "2").rglob("*")) if file.is_file()]
        file = rng.choice([f for f in files if f.name != "commit_success.txt"])
        content = file.read_bytes()
        mutations.change(file, [other for other in files if other != file], rng)
        unread = len(outcomes)
        try:
            restored = restore(folder, state)
        except InputError as error:
            message = str(error)
            assert "\n" not in message
            assert len(outcomes) == unread
            outcomes.append("refused")
        else:
            assert_equal(restored.state, state)
            is_time = file.name == "_CHECKPOINT_METADATA"
            assert is_time or file.read_bytes() == content
        shutil.rmtree(folder)
    assert outcomes.count("refused") > 0.8 * mutations.EXAMPLES


def test_a_checkpoint_with_its_record_in_the_metadata_and_no_manifest_is_read(
    tmp_path, monkeypatch
):
    """As earlier versions wrote it."""
    texts = {"metrics.jsonl": '{"step": 2}\n', "items.jsonl": ""}
    monkeypatch.setattr(checkpoint.record_lib.Copy, "add", lambda *_: {})
    original = checkpoint.ocp.training.Checkpointer.save_checkpointables_async

    def save_as_before(self, *args, custom_metadata, **kwargs):
        for key in ("record", "digest", "has_manifest"):
            del custom_metadata[key]
        packed = {k: record.pack(text.encode()) for k, text in texts.items()}
        custom_metadata["files"] = packed
        custom_metadata["digest"] = checkpoint._digest(custom_metadata)
        return original(self, *args, custom_metadata=custom_metadata, **kwargs)

    monkeypatch.setattr(
        checkpoint.ocp.training.Checkpointer,
        "save_checkpointables_async",
        save_as_before,
    )
    save(tmp_path, [2])
    (tmp_path / checkpoint.FOLDER / "2" / "manifest.json").unlink()
    assert checkpoint.read_files(epath.Path(tmp_path), 2) == texts
    assert checkpoint.newest_readable(epath.Path(tmp_path)).files == texts
    assert restore(tmp_path, make_state(2)).step == 2


def test_a_checkpoint_whose_record_is_lost_is_not_used(two_saved, tmp_path):
    """Neither the phase's files nor their copy at step 2 are what was written."""
    shutil.copytree(two_saved, tmp_path / "run")
    folder = tmp_path / "run" / checkpoint.FOLDER
    (tmp_path / "run" / checkpoint.RECORD_FOLDER / "2.json").unlink()
    assert restore(tmp_path / "run", make_state(1)).step == 1
    (folder / "damaged-2").rename(folder / "2")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    assert restore(tmp_path / "run", make_state(2)).step == 2


def assert_one_of(restored, states):
    assert_equal(restored.state, states[restored.step])


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory):
    """A run with checkpoints 1 and 2 that have a config and a record."""
    folder = tmp_path_factory.mktemp("two_saved")
    config = {"model": {"path": "x", "param_dtype": "float32"}, "lora": {"rank": 2}}
    with checkpoint.Checkpoints(epath.Path(folder)) as checkpoints:
        for step in (1, 2):
            files = {"metrics.jsonl": f'{{"step": {step}}}\n', "items.jsonl": ""}
            state = make_state(step)
            checkpoints.save(state, step, 8 * step, config, SOURCES, PROVENANCE, files)
    return folder


def test_a_checkpoint_holds_the_record_up_to_its_step(two_saved):
    files = {"metrics.jsonl": '{"step": 2}\n', "items.jsonl": ""}
    assert checkpoint.read_files(epath.Path(two_saved), 2) == files
    kept = checkpoint.newest_readable(epath.Path(two_saved))
    assert (kept.step, kept.files) == (2, files)


def test_a_checkpoint_under_the_number_of_another_is_damaged(tmp_path):
    save(tmp_path, [1, 2])
    folder = tmp_path / checkpoint.FOLDER
    (folder / "2").rename(folder / "7")
    assert restore(tmp_path, make_state(1)).step == 1
    assert {path.name for path in folder.iterdir()} == {"1", "damaged-7"}
    (folder / "1").rename(folder / "3")
    with pytest.raises(InputError, match=r"3 \(it is the checkpoint of step 1\)"):
        restore(tmp_path, make_state(1))
    with pytest.raises(
        InputError, match=r"3 is damaged: it is the checkpoint of step 1"
    ):
        checkpoint.identity(str(tmp_path))


def test_a_checkpoint_of_another_config_is_refused(tmp_path):
    save(tmp_path, [1])
    config = config_lib.default()
    config.seed = 1
    state = make_state(1)
    with pytest.raises(
        InputError, match="was saved by a run with seed=0, this one has 1"
    ):
        checkpoint.restore(
            epath.Path(tmp_path), abstract(state), SOURCES, PROVENANCE, config
        )
    config.seed = 0
    restored = checkpoint.restore(
        epath.Path(tmp_path), abstract(state), SOURCES, PROVENANCE, config
    )
    assert restored.step == 1


def test_a_checkpoint_of_another_run_is_not_handed_over(tmp_path):
    save(tmp_path, [1])
    config = config_lib.default()
    config.train.save_every += 1  # which may change
    (tmp_path / "config.json").write_text(config.to_json())
    assert checkpoint.identity(str(tmp_path))["step"] == 1
    config.optimizer.learning_rate *= 2
    (tmp_path / "config.json").write_text(config.to_json())
    for read in (checkpoint.identity, checkpoint.read_config):
        with pytest.raises(
            InputError, match=r"1: was saved .* optimizer\.learning_rate"
        ):
            read(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert checkpoint.identity(str(tmp_path))["step"] == 1


def test_a_checkpoint_whose_metadata_is_written_late_is_whole(tmp_path, monkeypatch):
    """A thread of Orbax writes it, and does so late on a busy machine."""
    update = orbax_metadata._MetadataStoreImpl.update

    def update_late(*args, **values):
        time.sleep(0.5)
        update(*args, **values)

    monkeypatch.setattr(orbax_metadata._MetadataStoreImpl, "update", update_late)
    save(tmp_path, [1, 2])
    assert restore(tmp_path, make_state(2)).step == 2


@pytest.mark.parametrize("seconds", [-(10**9), -3600, 10**9])
def test_a_clock_that_jumps_ends_no_save(tmp_path, monkeypatch, seconds):
    original, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: original() + seconds * (next(calls) % 2))
    checkpoint.check_folder(epath.Path(tmp_path))
    save(tmp_path, [1, 2])
    assert restore(tmp_path, make_state(2)).step == 2
