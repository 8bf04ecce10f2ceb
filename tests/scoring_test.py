"""Runs, `evaluate` and lm-eval give the log-likelihoods of transformers.

Numbers that are not finite end whatever reads them.
"""

import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import vocabularies
from mixcpt_jax import config as config_lib
from mixcpt_jax.cli import evaluate
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import tasks
from mixcpt_jax.evaluation import evaluator, load_model
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.runtime import finite
from mixcpt_jax.training import phase

# Of transformers.
pytestmark = pytest.mark.filterwarnings("default")

PAIRS = [
    ("The heart is", " an organ"),
    ("Plants turn light into", " sugar"),
    ("It ends with two spaces  ", "and goes on"),
    ("ünïcödé, 漢字:", " 🙂 and  more"),
]
ROW_LENGTH = 64
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
}


def make_model(family: str, kind: str, folder: pathlib.Path):
    """A random model of a family with a tokenizer of a type, by transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family,
        **{
            "vocab_size": 608,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
        }
        | FAMILIES[family],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    theirs = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            center = "norm" in name and not family.startswith("gemma")
            param.copy_(center + 0.2 * torch.randn(param.shape, generator=generator))
    theirs.save_pretrained(folder)
    vocabularies.write(kind, folder)
    return theirs


def nats_of(theirs, ids: list[int], first: int) -> float:
    """The sum of `-log p` of `ids[first:]` in transformers."""
    import torch

    with torch.no_grad():
        logps = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(logps[i - 1, ids[i]].item() for i in range(first, len(ids)))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "sentencepiece"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("llama", "prepend"),
                ("mistral", "metaspace"),
                ("qwen2", "byte-level"),
                ("qwen3", "byte-level"),
                ("gemma2", "sentencepiece"),
                ("gemma3_text", "sentencepiece"),
            ]
        ),
    ],
)
def test_all_scorers_agree_with_transformers(family, kind, tmp_path, monkeypatch):
    lm_eval_model = pytest.importorskip("mixcpt_jax.evaluation.lm_eval_adapter")
    # Rows of one length on one mesh, so that all share compiled programs.
    monkeypatch.setattr(lm_eval_model, "_ROW_LENGTH", ROW_LENGTH)
    theirs = make_model(family, kind, tmp_path)
    vocabulary = tokenizer.load(str(tmp_path))
    start = [vocabulary.bos_id] * vocabulary.add_bos
    expected = []
    for context, target in PAIRS:
        given = start + vocabulary.encode(context.rstrip(" "))
        ids = start + vocabulary.encode(context + target)
        expected.append(nats_of(theirs, ids, len(given)))
    # float32: sums of tens of terms, each of a few nats.
    close = {"rtol": 1e-5, "atol": 1e-3}

    cloze = tmp_path / "cloze.jsonl"
    cloze.write_text(
        "".join(json.dumps({"context": c, "target": t}) + "\n" for c, t in PAIRS)
    )
    config = config_lib.default()
    config.job = "evaluate"
    config.model.path = str(tmp_path)
    config.model.compute_dtype = config.model.param_dtype = "float32"
    config.eval.texts.cloze = config_lib.source(path=str(cloze), format="cloze")
    config.data.row_length = ROW_LENGTH
    trained = load_model.load(str(tmp_path))
    config.mesh.update(trained.mesh.shape)
    config.metrics.tensorboard = config.metrics.progress = False
    started = phase.start(config, str(tmp_path / "run"), "measure")
    data = started.load_data()
    with jax.set_mesh(started.mesh):
        measure = evaluator.Evaluator(started, data)
        measure(started.starting_params("float32"))
    np.testing.assert_allclose(measure.items["cloze/loss"], expected, **close)

    found = evaluator.measure_tasks(trained, [tasks.read(str(cloze))], ROW_LENGTH)
    np.testing.assert_allclose(
        found["tasks"]["cloze"]["items"]["nats"], expected, **close
    )

    class Request:
        def __init__(self, args):
            self.args = args

    harness_model = lm_eval_model.Model(str(tmp_path))
    answers = harness_model.loglikelihood([Request(pair) for pair in PAIRS], True)
    np.testing.assert_allclose([-nats for nats, _ in answers], expected, **close)


@pytest.fixture
def tensors(tiny_model, tmp_path):
    """A copy of the tiny model in `tmp_path / "hf"`, and its tensors."""
    shutil.copytree(tiny_model, tmp_path / "hf")
    return dict(load_file(tmp_path / "hf/model.safetensors"))


def write_tensors(tensors, folder):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_nan_in_any_tensor_is_found_at_load(tensors, tmp_path):
    config = pretrained.read_model_config(str(tmp_path / "hf"))
    wanted = transformer.abstract_params(config)
    for number, name in enumerate(tensors):
        broken = tensors[name].copy()
        broken.flat[-1] = (np.nan, np.inf, -np.inf)[number % 3]
        write_tensors(tensors | {name: broken}, tmp_path / "hf")
        with pytest.raises(InputError, match=rf"safetensors: tensor {name} holds"):
            pretrained.load_params(str(tmp_path / "hf"), wanted)
    write_tensors(tensors, tmp_path / "hf")
    pretrained.load_params(str(tmp_path / "hf"), wanted)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_value_that_is_not_finite_is_found_anywhere(dtype, bad):
    for shape in [(3,), (2, 32, 64), (512, 32)]:
        whole = np.random.default_rng(0).normal(size=shape)
        assert finite.find_broken({"a": jnp.asarray(whole, dtype)}) is None
        for place in (0, whole.size // 2, -1):
            broken = whole.copy()
            broken.flat[place] = bad
            found = finite.find_broken({"a": jnp.asarray(broken, dtype)})
            assert found is not None, (shape, place)
            assert found.key == "a"


def test_a_nan_in_a_checkpoint_is_found(tiny_run, tmp_path, monkeypatch):
    found = load_model.load(f"{tiny_run}/whole").params
    assert finite.find_broken(found) is None
    real = finite.find_broken

    def poisoned(params, dtype=None):
        layers = dict(params["layers"])
        name = sorted(layers)[0]
        layers[name] = layers[name].at[1].set(np.nan)
        return real(params | {"layers": layers}, dtype)

    monkeypatch.setattr(finite, "find_broken", poisoned)
    for place in ("whole", "adapters"):
        with pytest.raises(
            InputError, match="its parameter layers/.* of layer 1 holds"
        ):
            load_model.load(f"{tiny_run}/{place}")


def test_an_export_that_overflows_is_refused(tiny_model, tmp_path):
    config = pretrained.read_model_config(tiny_model)
    params = pretrained.load_params(tiny_model, transformer.abstract_params(config))
    up = params["layers"]["up"].at[1, 0, 0].set(-7e4)
    params["layers"] |= {"up": up}
    target = tmp_path / "export"
    with pytest.raises(
        InputError,
        match=r"layers\.1\.mlp\.up_proj\.weight reaches 70000, which float16",
    ):
        pretrained.save_pretrained(str(target), params, config, dtype="float16")
    assert not list(tmp_path.iterdir())
    pretrained.save_pretrained(str(target), params, config, dtype="bfloat16")


def test_a_score_that_is_not_finite_stops_with_the_item(tiny_model, tmp_path):
    file = tmp_path / "cloze.jsonl"
    lines = [{"context": "a b c", "target": f" {word}"} for word in "defg"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = load_model.load(tiny_model)
    encoded = tasks.read(str(file)).encode(trained.tokenizer, 64, 256)
    score = trained.score()

    def poisoned(batch):
        scores = score(batch)
        at = batch["loss_mask"] * (batch["segment_ids"] == 3) > 0
        return scores | {"ntp": np.where(at, np.nan, scores["ntp"])}

    (third,) = {encoded.rows.plan.example[2]}
    with (
        jax.set_mesh(trained.mesh),
        pytest.raises(
            InputError, match=rf"cloze.jsonl:{third + 1}: its log-likelihood"
        ),
    ):
        evaluator.sums_per_example(poisoned, encoded.rows, 8)


def test_json_has_no_nan(tmp_path):
    value = {"a": math.nan, "b": [1.0, math.inf, {"c": -math.inf}], "d": (1, "x")}
    assert json.loads(paths.to_json(value)) == {"b": [1.0, None, {}], "d": [1, "x"]}


def results(row_length=64, tokens="x", nats=(1.0, 2.0), counts=(1, 2)):
    items = {"nats": [*nats], "tokens": [*counts], "correct": [1, 1], "bytes": [3, 4]}
    task = {"kind": "text", "fingerprint": "f", "tokens": tokens, "items": items}
    return {"checkpoint": "m", "row_length": row_length, "tasks": {"t": task}}


def test_results_that_differ_in_more_than_the_model_are_not_compared():
    same = evaluator.compare(results(), results())["t"]
    assert {entry["difference"] for entry in same.values()} == {0.0}
    with pytest.raises(InputError, match="cut to 64 tokens for one model and to 32"):
        evaluator.compare(results(), results(32))
    for other in (results(tokens="y"), results(counts=(2, 2))):
        assert evaluator.compare(results(), other)["t"].keys() == {"bits_per_byte"}
    # Nothing to take the mean of.
    empty = results(nats=(0.0, 0.0), counts=(0, 0))
    assert evaluator.compare(empty, empty)["t"].keys() == {"bits_per_byte"}


def test_a_model_does_not_differ_from_itself_with_a_shorter_context(
    tiny_model, tmp_path, monkeypatch
):
    shutil.copytree(tiny_model, tmp_path / "short")
    file = tmp_path / "short/config.json"
    raw = json.loads(file.read_text()) | {"max_position_embeddings": 48}
    file.write_text(json.dumps(raw))
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a b c d " * 60}) + "\n")
    command = [
        "evaluate",
        f"--checkpoint={tiny_model}",
        "--tasks",
        f"{tmp_path}/t.jsonl",
    ]
    output = tmp_path / "out.json"
    monkeypatch.setattr(
        "sys.argv", [*command, f"--compare={tmp_path}/short", f"--output={output}"]
    )
    evaluate.main()
    found = json.loads(output.read_text())
    for entry in found["comparison"]["t"].values():
        assert entry["difference"] == 0.0
    assert found["row_length"] == found["compared_with"]["row_length"] == 48
