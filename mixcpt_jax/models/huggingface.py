"""Hugging Face folders: the architecture in `config.json`, and safetensors; no pickle."""

import dataclasses
import functools
import math
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
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    ModelConfig,
    RopeScaling,
    YarnRopeScaling,
    abstract_params,
    rope_size,
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


def open_tensors(folder: epath.Path, config: ModelConfig) -> dict[str, Tensor]:
    """Opens a folder's safetensors by tensor name; reads only headers.

    Names are those of a text model, and fused tensors are split: see `_of_text_model` and
    `_split`.

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
                _read_view, view, families.norm_offset(name, config.family)
            )
            tensors[name] = Tensor(str(file), name, tuple(view.get_shape()), read)
    for name in weight_map.keys() - tensors.keys():
        raise InputError(
            f"{folder / INDEX}: tensor {name} is not in {weight_map[name]}, which it "
            "names; the two files are not from one save: download both again"
        )
    return _split(_of_text_model(tensors), config)


# Of models that read images too, in files of transformers 4 and of transformers 5.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_IMAGE_PREFIXES = tuple(
    f"{before}{tower}."
    for before in ("", "model.")
    for tower in ("vision_tower", "multi_modal_projector")
)


def _of_text_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the text model, of a model that reads images too."""
    if not any(name.startswith(tuple(_TEXT_PREFIXES)) for name in tensors):
        return tensors
    of_text, others = {}, 0
    for name, tensor in tensors.items():
        if name.startswith(_IMAGE_PREFIXES):
            others += 1
            continue
        for prefix, new in _TEXT_PREFIXES.items():
            if name.startswith(prefix):
                name = new + name.removeprefix(prefix)
        of_text[name] = tensor
    if others and hosts.is_first():
        logging.info("%d tensors that read images are not read", others)
    return of_text


def _split(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors, with those that hold several parameters as their parts."""
    fused = FAMILIES[config.family].fused
    if not fused:
        return tensors
    shapes = abstract_params(config)["layers"]
    tensors = dict(tensors)
    for template, keys in fused.items():
        sizes = [shapes[key.removeprefix("layers/")].shape[-1] for key in keys]
        for layer in range(config.num_layers):
            if (whole := tensors.pop(template.format(layer), None)) is None:
                continue  # The parts are found to be missing.
            if whole.shape[0] != sum(sizes):
                raise InputError(
                    f"{whole.file}: tensor {whole.name} has shape {whole.shape}; the "
                    f"config asks for {sum(sizes)} rows"
                )
            begin = 0
            for key, size in zip(keys, sizes, strict=True):
                name = families.TENSORS[key].format(layer)
                read = functools.partial(_read_rows, whole.read, begin, size)
                shape = (size, *whole.shape[1:])
                tensors[name] = whole._replace(shape=shape, read=read)
                begin += size
    return tensors


def _read_rows(read: Any, begin: int, size: int, index: Index) -> np.ndarray:
    """Part of the `size` rows of a tensor from row `begin` on."""
    start, stop, _ = index[0].indices(size)
    return read((slice(begin + start, begin + stop), *index[1:]))


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
    header = _text_model(headers.read(file))
    if missing := families.MISSING.get(str(header.get("model_type"))):
        name = header.text("model_type")
        raise InputError(
            f"{file}: model_type {name} is not supported, because {missing}; choose a "
            "model of another family"
        )
    header.require("model_type", tuple(FAMILIES))
    name = header.text("model_type")
    family = FAMILIES[name]
    header = Header(file, {**family.defaults, **header.values})
    sizes = families.read_sizes(header, families.SIZES | family.sizes)
    rope, local_rope = _ropes(header)
    if local_rope.values and not family.local_theta:
        raise header.unsupported("rope_parameters", "the same in all layers")
    settings = {
        "rope_theta": rope.number("rope_theta", least=1),
        "rope_scaling": _rope_scaling(rope, name, sizes["max_positions"]),
    }
    if _rope_scaling(local_rope, name, sizes["max_positions"]) is not None:
        raise local_rope.unsupported("rope_type", "default in local layers")
    read = {setting.key for setting in family.settings}
    for key, supported in (_FIXED | family.fixed).items():
        for place in (header, rope, local_rope) if key not in read else ():
            # Null counts as absent, as in transformers.
            if place.get(key) not in (None, supported):
                raise place.unsupported(key, supported)
    for setting in family.settings:
        usual = () if setting.is_of_rope else (header.number(setting.key, None),)
        value = rope.number(setting.key, *usual)
        if value is not None:
            settings[setting.field] = value**setting.power
    if settings.get("query_scale") == sizes["head_size"]:
        del settings["query_scale"]
    settings["sliding_window"], settings["global_layers"] = _windows(
        header, family.windows, sizes["num_layers"]
    )
    if family.local_theta and settings["sliding_window"] is not None:
        usual = header.number(family.local_theta, settings["rope_theta"], least=1)
        settings["local_rope_theta"] = local_rope.number("rope_theta", usual, least=1)
    if family.experts is not None:
        settings |= _experts(header, family.experts)
    if family.nope is not None:
        lack = family.nope.layers(header, sizes["num_layers"])
        settings["nope_layers"] = tuple(i for i, lacks in enumerate(lack) if lacks)
    vocab_size = header.integer("vocab_size")
    _check_special_ids(header, vocab_size)
    config = ModelConfig(
        family=name,
        vocab_size=vocab_size,
        norm_epsilon=header.number("rms_norm_eps", 1e-6, most=1),
        tie_embeddings=header.flag("tie_word_embeddings", False),
        **sizes,
        **family.network,
        **settings,
    )
    return _checked_rope(config, rope)


def _experts(header: Header, keys: families.Experts) -> dict[str, Any]:
    """The fields of `ModelConfig` that describe a mixture of experts."""
    number = keys.usual
    for key in keys.number:
        number = header.integer(key, number)
    return {
        "num_experts": number,
        "experts_per_token": header.integer(keys.per_token, most=number),
        "normalize_routing": header.flag(keys.normalize, False),
    }


def _text_model(header: Header) -> Header:
    """The settings of the text model, of a model that reads images too."""
    name = header.get("model_type")
    if not isinstance(name, str) or name not in families.WRAPPERS:
        return header
    outer = {key: header.values[key] for key in _OUTER if key in header.values}
    inner = header.mapping("text_config")
    usual = {"model_type": families.WRAPPERS[name]}
    return Header(header.file, {**usual, **inner, **outer})


# What a model that reads images may state beside its `text_config`; it counts there.
_OUTER = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "tie_word_embeddings",
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


def _ropes(header: Header) -> tuple[Header, Header]:
    """RoPE's settings, and those of the local layers if they differ."""
    # Transformers 5 stores all of them under a new key, by layer type if the types differ.
    ropes, older = (header.mapping(k, {}) for k in ("rope_parameters", "rope_scaling"))
    nested = Header(header.file, ropes)
    values = nested.mapping("full_attention", {}) or ropes
    if values and any(values.get(key) != value for key, value in older.items()):
        raise InputError(
            f"{header.file}: rope_scaling is {older} and rope_parameters is {ropes}; "
            "remove one"
        )
    values = {
        "rope_theta": header.number("rope_theta", 1e4, least=1),
        "partial_rotary_factor": header.get("partial_rotary_factor"),
        **(values or older),
    }
    original = header.get(_ORIGINAL)
    if original is not None:
        values[_ORIGINAL] = original
    local = nested.mapping("sliding_attention", {})
    return Header(header.file, values), Header(header.file, local)


_ORIGINAL = "original_max_position_embeddings"
_ROPE_OF_ANY_KIND = {
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    _ORIGINAL,
}


def _rope_scaling(rope: Header, family: str, max_positions: int) -> RopeScaling | None:
    kind = rope.text("rope_type", None) or rope.text("type", None)
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"  # Its earlier names.
    original = rope.integer(_ORIGINAL, max_positions)
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
        case "dynamic":
            return DynamicRopeScaling(rope.number("factor"))
        case "yarn":
            if rope.get("truncate") not in (None, True):
                raise rope.unsupported("truncate", True)
            factor = rope.number("factor", max_positions / original)
            scales = [rope.number(key, None) for key in ("mscale", "mscale_all_dim")]
            above, below = (1, 0) if None in scales else scales
            longer = 0.1 * math.log(max(factor, 1))
            usual = (above * longer + 1) / (below * longer + 1)
            return YarnRopeScaling(
                factor=factor,
                original_max_positions=original,
                attention_factor=rope.number("attention_factor", usual),
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
            )
        case "longrope":
            factor = max(rope.number("factor", max_positions / original), 1)
            usual = math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
            short, long = (
                rope.many(key, _is_divisor, "a list of positive numbers")
                for key in ("short_factor", "long_factor")
            )
            return LongRopeScaling(
                short_factor=tuple(short),
                long_factor=tuple(long),
                original_max_positions=original,
                max_positions=max_positions,
                attention_factor=rope.number("attention_factor", usual),
            )
        case "llama3":
            scaling = Llama3RopeScaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_max_positions=rope.integer(_ORIGINAL),
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                low = scaling.low_freq_factor
                raise rope.wrong(
                    "high_freq_factor", f"more than low_freq_factor, {low}"
                )
            return scaling
    key = "rope_type" if rope.get("rope_type") else "type"
    raise rope.unsupported(key, "default, linear, dynamic, yarn, longrope, llama3")


def _is_divisor(value: Any) -> bool:
    is_number = headers.is_integer(value) or isinstance(value, float)
    return is_number and 0 < value < math.inf


def _checked_rope(config: ModelConfig, rope: Header) -> ModelConfig:
    """The config, with the context that its RoPE reaches.

    Raises:
      InputError: RoPE's settings do not fit the heads or each other.
    """
    size = rope_size(config)
    if config.rope_fraction > 1 or size < 2 or size % 2:
        raise rope.wrong(
            "partial_rotary_factor",
            f"at most 1, and an even number of the {config.head_size} entries of a head",
        )
    match config.rope_scaling:
        case YarnRopeScaling() as scaling:
            if config.rope_theta == 1:
                raise rope.wrong("rope_theta", "more than 1 with yarn")
            if scaling.beta_fast <= scaling.beta_slow:
                raise rope.wrong(
                    "beta_fast", f"more than beta_slow, {scaling.beta_slow}"
                )
        case LongRopeScaling() as scaling:
            for key in ("short_factor", "long_factor"):
                if len(getattr(scaling, key)) != size // 2:
                    raise rope.wrong(key, f"a list of {size // 2}, one per pair")
            context = min(scaling.original_max_positions, scaling.max_positions)
            return dataclasses.replace(config, max_positions=context)
    has_original = hasattr(config.rope_scaling, "original_max_positions")
    if config.query_growth is not None and not has_original:
        raise rope.unsupported("rope_type", "yarn, llama3 beside llama_4_scaling_beta")
    return config


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
