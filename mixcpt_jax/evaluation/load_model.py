"""Loads a model from a run, a phase, a Hugging Face folder, the Hub or a GGUF file."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import hub
from mixcpt_jax.models import huggingface, pretrained, tokenizer, transformer
from mixcpt_jax.models.huggingface_export import FOLDER as EXPORT_FOLDER
from mixcpt_jax.runtime import sharding
from mixcpt_jax.training import checkpoint, phase

_DTYPES = ("float32", "bfloat16")


class LoadedModel(NamedTuple):
    """A model to evaluate or to generate with.

    Attributes:
      place: the path that it was loaded from.
      config: the architecture.
      tokenizer: its tokenizer.
      params: its parameters, sharded over `mesh`, adapters merged.
      mesh: over all devices.
      dtype: of the parameters and of the computation.
    """

    place: str
    config: transformer.ModelConfig
    tokenizer: tokenizer.Tokenizer
    params: transformer.Params
    mesh: jax.sharding.Mesh
    dtype: str

    def score(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """`batch on the host -> {"ntp", "correct"}` on the host, see `evaluator.Score`."""
        forward = transformer.make_forward(self.config, self.dtype)
        step = phase.make_eval_step(forward, self.mesh)
        return lambda batch: step(self.params, batch)


def load(path: str, dtype: str = "") -> LoadedModel:
    """Loads a model.

    Args:
      path: the workdir of a run (the end of its last finished training phase), a phase's
        folder (its newest checkpoint, or its export), a Hugging Face folder or a GGUF
        file; local, `gs://`, `package:NAME/FILE` or on the Hub, see `data.hub`.
      dtype: "float32" or "bfloat16"; empty: float32 on CPUs, bfloat16 elsewhere.

    Raises:
      InputError: there is no model, a part of it is missing or damaged, or the dtype is
        not supported.
    """
    if dtype not in ("", *_DTYPES):
        raise InputError(f"dtype {dtype!r}: not supported; use {' or '.join(_DTYPES)}")
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    path, stored = _find(path)
    settings = _model_settings(path, stored)
    tokenizer_path = settings.tokenizer or settings.path
    template = settings.chat_template
    model_config = pretrained.read_model_config(settings.path)
    vocabulary = tokenizer.load(tokenizer_path, template)
    tokenizer.check_vocabulary(vocabulary, model_config.vocab_size, tokenizer_path)
    mesh = _make_mesh(model_config)
    with jax.set_mesh(mesh):
        if stored is None:
            abstract = phase.abstract_params(model_config, mesh, dtype)
            params = pretrained.load_params(path, abstract)
        else:
            params = phase.load_params(path, model_config, mesh, dtype)
    return LoadedModel(path, model_config, vocabulary, params, mesh, dtype)


def context(path: str) -> int:
    """The context length of a model, in tokens; reads no weights.

    Args:
      path: as for `load`.

    Raises:
      InputError: see `load`.
    """
    settings = _model_settings(*_find(path))
    return pretrained.read_model_config(settings.path).max_positions


def _model_settings(
    path: str, stored: ml_collections.ConfigDict | None
) -> ml_collections.ConfigDict:
    """The settings `path`, `tokenizer` and `chat_template` of a result of `_find`."""
    if stored is None:
        return ml_collections.ConfigDict(
            {"path": path, "tokenizer": "", "chat_template": ""}
        )
    resolved, _ = phase.resolve(stored, checkpoint.phase_folder(path))
    return resolved.model


def _find(path: str) -> tuple[str, ml_collections.ConfigDict | None]:
    """The folder or file of a model, and the config of the phase that trained it."""
    if path.endswith(".gguf") or hub.local_model(path) != path:
        return path, None
    folder = paths.resolve(path)
    if not folder.is_dir():
        raise InputError(
            f"{path}: no such folder; give the workdir of a run, a phase's folder, a "
            "Hugging Face folder, a .gguf file or a model of the Hub as ORG/NAME"
        )
    if checkpoint.exists(str(folder)):
        stored = checkpoint.read_config(str(folder))
        return str(folder), ml_collections.ConfigDict(stored)
    huggingface.refuse_adapter(str(folder))
    for place in (folder, folder / EXPORT_FOLDER):
        if "model_type" in _read_json(place / phase.CONFIG_FILE):
            return str(place), None
    finished = [entry for entry in folder.iterdir() if _is_trained(entry)]
    if not finished:
        raise InputError(
            f"{path}: holds no config.json of a model, no checkpoints and no finished "
            "training phase; give the folder of a phase to load an unfinished one"
        )
    last = max(finished, key=lambda entry: (entry / phase.RESULTS_FILE).stat().mtime)
    return _find(str(last))


def _is_trained(folder: epath.Path) -> bool:
    return (folder / phase.RESULTS_FILE).exists() and checkpoint.exists(str(folder))


def _read_json(file: epath.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    return small_files.read_json(file, is_ours=False)


def _make_mesh(config: transformer.ModelConfig) -> jax.sharding.Mesh:
    """All devices; `tensor` is as large as the model allows, which decodes fastest."""
    devices = jax.device_count()
    heads = config.num_heads, config.num_kv_heads
    tensor = math.gcd(devices, *heads, config.mlp_size, config.vocab_size)
    fsdp = math.gcd(devices // tensor, config.hidden_size)
    return sharding.make_mesh({"data": -1, "fsdp": fsdp, "tensor": tensor})
