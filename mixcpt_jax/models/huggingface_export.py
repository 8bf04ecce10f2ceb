"""Parameters -> a folder that transformers loads; writes the whole folder or nothing."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import hub
from mixcpt_jax.models import families, headers
from mixcpt_jax.models.huggingface import MARKER
from mixcpt_jax.models.tokenizer import Tokenizer
from mixcpt_jax.models.transformer import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ModelConfig,
    Params,
    YarnRopeScaling,
)
from mixcpt_jax.runtime import finite, hosts

_GENERATION = "generation_config.json"

# The key of an export's config.json that lists its files.
_WRITTEN = "exported_files"

# In the folder of an export that is being written.
_LEFTOVER = "may_be_deleted"


def save_pretrained(
    folder: str,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: str = "bfloat16",
    stop_ids: Iterable[int] = (),
    max_shard_bytes: int = 5 * 2**30,
    start: str = "",
    card: str = "",
) -> None:
    """Writes a folder that transformers' `from_pretrained` loads.

    It is written to `{folder}.incomplete` and renamed at the end, so a folder of this name
    is always complete; the folder of an earlier export is replaced. In a bucket, where
    folders cannot be renamed, `config.json` is deleted first and written last. Every
    process of a multi-host run must call this; the first one writes.

    Args:
      folder: on a local disk or in a bucket.
      params: the parameters, sharded in any way.
      config: their architecture.
      tokenizer: saved alongside; its BOS and EOS go into `config.json` too.
      dtype: what weights are cast to: "bfloat16", "float16" or "float32".
      stop_ids: the tokens that end generation, for `generation_config.json`.
      max_shard_bytes: weights are split into files of at most this size (or of one
        tensor). The host holds one such file at a time.
      start: the checkpoint that the parameters were trained from. Its license files are
        copied, and its `generation_config.json` except for special tokens.
      card: the text of the model's card, `README.md`; empty: none.

    Raises:
      InputError: `folder` exists and holds something other than an export, or contains
        `start` or lies in it; or a tensor has a value that overflows `dtype`. In these
        cases nothing is written or deleted.
    """
    target = paths.resolve(folder)
    check_target(target, start)
    if broken := finite.find_broken(params, dtype):
        raise InputError(
            f"{folder}: tensor {families.name_of(broken, config.family)} reaches "
            f"{broken.largest:.6g}, which {dtype} cannot hold; export bfloat16 or float32 "
            "(export.dtype)"
        )
    tensors = _tensors(params, config.family, dtype)
    if not hosts.is_first():
        for _ in tensors:  # Takes part in gathering them.
            pass
        return
    with _new_folder(target) as new:
        _write_safetensors(new, tensors, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(str(new))
        started_from = _files_beside(start)
        generation = _generation_config(
            started_from.get(_GENERATION), tokenizer, sorted(stop_ids)
        )
        if generation:
            _write_json(new / _GENERATION, generation)
        for name, file in started_from.items():
            if _LICENSE.fullmatch(name):
                small_files.require_regular(file)
                paths.copy_file(file, new / name)
        if card:
            (new / "README.md").write_text(card)
        raw = _config_to_hf(config, tokenizer, dtype)
        names = sorted({MARKER, *(file.name for file in new.iterdir())})
        _write_json(new / MARKER, raw | {_WRITTEN: names})


def _files_beside(start: str) -> dict[str, epath.Path]:
    """The files of a checkpoint's folder by name; empty for a GGUF file."""
    folder = paths.resolve(hub.local_model(start))
    files = folder.iterdir() if start and folder.is_dir() else ()
    return {file.name: file for file in files if file.is_file()}


def _generation_config(
    file: epath.Path | None, tokenizer: Tokenizer | None, stop_ids: list[int]
) -> dict[str, Any]:
    """The values of `file`, but with the tokenizer's special tokens."""
    values = dict(headers.read(file).values) if file else {}
    # With this key, transformers would derive the values from the config again.
    values.pop("_from_model_config", None)
    ids = {"eos_token_id": stop_ids or None}
    if file and tokenizer is not None:
        ids |= {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    return values | {name: i for name, i in ids.items() if i is not None}


@contextlib.contextmanager
def _new_folder(target: epath.Path) -> Iterator[epath.Path]:
    """A folder on a local disk to write to, which replaces `target` at the end."""
    if paths.is_remote(target):
        with tempfile.TemporaryDirectory(prefix="mixcpt-export-") as folder:
            new = epath.Path(folder)
            yield new
            _upload(new, target)
        return
    place = _incomplete(target)
    place.rmtree(missing_ok=True)
    place.mkdir(parents=True)
    (place / _LEFTOVER).touch()
    (new := place / "new").mkdir()
    yield new
    _check_replaceable(target)
    if target.exists():
        target.rename(place / "old")
    new.rename(target)
    place.rmtree()


def _incomplete(target: epath.Path) -> epath.Path:
    return target.parent / f"{target.name}.incomplete"


def _upload(folder: epath.Path, target: epath.Path) -> None:
    _check_replaceable(target)
    (target / MARKER).unlink(missing_ok=True)
    for file in target.iterdir() if target.exists() else ():
        file.unlink()
    for file in sorted(folder.iterdir(), key=lambda file: file.name == MARKER):
        paths.copy_file(file, target / file.name)


def _config_to_hf(
    config: ModelConfig, tokenizer: Tokenizer | None, dtype: str
) -> dict[str, Any]:
    family = families.FAMILIES[config.family]
    raw = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        # Also under this key in families whose files have another.
        "hidden_act": family.fixed.get("hidden_activation", "silu"),
        # Transformers 5 reads this older spelling of RoPE's settings too.
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "sliding_window": config.sliding_window,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }
    for name, key in [*families.SIZES.items(), *family.sizes.items()]:
        raw[key] = getattr(config, name)
    raw |= family.fixed
    for setting in family.settings:
        value = getattr(config, setting.field)
        if setting.field == "query_scale":
            value = value or config.head_size
        if setting.power != 1:
            value **= 1 / setting.power
        place = raw["rope_scaling"] if setting.is_of_rope else raw
        place[setting.key] = value
    if isinstance(config.rope_scaling, LongRopeScaling):
        raw["max_position_embeddings"] = config.rope_scaling.max_positions
        original = "original_max_position_embeddings"
        raw[original] = config.rope_scaling.original_max_positions
    if family.windows is not None and family.windows.is_by_layer:
        raw["layer_types"] = [
            "full_attention" if window is None else "sliding_attention"
            for window in config.windows
        ]
    if family.windows is not None and family.windows.has_switch:
        raw["use_sliding_window"] = config.sliding_window is not None
        raw["max_window_layers"] = len(config.global_layers)
    if family.experts is not None:
        raw |= dict.fromkeys(family.experts.number, config.num_experts)
        raw[family.experts.per_token] = config.experts_per_token
        raw[family.experts.normalize] = config.normalize_routing
    if family.nope is not None:
        raw |= family.nope.keys(config)
    if config.local_rope_theta is not None and family.local_theta != "rope_theta":
        raw[family.local_theta] = config.local_rope_theta
    elif config.local_rope_theta is not None:
        everywhere = raw["rope_scaling"] or {"rope_type": "default"}
        local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
        raw["rope_parameters"] = {
            "full_attention": everywhere | {"rope_theta": config.rope_theta},
            "sliding_attention": local,
        }
    # Null if there is none: families have defaults, of their own vocabularies.
    for name in ("bos", "eos", "pad"):
        raw[f"{name}_token_id"] = getattr(tokenizer, f"{name}_id", None)
    return raw


_ROPE_TYPES = {
    LinearRopeScaling: "linear",
    DynamicRopeScaling: "dynamic",
    YarnRopeScaling: "yarn",
    LongRopeScaling: "longrope",
    Llama3RopeScaling: "llama3",
}


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    if config.rope_scaling is None:
        return None
    values = dataclasses.asdict(config.rope_scaling)
    if "original_max_positions" in values:
        key = "original_max_position_embeddings"
        values[key] = values.pop("original_max_positions")
    values.pop("max_positions", None)
    kind = _ROPE_TYPES[type(config.rope_scaling)]
    # Transformers before 4.43 read `type`.
    return {"rope_type": kind, "type": kind} | values


def _tensors(
    params: Params, family: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Copies the Hugging Face tensors to the host, one at a time."""
    leaves = {
        families.key_of(path): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    fused = families.FAMILIES[family].fused
    inside = {key for keys in fused.values() for key in keys}
    for key in (key for key in leaves if key not in inside):
        names = families.tensor_names(key, leaves[key].shape, family)
        for i, of_layer in enumerate(np.atleast_1d(names)):
            tensor = _tensor(key, leaves[key], i, family, dtype)
            for expert, name in np.ndenumerate(of_layer):
                yield str(name), tensor[expert]
    for name, keys in fused.items():
        for i in range(len(leaves[keys[0]])):
            parts = [_tensor(key, leaves[key], i, family, dtype) for key in keys]
            yield name.format(i), np.concatenate(parts)


def _tensor(
    key: str, leaf: jax.Array, layer: int, family: str, dtype: str
) -> np.ndarray:
    """One of our parameters in one layer, of all experts, as Hugging Face stores it."""
    array = _layer(leaf, layer) if families.num_stacked(key, family) else leaf
    array = _cast(array, families.norm_offset(key, family), dtype)
    if array.is_fully_addressable:
        array = np.asarray(array)
    else:
        array = multihost_utils.process_allgather(array, tiled=True)
    if families.is_transposed(key) and array.ndim > 1:
        array = array.swapaxes(-1, -2)
    return np.ascontiguousarray(array)


# Jitted, because arrays that span hosts do not support eager operations.
@jax.jit
def _layer(stack: jax.Array, layer: int) -> jax.Array:
    return stack[layer]


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: jax.Array, offset: int, dtype: str) -> jax.Array:
    return (array - offset).astype(dtype)


def _write_safetensors(
    folder: epath.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    max_bytes: int,
) -> None:
    """Writes `model.safetensors`, or numbered files and the index over them."""
    shards: list[list[str]] = []
    pending, total_bytes = {}, 0

    def flush():
        file = folder / f"{len(shards)}.safetensors"
        save_file(pending, file, metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        pending_bytes = sum(t.nbytes for t in pending.values())
        if pending and pending_bytes + tensor.nbytes > max_bytes:
            flush()
        pending[name] = tensor
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def _write_json(file: epath.Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")


_LICENSE = re.compile(r"(licen[cs]e|notice|copying|use_policy)[\w.-]*", re.IGNORECASE)


def check_target(folder: epath.Path, *models: str) -> None:
    """Checks that writing an export to a folder would delete only an earlier export.

    Args:
      folder: of the export.
      models: paths that the export reads.

    Raises:
      InputError: the folder, or the rest of an interrupted export beside it, holds files
        that no export wrote; or the folder holds a model, or lies in one.
    """
    target = _real(folder)
    for path in filter(None, models):
        model = _real(paths.resolve(hub.local_model(path)))
        if model == target or model in target.parents or target in model.parents:
            raise InputError(
                f"{folder}: the export would change {path}, which it is made of; name "
                "another folder"
            )
    _check_replaceable(folder)
    leftover = _incomplete(folder)
    if _is_there(leftover) and not (leftover / _LEFTOVER).exists():
        raise InputError(
            f"{leftover}: an export needs this name and did not write it; move it away"
        )


def _real(path: epath.Path) -> pathlib.PurePath:
    """A path without links and dots."""
    return pathlib.PurePath(
        str(path) if paths.is_remote(path) else os.path.realpath(path)
    )


def _is_there(path: epath.Path) -> bool:
    """Whether it exists on a local disk, even as a broken link."""
    return not paths.is_remote(path) and os.path.lexists(path)


def _check_replaceable(folder: epath.Path) -> None:
    """Refuses a folder with files that no export wrote."""
    if _is_there(folder) and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; name another one")
    if not folder.exists():
        return
    marker = folder / MARKER
    config = headers.read(marker).values if marker.exists() else {}
    written = config.get(_WRITTEN)
    # A program that loads and saves a model keeps unknown keys.
    if not isinstance(written, list) or "transformers_version" in config:
        written = []
    for file in folder.iterdir():
        if file.name not in written or file.is_dir():
            raise InputError(
                f"{folder}: holds {file.name}, which is not part of an export and "
                "would be lost; name another folder"
            )


FOLDER = "hf"
