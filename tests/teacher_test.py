"""Another teacher: of another size, with other padding, in the step or prepared."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import tiny
import tokenizers
from etils import epath

from mixcpt_jax import config as config_lib
from mixcpt_jax import main
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import pipeline
from mixcpt_jax.jobs import train
from mixcpt_jax.models import pretrained, transformer
from mixcpt_jax.models import tokenizer as tokenizer_lib
from mixcpt_jax.objectives import dense
from mixcpt_jax.planning import step_plan
from mixcpt_jax.runtime import metrics, sharding
from mixcpt_jax.training import checkpoint, program, teacher_outputs
from mixcpt_jax.training import phase as phase_lib


def write_model(folder, tokenizer, seed, **settings) -> str:
    """A random model; its rows of padding have large logits, so that they would show."""
    model_config = tiny.architecture(**settings)
    params = transformer.init_params(model_config, jax.random.key(seed))
    padding = slice(tiny.NUM_TOKENS, None)
    params["embedding"] = 5 * params["embedding"].at[padding].multiply(3)
    if "unembedding" in params:
        params["unembedding"] = 8 * params["unembedding"].at[:, padding].multiply(3)
    pretrained.save_pretrained(
        str(folder), params, model_config, dtype="float32", tokenizer=tokenizer
    )
    return str(folder)


@pytest.fixture(scope="session")
def models(once, tiny_model) -> pathlib.Path:
    """Folders of models with one vocabulary and padding of different sizes."""

    def make(folder):
        tokenizer = tokenizer_lib.load(tiny_model)
        write_model(
            folder / "student", tokenizer, 1, vocab_size=528, tie_embeddings=True
        )
        larger = {"hidden_size": 48, "num_layers": 3, "num_heads": 6}
        write_model(folder / "padded", tokenizer, 2, vocab_size=560, **larger)
        write_model(folder / "cut", tokenizer, 3, tie_embeddings=True, **larger)
        renamed = tokenizers.Tokenizer.from_file(f"{tiny_model}/tokenizer.json")
        state = renamed.to_str().replace('"<|im_end|>"', '"<|eot|>"')
        (folder / "renamed").mkdir()
        (folder / "renamed" / "tokenizer.json").write_text(state)
        config = (folder / "padded" / "config.json").read_text()
        (folder / "renamed" / "config.json").write_text(config)

    return once("teachers", make)


@pytest.fixture
def config(tiny_config, models):
    tiny_config.model.path = f"{models}/student"
    tiny_config.teacher.path = f"{models}/padded"
    tiny_config.objective.update(ntp_weight=0.5, lssd_weight=0.7, kd_weight=0.4)
    tiny_config.sources.instructions.update(selective_weight=0.6)
    tiny_config.train.num_steps = 4
    tiny_config.train.eval_before = False
    for source in tiny_config.sources.values():
        source.max_records = 60
    return tiny_config


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def logits_of(path, batch):
    """The logits of the vocabulary's tokens in float64, from the files of a model."""
    model_config = pretrained.read_model_config(path)
    params = pretrained.load_params(path, transformer.abstract_params(model_config))
    hidden = transformer.make_forward(model_config)(
        params, *(batch[k] for k in ("tokens", "positions", "segment_ids"))
    )
    matrix, vocab_first = transformer.unembedding(params)
    matrix = np.asarray(matrix.T if vocab_first else matrix, np.float64)
    return np.asarray(hidden, np.float64) @ matrix[:, : tiny.NUM_TOKENS]


def oracle(student, teacher, batch):
    """The loss and the KL of a batch, from logits, as in the formulas."""
    log_q, log_p = log_softmax(student), log_softmax(teacher)
    p, top, gold = np.exp(log_p), log_p.argmax(-1), batch["targets"]

    def pick(x, ids):
        return np.take_along_axis(x, ids[..., None], -1)[..., 0]

    swapped = log_p.copy()
    np.put_along_axis(swapped, top[..., None], pick(log_p, gold)[..., None], -1)
    np.put_along_axis(swapped, gold[..., None], pick(log_p, top)[..., None], -1)
    ntp, kd = -pick(log_q, gold), (p * (log_p - log_q)).sum(-1)
    lssd = (np.exp(swapped) * (swapped - log_q)).sum(-1)
    losses = {"ntp": ntp, "kd": kd, "lssd": lssd}
    losses["selective"] = np.where(top == gold, kd, ntp)
    total = sum(batch[f"{name}_weights"] * x for name, x in losses.items())
    mask = batch["loss_mask"]
    return total.sum() / mask.sum(), (mask * kd).sum() / mask.sum()


@pytest.mark.parametrize("teacher", ["padded", "cut"])
@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_equals_the_formulas_over_the_tokens_of_the_vocabulary(
    config, models, tmp_path, teacher, rank
):
    """Streamed against NumPy in float64, its gradient against the dense losses."""
    config.teacher.path = f"{models}/{teacher}"
    config.lora.rank = rank
    phase = phase_lib.start(config, str(tmp_path / "run"), "cpt")
    data = pipeline.load(phase.config, phase.tokenizer)
    batch = next(iter(pipeline.batches(phase.config, data, 0)))
    with jax.set_mesh(phase.mesh):
        built = program.make_program(phase, data)
        state = program.starting_state(phase, built)
        frozen = program.frozen_part(phase, data)(phase.starting_params("float32"))
        assert (frozen is None) == (rank == 0)
        _, found = built.train_step(
            state, frozen, phase.put(batch), phase.teacher_params()
        )
    found = jax.device_get(found)
    logits = [logits_of(p, batch) for p in (config.model.path, config.teacher.path)]
    loss, kd = oracle(*logits, batch)
    np.testing.assert_allclose(found["loss"][0], loss, rtol=2e-5)
    np.testing.assert_allclose(found["kd"][0] / found["kd"][1], kd, rtol=2e-5)
    if rank:
        return

    model_config = pretrained.read_model_config(config.model.path)
    template = transformer.abstract_params(model_config)
    params = pretrained.load_params(config.model.path, template)
    forward = transformer.make_forward(model_config)
    inputs = [batch[k] for k in ("tokens", "positions", "segment_ids")]

    def dense_loss(params):
        hidden = forward(params, *inputs)
        student = transformer.logits(params, hidden)[..., : tiny.NUM_TOKENS]
        teacher, targets = jnp.float32(logits[1]), batch["targets"]
        total = (
            batch["ntp_weights"] * dense.cross_entropy(student, targets)
            + batch["lssd_weights"] * dense.lssd(student, teacher, targets)
            + batch["kd_weights"] * dense.distillation(student, teacher)
            + batch["selective_weights"] * dense.selective(student, teacher, targets)
        )
        return total.sum() / batch["loss_mask"].sum()

    value, gradient = jax.jit(jax.value_and_grad(dense_loss))(params)
    np.testing.assert_allclose(value, loss, rtol=2e-5)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(found["grad_norm"][0], norm, rtol=1e-4)


def rows(folder):
    return [row for row in metrics.read(epath.Path(folder)) if "loss" in row]


def stop_in(patch, step):
    """Ends a run once it has saved a step."""
    original = checkpoint.Checkpoints.save

    def save(checkpoints, state, number, *args):
        original(checkpoints, state, number, *args)
        checkpoints.wait()
        if number == step:
            raise KeyboardInterrupt

    patch.setattr(checkpoint.Checkpoints, "save", save)


@pytest.mark.slow
def test_a_run_with_another_teacher_resumes_exactly(config, models, tmp_path):
    train.run(config, str(tmp_path / "whole"), "cpt")
    with pytest.MonkeyPatch.context() as patch:
        stop_in(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, str(tmp_path / "killed"), "cpt")
    # The teacher's folder may move, another teacher is refused.
    shutil.copytree(f"{models}/padded", tmp_path / "moved")
    for path, found in (("cut", "'weights':"), ("", "now its start")):
        config.teacher.path = path and f"{models}/{path}"
        with pytest.raises(InputError, match=f"was distilled from .*{found}"):
            train.run(config, str(tmp_path / "killed"), "cpt")
    config.teacher.path = str(tmp_path / "moved")
    train.run(config, str(tmp_path / "killed"), "cpt")
    of_time = {"tokens_per_second"}
    one, two = (
        [{k: v for k, v in row.items() if k not in of_time} for row in rows(f)]
        for f in (tmp_path / "whole", tmp_path / "killed")
    )
    assert one == two
    assert len(one) == 4
    folders = [str(tmp_path / name) for name in ("whole", "killed")]
    model_config = pretrained.read_model_config(config.model.path)
    mesh = sharding.make_mesh(config.mesh)
    ends = [phase_lib.load_params(f, model_config, mesh, "float32") for f in folders]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(ends))
    provenance = checkpoint.read_provenance(folders[0])
    assert provenance["teacher"]["identity"] == pretrained.identity(f"{models}/padded")
    assert provenance["start"]["weights"] == f"{models}/student"
    # A finished phase is not taken for one of another teacher.
    config.teacher.path = f"{models}/cut"
    with pytest.raises(InputError, match="killed: was made from .*which is now"):
        train.run(config, folders[1], "cpt")


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "tolerance"), [(0, 4e-3), (511, 2e-2)])
def test_a_prepared_teacher_gives_the_losses_of_a_running_one(
    config, models, tmp_path, top_k, tolerance
):
    config.train.num_steps = 2
    (tmp_path / "prepared").mkdir()
    config.data.prepared = str(tmp_path / "prepared")
    train.run(config, str(tmp_path / "step"), "cpt")
    config.objective.teacher, config.objective.teacher_top_k = "prepared", top_k
    teacher_outputs.prepare(config, str(tmp_path / "run"), "cpt")
    # Of another model, or of the start, they are refused.
    for path in ("", f"{models}/cut"):
        other = ml_collections.ConfigDict(config.to_dict())
        other.teacher.path = path
        with pytest.raises(InputError, match="the teacher cache has .*`python -m"):
            train.run(other, str(tmp_path / "run"), "cpt")
    train.run(config, str(tmp_path / "run"), "cpt")
    for one, two in zip(rows(tmp_path / "step"), rows(tmp_path / "run"), strict=True):
        for name in ("loss", "ntp", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=tolerance), name


@pytest.mark.slow
def test_the_end_of_an_earlier_phase_is_a_teacher(config, tmp_path):
    """Even of adapters; the model starts from its own weights."""
    config.teacher.path = ""
    config.train.num_steps = 1
    config.optimizer.learning_rate = 0.3
    config.phases = ("first", "second")
    config.overrides.first = {"lora": {"rank": 2}}
    config.overrides.second = {"teacher": {"init_from": "phase:first"}}
    main.run(config, str(tmp_path / "run"))
    facts = checkpoint.read_provenance(str(tmp_path / "run" / "second"))
    first = checkpoint.identity(str(tmp_path / "run" / "first"))
    assert facts["teacher"] == first | {
        "init_from": "phase:first",
        "architecture": facts["start"]["architecture"],
    }
    assert "init_from" not in facts["start"]
    (row,) = rows(tmp_path / "run" / "second")
    assert row["kd"] > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda c, folder: c.teacher.update(path=f"{folder}/renamed"),
            r"renamed: the teacher's 512 tokens are not the 512 of the model in "
            r".*student: token 2 is '<\|eot\|>' instead of '<\|im_end\|>'; use",
        ),
        (
            lambda c, folder: c.data.update(row_length=300) or
            c.model.update(path=f"{folder}/long"),
            "row_length=300: longer than the teacher's context of 256",
        ),
        (
            lambda c, folder: c.mesh.update(fsdp=2, tensor=4),
            "mesh.tensor=4 does not divide the teacher's 6 attention heads",
        ),
        (
            lambda c, folder: c.teacher.update(path="", tokenizer="x"),
            "teacher.tokenizer=x: teacher.path and teacher.init_from are empty",
        ),
        (
            lambda c, folder: c.objective.update(lssd_weight=0.0, kd_weight=0.0)
            or c.sources.instructions.update(lssd_weight=0.0, selective_weight=0.0),
            "teacher: no phase distils from .*padded, as every weight that needs a",
        ),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused_before_weights_are_read(
    config, models, tmp_path, monkeypatch, change, words
):
    shutil.copytree(f"{models}/student", tmp_path / "long")
    text = (tmp_path / "long" / "config.json").read_text()
    (tmp_path / "long" / "config.json").write_text(
        text.replace('"max_position_embeddings": 256', '"max_position_embeddings": 512')
    )
    change(config, tmp_path)
    (tmp_path / "renamed").symlink_to(models / "renamed")
    monkeypatch.setattr(pretrained, "identity", None)
    monkeypatch.setattr(pretrained, "load_params", None)
    config.phases = ("generate", "cpt")
    config.overrides.generate = {"job": "generate"}
    config.overrides.cpt = {}
    with pytest.raises(InputError, match=words) as error:
        main.run(config, str(tmp_path / "run"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "generate").exists()


def test_names_of_padding_are_no_tokens(tiny_model):
    tokenizer = tokenizer_lib.load(tiny_model)
    padded = tokenizers.Tokenizer.from_str(tokenizer.model.source)
    padded.add_tokens([f"[PAD{i}]" for i in range(512, 520)])
    padded = tokenizer_lib.JsonModel(padded.to_str())
    with_padding = tokenizer_lib.dataclasses.replace(tokenizer, model=padded)
    assert with_padding.vocab_size == 520
    assert tokenizer_lib.shared_size(tokenizer, with_padding, "a", "b") == 512
    padded = tokenizers.Tokenizer.from_str(tokenizer.model.source)
    padded.add_tokens(["more"])
    longer = tokenizer_lib.dataclasses.replace(
        tokenizer, model=tokenizer_lib.JsonModel(padded.to_str())
    )
    with pytest.raises(InputError, match="b: .*512 .* 513 .*token 512 is None instead"):
        tokenizer_lib.shared_size(longer, tokenizer, "a", "b")


def test_a_phase_without_distillation_does_not_read_it(config):
    assert config_lib.has_other_teacher(config)
    for changes in (
        {"objective": {"kind": "preference"}},
        {"job": "select"},
        {"sources": {"domain": {"weight": 0.0}, "instructions": {"weight": 0.0}}},
        {"objective": {"lssd_weight": 0.0, "kd_weight": 0.0},
         "sources": {"instructions": {"weight": 0.0}}},
    ):  # fmt: skip
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.update(ml_collections.ConfigDict(changes))
        assert not config_lib.has_other_teacher(changed)
        stored = ml_collections.ConfigDict(changed.to_dict())
        stored.teacher.tokenizer = "other"
        assert config_lib.first_difference(changed, stored.to_dict()) is None


def test_the_plan_counts_its_size(config, models):
    student, teacher = (
        pretrained.read_model_config(f"{models}/{name}")
        for name in ("student", "padded")
    )
    alone = step_plan.count_flops(student, 64)
    both = step_plan.count_flops(student, 64, frozen="whole", teacher_config=teacher)
    own = step_plan.count_flops(teacher, 64)
    # A forward pass is a third of forward and backward.
    assert both.teacher == own.student / 3
    assert both.head - alone.head == own.head / 3
    assert both.attention - alone.attention == own.attention / 3
    assert both.student == alone.student
    config.mesh.update(fsdp=1)
    with_teacher = step_plan.least_memory(config, student)
    config.teacher.path = ""
    with_start = step_plan.least_memory(config, student)
    sizes = [phase_lib.num_parameters(c) for c in (student, teacher)]
    assert with_teacher - with_start == 4 * (sizes[1] - sizes[0])
