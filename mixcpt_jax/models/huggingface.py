"""Hugging Face folders: the architecture in `config.json`, and safetensors; no pickle."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from safetensors import SafetensorError, safe_open

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.models import families, headers
from mixcpt_jax.models.families import FAMILIES, Index, Tensor
from mixcpt_jax.models.headers import Header
from mixcpt_jax.models.transformer import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
)
from mixcpt_jax.runtime import hosts

# Keys that change the network's function, with their only supported value.
_FIXED = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_bidirectional_attention": False,
}

# A folder with this file counts as a model.
MARKER = "config.json"
INDEX = "model.safetensors.index.json"


def refuse_adapter(path: str) -> None:
    """Checks that a folder does not hold an adapter, alone or beside a model.

    Programs differ on a folder that holds both: some merge the adapter, some ignore it.

    Raises:
      InputError: it holds an adapter; names the adapter's base and the remedy.
    """
    folder = paths.resolve(path)
    found = [*folder.glob("adapter_config.json"), *folder.glob("adapter_model.*")]
    if not found:
        return
    settings = headers.read_if_there(folder / "adapter_config.json")
    base = settings.text("base_model_name_or_path", "a model that it does not name")
    merge = (
        f"`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), "
        f"{str(folder)!r}).merge_and_unload().save_pretrained(new)`"
    )
    if (folder / MARKER).exists():
        raise InputError(
            f"{folder}: holds an adapter ({found[0].name}) beside a model; move the "
            f"adapter's files away to use the model alone, or merge them by {merge}"
        )
    raise InputError(
        f"{folder}: holds an adapter of {base} and no model ({found[0].name}); merge the "
        f"two by {merge} and name the new folder"
    )


def read_safetensors_header(file: epath.Path) -> tuple[bytes, int]:
    """The JSON header, and the offset at which the tensors begin."""
    small_files.require_regular(file, headers.AGAIN)
    (size,) = paths.read_ranges(file, [(0, 8)])
    end = 8 + int.from_bytes(size, "little")
    if len(size) < 8 or end > min(file.stat().length, small_files.MOST_BYTES):
        raise InputError(f"{file}: not a whole safetensors file; {headers.AGAIN}")
    (header,) = paths.read_ranges(file, [(8, end)])
    return header, end


def tensor_bounds(file: epath.Path, header: bytes) -> Iterator[tuple[int, int]]:
    """(begin, end) of each tensor, in bytes after the header."""
    shape = {"__metadata__?": object, str: {"data_offsets": [int]}}
    entries = small_files.parse(header, str(file), shape, headers.AGAIN, is_ours=False)
    size = file.stat().length - 8 - len(header)
    for name, entry in entries.items():
        if name != "__metadata__":
            match entry["data_offsets"]:
                case [begin, end] if 0 <= begin <= end <= size:
                    yield begin, end
                case offsets:
                    raise InputError(
                        f"{file}: not a whole safetensors file (tensor {name!a:.80} lies "
                        f"at {offsets!s:.80}); {headers.AGAIN}"
                    )


def open_tensors(folder: epath.Path, family: str) -> dict[str, Tensor]:
    """Opens a folder's safetensors by tensor name; reads only headers.

    Raises:
      InputError: a file is missing, damaged or pickled, or the files disagree.
    """
    weight_map = weight_map_of(folder)
    files = sorted(set(weight_map.values())) if weight_map else ["model.safetensors"]
    _warn_of_others(folder, files)
    tensors = {}
    for file in (folder / name for name in files):
        small_files.require_regular(file, headers.AGAIN)
        try:
            with paths.on_local_disk(file) as local:
                handle = safe_open(local, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a whole safetensors file ({error}); download it again"
            ) from error
        for name in handle.offset_keys():
            if weight_map and name not in weight_map:
                raise InputError(
                    f"{file}: tensor {name} is not in {INDEX}; the two files are not "
                    "from one save: download both again"
                )
            if weight_map and weight_map[name] != file.name:
                continue  # A copy; the index determines which one is used.
            view = handle.get_slice(name)
            if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise InputError(
                    f"{file}: tensor {name} is {view.get_dtype()}; quantized weights "
                    "are read from GGUF files only"
                )
            read = functools.partial(
                _read_view, view, families.norm_offset(name, family)
            )
            tensors[name] = Tensor(str(file), name, tuple(view.get_shape()), read)
    for name in weight_map.keys() - tensors.keys():
        raise InputError(
            f"{folder / INDEX}: tensor {name} is not in {weight_map[name]}, which it "
            "names; the two files are not from one save: download both again"
        )
    return tensors


def _read_view(view: Any, offset: int, index: Index) -> np.ndarray:
    """Part of a safetensors file's tensor; a sum is float32."""
    return np.float32(view[index]) + offset if offset else view[index]


def weight_map_of(folder: epath.Path) -> dict[str, str]:
    """Tensor -> the file that holds it; empty where `model.safetensors` holds all."""
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    whole, index = folder / "model.safetensors", folder / INDEX
    if index.exists():
        names = headers.read(index).mapping("weight_map")
        for tensor, name in names.items():
            paths.child(folder, name, f"{index}: weight_map of tensor {tensor!a:.80}")
        if not names:
            raise InputError(f"{index}: weight_map names no file; download it again")
        if whole.exists() and whole.name not in names.values():
            raise InputError(
                f"{folder}: holds {whole.name} and {index.name}, which does not name "
                "it: weights of two saves; move the files of the older one away"
            )
        return names
    if whole.exists():
        return {}
    if pickles := [*folder.glob("*.bin"), *folder.glob("*.pt*")]:
        raise InputError(
            f"{folder}: holds pickled weights ({pickles[0].name}), which can run code "
            "and are refused. If you trust them, convert them once: `transformers."
            "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)`"
        )
    others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors")))
    remedy = f" ({others} is not read); convert it to those" if others else ""
    raise InputError(f"{folder}: holds neither {whole.name} nor {index.name}{remedy}")


def _warn_of_others(folder: epath.Path, files: list[str]) -> None:
    """Warns about weights in the folder that are not part of the model."""
    others = {file.name for file in folder.glob("*.safetensors")} - set(files)
    if others and hosts.is_first():
        logging.warning(
            "%s: weights are read from %s; not read: %s",
            folder,
            files[0] if len(files) == 1 else f"the {len(files)} files of {INDEX}",
            ", ".join(sorted(others)),
        )


def read_config(file: epath.Path) -> ModelConfig:
    """The architecture in a `config.json`.

    Raises:
      InputError: the file is damaged, or the network is not supported.
    """
    header = headers.read(file)
    model_type = header.get("model_type")
    if model_type == "gemma3":
        raise InputError(
            f"{file}: model_type is 'gemma3', which reads images too; save its text "
            "model by itself, which is supported (Gemma3ForCausalLM, gemma3_text)"
        )
    header.require("model_type", tuple(FAMILIES))
    family = FAMILIES[model_type]
    header = Header(file, {**family.defaults, **header.values})
    for key, supported in (_FIXED | family.fixed).items():
        # Null counts as absent, as in transformers.
        if header.get(key) not in (None, supported):
            raise header.unsupported(key, supported)
    sizes = families.read_sizes(header, families.SIZES)
    # Transformers 5 stores all of RoPE's settings under a new key, by layer type if the
    # types differ.
    ropes, older = (header.mapping(k, {}) for k in ("rope_parameters", "rope_scaling"))
    if ropes and any(ropes.get(key) != value for key, value in older.items()):
        raise InputError(
            f"{file}: rope_scaling is {older} and rope_parameters is {ropes}; remove one"
        )
    ropes = Header(file, ropes or older)
    local_rope = Header(file, ropes.mapping("sliding_attention", {}))
    rope = Header(file, ropes.mapping("full_attention", {}) or ropes.values)
    theta = rope.number(
        "rope_theta", header.number("rope_theta", 1e4, least=1), least=1
    )
    if _rope_scaling(local_rope) is not None:
        raise local_rope.unsupported("rope_type", "default in local layers")
    window, global_layers = _windows(header, family.windows, sizes["num_layers"])
    settings = {
        field: value
        for key, field in family.settings
        if (value := header.number(key, None)) is not None
    }
    if settings.get("query_scale") == sizes["head_size"]:
        del settings["query_scale"]
    if family.local_theta and window is not None:
        local_theta = header.number(family.local_theta, theta, least=1)
        settings["local_rope_theta"] = local_rope.number(
            "rope_theta", local_theta, least=1
        )
    vocab_size = header.integer("vocab_size")
    _check_special_ids(header, vocab_size)
    return ModelConfig(
        family=model_type,
        vocab_size=vocab_size,
        **sizes,
        rope_theta=theta,
        rope_scaling=_rope_scaling(rope),
        sliding_window=window,
        global_layers=global_layers,
        norm_epsilon=header.number("rms_norm_eps", 1e-6, most=1),
        tie_embeddings=header.flag("tie_word_embeddings", False),
        **family.network,
        **settings,
    )


def _check_special_ids(header: Header, vocab_size: int) -> None:
    """Refuses ids that have no row in the embedding: they belong to another model."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(header.get(name), list):
            header.many(
                name,
                lambda i: headers.is_integer(i) and 0 <= i < vocab_size,
                f"a list of integers from 0 to {vocab_size - 1}",
            )
        else:
            header.integer(name, None, least=0, most=vocab_size - 1)


def _rope_scaling(
    rope: Header,
) -> Llama3RopeScaling | LinearRopeScaling | None:
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.unsupported("partial_rotary_factor", 1.0)
    kind = rope.text("rope_type", None) or rope.text("type", None)
    match kind:
        case None if settings := rope.values.keys() - _ROPE_OF_ANY_KIND:
            raise InputError(
                f"{rope.file}: rope_type is missing beside {', '.join(sorted(settings))}; "
                "state the kind of RoPE scaling"
            )
        case None | "default":
            return None
        case "linear":
            return LinearRopeScaling(rope.number("factor"))
        case "llama3":
            scaling = Llama3RopeScaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.integer("original_max_position_embeddings"),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                low = scaling.low_freq_factor
                raise rope.wrong(
                    "high_freq_factor", f"more than low_freq_factor, {low}"
                )
            return scaling
    key = "rope_type" if rope.get("rope_type") else "type"
    raise rope.unsupported(key, "default, linear, llama3")


_ROPE_OF_ANY_KIND = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def _windows(
    header: Header, windows: families.Windows | None, num_layers: int
) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and the layers that do not have it."""
    if windows is None:
        return None, ()
    if windows.has_switch and not header.flag("use_sliding_window", False):
        return None, ()
    kinds = header.get("layer_types")
    if windows.is_by_layer and kinds is not None:
        known = ("full_attention", "sliding_attention")
        is_right = isinstance(kinds, list) and all(kind in known for kind in kinds)
        if not is_right or len(kinds) != num_layers:
            raise header.unsupported(
                "layer_types", f"{num_layers} of {', '.join(known)}"
            )
        local = [kind == known[1] for kind in kinds]
    else:
        local = windows.local(header, num_layers)
    window = header.integer("sliding_window", None)  # Null means no window.
    if window is None or not any(local):
        return None, ()
    return window, tuple(i for i in range(num_layers) if not local[i])
