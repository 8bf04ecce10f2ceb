"""Defaults shared by all configs, and the check that runs before anything is loaded.

A config file calls `default()`, adds its sources with `source(...)` and changes what it
wants. `validate` names the first key that is unknown, of the wrong type or impossible in
combination with others, and says what to do.
"""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import ml_collections
from ml_collections import config_dict

from mixcpt_jax.errors import InputError

OBJECTIVES = ("ntp", "lssd", "kd", "selective")
FORMATS = (
    "document", "instruction", "preference", "cloze", "chat", "chat_preference",
)  # fmt: skip

REMAT = ("none", "dots", "full")

# Stands for the folder of an earlier phase of the same run, in any path of a phase.
_PHASE = re.compile(r"(?:^|(?<=,)|(?<=, ))phase:")

_CHOICES = {
    "job": ("train", "select", "evaluate", "export"),
    "metrics.log": ("text", "json"),
    "objective.kind": ("tokens", "preference"),
    "objective.teacher": ("step", "prepared"),
    "objective.anneal": ("none", "to_ntp", "from_ntp"),
    "model.weights": ("pretrained", "random"),
    "preference.loss": ("sigmoid", "ipo"),
    "preference.reference": ("step", "precomputed"),
    "select.method": ("perplexity", "format_alignment", "random"),
    "data.overlong": ("split", "truncate", "drop", "refuse"),
    "export.dtype": ("float32", "bfloat16", "float16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.teacher_dtype": ("", "float32", "bfloat16"),
    "model.remat": REMAT,
    "optimizer.moments_dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "data.packing": ("by_format", "split", "best_fit", "first_fit"),
}
_POSITIVE = (
    "data.row_length",
    "data.batch_size",
    "optimizer.learning_rate",
    "optimizer.accumulation_steps",
    "train.log_every",
    "train.keep_last",
    "eval.batch_size",
    "eval.max_new_tokens",
    "objective.teacher_temperature",
    "preference.beta",
    "lora.alpha",
    "select.max_tokens",
    "select.max_candidates",
    "select.origin_share",
)
_NOT_NEGATIVE = (
    "data.num_workers",
    "optimizer.warmup_steps",
    "optimizer.warmup_share",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.final_ratio",
    "optimizer.spike_factor",
    "objective.ntp_weight",
    "objective.lssd_weight",
    "objective.kd_weight",
    "objective.selective_weight",
    "objective.teacher_top_k",
    "clean.near_duplicates",
    "clean.min_characters",
    "clean.max_characters",
    "clean.min_letters",
    "clean.max_repetition",
    "clean.decontaminate",
    "train.num_steps",
    "train.save_every",
    "train.eval_every",
    "train.max_skipped",
    "train.timeout",
    "head.chunk_size",
    "head.block_size",
    "head.vocab_tile",
    "preference.label_smoothing",
    "preference.sft_weight",
    "lora.rank",
    "data.warn_epochs",
    "data.max_epochs",
    "eval.row_length",
    "eval.max_tokens",
    "select.min_tokens",
    "select.min_response_tokens",
    "select.near_duplicates",
)

# What may change between two runs of one workdir without changing what is computed.
FREE_ON_RESUME = (
    "mesh",
    "metrics",
    # Where the weights lie; what they are is in the provenance.
    "model.path",
    "model.remat",
    "model.architecture",
    "head",
    "data.num_workers",
    "data.prepared",
    "train.log_every",
    "train.save_every",
    "train.eval_every",
    "train.keep_last",
    "train.timeout",
    "train.keep_best",  # in the configs of earlier versions
)


# Sections that a job does not read, so that a mistake in a later phase can be mended
# without making the earlier ones anew.
_UNREAD = {
    "train": ("select", "export"),
    "select": ("export", "optimizer", "train", "objective", "preference", "lora"),
    "evaluate": (
        "select", "export", "optimizer", "train", "objective", "preference", "lora",
    ),
    "export": (
        "select", "optimizer", "train", "objective", "preference", "lora", "data",
        "sources", "eval",
    ),
}  # fmt: skip


def default() -> ml_collections.ConfigDict:
    """Every key there is, with its default and its meaning."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # What the phase does: train; select samples (see `select`); evaluate; export to a
    # Hugging Face folder.
    config.job = "train"
    # The phase starts from the parameters of this phase's folder (its last checkpoint);
    # empty: from the weights of `model.path`.
    config.init_from = ""
    # Names of phases run one after the other, each in its own folder under the workdir;
    # `overrides[name]` holds what differs in that phase. Empty: one phase, this config.
    # Within a phase a path that begins with "phase:NAME" is in the folder of phase NAME.
    config.phases = ()
    config.overrides = ml_collections.ConfigDict()

    # The model: an HF folder (config.json and safetensors) or a GGUF file.
    config.model = ml_collections.ConfigDict(
        {
            "path": "",
            # "random": not the weights at `path`, but new ones from `seed`; of an HF
            # folder config.json is enough then.
            "weights": "pretrained",
            # config.json of the architecture, for `plan` where `path` is not at hand.
            "architecture": "",
            # Folder or file of the tokenizer; empty: where the model is.
            "tokenizer": "",
            # File of a Jinja chat template; empty: the tokenizer's own, or ChatML.
            "chat_template": "",
            # Of what is trained. To bfloat16 each update is rounded up or down by chance,
            # so that small ones are not lost. Norm scales and biases are always float32.
            "param_dtype": "float32",
            "compute_dtype": "bfloat16",
            # Of the frozen model: teacher, reference, what adapters adapt. Empty: the
            # coarser of the two above, with which it computes at the start what the
            # trained model computes, so that margins and KL begin at 0.
            "teacher_dtype": "",
            # What the backward pass recomputes: none, dots (all but matrix products)
            # or full (each layer from its input).
            "remat": "full",
        }
    )

    # The device mesh; one size may be -1: all devices the others leave. `topology` is the
    # TPU slice it is meant for, such as v5e:4x4; only `plan` reads it.
    config.mesh = ml_collections.ConfigDict(
        {"data": 1, "fsdp": -1, "tensor": 1, "topology": ""}
    )

    # The unembedding and the losses, as in `fused.head_loss`. A size of 0 is chosen from
    # the device and the vocabulary.
    config.head = ml_collections.ConfigDict(
        {
            # Tokens whose logits exist at a time on a device.
            "chunk_size": 0,
            # Tokens whose logits' gradient is kept for one pair of products; a
            # multiple of chunk_size.
            "block_size": 0,
            # Columns of the vocabulary at a time; 0: all of the device's.
            "vocab_tile": 0,
            # Splits the vocabulary over mesh.fsdp too and gathers hidden states; False
            # gathers the unembedding instead, at several times the memory.
            "vocab_parallel": True,
        }
    )

    # Low-rank adapters (LoRA). With a rank above 0 only they are trained, kept in
    # checkpoints and in the optimizer; the frozen model under them is the teacher, or the
    # reference, and is held once.
    config.lora = ml_collections.ConfigDict(
        {
            "rank": 0,
            "alpha": 16.0,  # the adapters' product is scaled by alpha / rank
            "targets": ("query", "key", "value", "output", "gate", "up", "down"),
        }
    )

    # The training objective. Kind "tokens": a weighted sum of the losses below on each
    # token; a source can set weights of its own. Kind "preference": pairs of answers, see
    # `preference`. The default is Mix-CPT's objective: next-token prediction with logit
    # swap self-distillation beside it. The paper does not publish the weight of the latter;
    # 0.8 and 0.2 did best among the weights that experiments/README.md compares.
    config.objective = ml_collections.ConfigDict(
        {
            "kind": "tokens",
            "ntp_weight": 0.8,  # next-token prediction
            "lssd_weight": 0.2,  # logit swap self-distillation
            "kd_weight": 0.0,  # plain distillation
            # Next-token prediction where the teacher's top token is not the gold one,
            # plain distillation where it is. With weights m here and 1 - m for LSSD the
            # gold token's target is m + (1 - m) p_a wherever the teacher is wrong.
            "selective_weight": 0.0,
            # Divides the teacher's logits. Below 1 its targets are sharper.
            "teacher_temperature": 1.0,
            # "step" runs the teacher in every step; "prepared" reads what it said from
            # `data.prepared`, where `python -m mixcpt_jax.data.prepare --teacher` puts it.
            "teacher": "step",
            # What is prepared of it. 0: its last hidden states, in bfloat16. Above: so
            # many most likely tokens and the gold one, all others as one outcome.
            "teacher_top_k": 0,
            # Linear in the steps: "to_ntp" turns each token's weights into one of
            # next-token prediction, "from_ntp" begins with that and ends with them.
            "anneal": "none",
        }
    )

    # DPO and its relatives (`losses.preference_loss`), for objective.kind "preference".
    # The reference is the frozen model that the phase starts from.
    config.preference = ml_collections.ConfigDict(
        {
            "loss": "sigmoid",  # sigmoid: DPO; ipo
            "beta": 0.1,
            "label_smoothing": 0.0,  # share of pairs taken to be the wrong way round
            "length_normalised": False,  # means over tokens for sums; ipo always does
            "sft_weight": 0.0,  # of the chosen answer's NLL per token (RPO)
            # Where the reference's log-probabilities come from: "step" runs it beside
            # the policy, "precomputed" once over all pairs before the first step.
            "reference": "step",
        }
    )

    # The knowledge mixture: name -> source(...).
    config.sources = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict(
        {
            # Tokens per row, and rows per step over all devices. With a batch_size of 0 it,
            # optimizer.accumulation_steps and eval.batch_size, and a row_length of 0, are
            # chosen from the corpus and the memory of a device, see `sizing`.
            "row_length": 2048,
            "batch_size": 8,
            # split: all of a source end to end, cut into full rows; best_fit and first_fit
            # keep whole what fits a row, and leave a little padding. by_format: split for
            # documents, best_fit for all others, whose answers mean little without their
            # questions.
            "packing": "by_format",
            # 0: shares are the weights alone. From 1 on: weight x size^(1 / temperature),
            # size being the tokens to learn: at 1 in proportion to size, the higher the
            # more alike.
            "temperature": 0.0,
            # Examples longer than a row, or pairs that do not fit one together: split
            # (documents go on in the next row), truncate (cut at their end; of a pair
            # each side to half of a row), drop, or refuse. All but refuse are counted.
            "overlong": "split",
            # Epochs of one source above which a run warns, and above which it does not
            # start; 0: never. Up to four, repeated text is nearly as good as new, and
            # from about forty on worth nothing (Muennighoff et al. 2023).
            "warn_epochs": 4.0,
            "max_epochs": 40.0,
            "num_workers": 0,  # processes that build batches; 0: threads
            # Folder of tokens that `python -m mixcpt_jax.data.prepare` made; a source
            # that it has, unchanged, is read from there. Empty: none.
            "prepared": "",
        }
    )

    # Which texts of the sources are not learnt; all rules are off unless set. They are
    # applied after the holdout, so what is measured stays the same.
    config.clean = ml_collections.ConfigDict(
        {
            # Texts that say the same as an earlier one of their source, but for case and
            # blanks.
            "exact_duplicates": False,
            # Texts at least so similar (Jaccard, of word 5-grams) to an earlier one of
            # their source; 0: off.
            "near_duplicates": 0.0,
            # Documents by their length in characters; 0: no limit. This rule and the
            # next two are for format "document" only.
            "min_characters": 0,
            "max_characters": 0,
            # Least share of letters, of any script, in a document's characters that are
            # not blank.
            "min_letters": 0.0,
            # Greatest share of a document that repeats what stands before it there.
            "max_repetition": 1.0,
            # Texts with so many words in a row that are also in an exam of `eval.exams`;
            # 13 is usual, 0: off.
            "decontaminate": 0,
        }
    )

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 1e-5,
            "schedule": "cosine",
            # Steps in which the rate rises to its peak; 0: `warmup_share` of the phase's.
            "warmup_steps": 0,
            "warmup_share": 0.0,
            # Learning rate of the last step / peak (cosine, wsd).
            "final_ratio": 0.1,
            "decay_fraction": 0.2,  # share of the steps that decay (wsd)
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "epsilon": 1e-8,
            # What Adam's moments are kept in; to bfloat16 they are rounded by chance too.
            "moments_dtype": "float32",
            "clip_norm": 1.0,  # 0: no clipping
            # A step whose gradient norm is above so many times the running mean of the
            # last hundred or so is skipped, within train.max_skipped; 0: none is.
            "spike_factor": 0.0,
            "accumulation_steps": 1,  # microbatches per step
        }
    )

    config.train = ml_collections.ConfigDict(
        {
            # 0: until every source that has `epochs` or `max_tokens` has given them; the
            # others are read for as long as that takes.
            "num_steps": 1000,
            "log_every": 1,  # steps between lines of metrics.jsonl
            "save_every": 200,  # 0: only at the end
            "eval_every": 0,  # 0: only before and after
            "eval_before": True,
            # Checkpoints that stay: should the newest be damaged on the disk, the one
            # before is used.
            "keep_last": 2,
            # How many steps in a row may be skipped, because their gradient is not
            # finite or a spike: parameters and moments stay as they are, and the run
            # goes on with the next batch. More of them end the run. 0: the first loss
            # that is not finite does.
            "max_skipped": 0,
            # Seconds after which a run that shows no sign of life (a step, a batch
            # measured, a checkpoint saved) says where every thread is and ends; 0: never.
            # More than a compilation, `log_every` steps, a save or the answers to all
            # prompts take: 1800 on a slice.
            "timeout": 0.0,
        }
    )

    config.eval = ml_collections.ConfigDict(
        {
            "batch_size": 8,
            # Tokens per row of what is measured; 0: data.row_length. Phases whose numbers
            # are compared want the same: longer rows give more context.
            "row_length": 0,
            # Tokens of each text, exam and pairs that are measured at most; 0: all. Long
            # texts are cut to one length, the rest is spread over the file: see
            # `mixture.within`.
            "max_tokens": 65536,
            # Text that is measured and never trained on, in whichever source it
            # stands: name -> source(...). With a `holdout` so many records are
            # measured, the same as a source with this path and holdout has. Of format
            # "cloze" also counts how often all of the target is right.
            "texts": ml_collections.ConfigDict(),
            # Multiple choice: name -> exam(...).
            "exams": ml_collections.ConfigDict(),
            # Preference pairs: name -> source(format="chat_preference", ...).
            "pairs": ml_collections.ConfigDict(),
            # JSONL of {"prompt"} or {"messages"}: answered greedily before and after.
            "prompts": "",
            "max_new_tokens": 128,
        }
    )

    # Which samples of the mixture go to format alignment (job "select").
    config.select = ml_collections.ConfigDict(
        {
            # random, which runs no model; perplexity, which scores every sample once; or
            # format_alignment, which scores it twice. In our study all three did alike.
            "method": "random",
            # Samples of a source that are scored at most, picked by a hash of their text.
            "max_candidates": 2000,
            # Source -> how many of its samples are wanted.
            "keep": ml_collections.ConfigDict(),
            # Length of a sample in its chat format, in tokens; others are left out.
            "min_tokens": 1,
            "max_tokens": 1024,
            # Length of its response alone; the scores of shorter ones are mostly noise.
            "min_response_tokens": 8,
            # Samples at least so similar (Jaccard, of word 5-grams) to an earlier one
            # are left out; 0: only exact copies are.
            "near_duplicates": 0.8,
            # Field that says where a sample comes from, and the largest share of the
            # kept samples that may come from one place; 1: no limit.
            "origin_field": "origin",
            "origin_share": 1.0,
        }
    )

    config.export = ml_collections.ConfigDict({"dtype": "bfloat16"})
    config.metrics = ml_collections.ConfigDict(
        {
            "tensorboard": True,
            "wandb_project": "",  # empty: none
            "progress": True,
            # What the terminal shows: "text", or "json", one object a line with time,
            # severity, message and a step's scalars, as GKE and Cloud Logging read it.
            "log": "text",
        }
    )
    return config


def measure_general(config: ml_collections.ConfigDict) -> None:
    """Adds general text and a general exam that nothing trains on, of this package.

    They say what is kept. Others: `--config.eval.texts.general.path=FILE` and
    `--config.eval.exams.general.path=FILE`.
    """
    assets = "package:mixcpt_jax/assets"
    config.eval.texts.general = source(path=f"{assets}/general_text.jsonl")
    config.eval.exams.general = exam(path=f"{assets}/general_exam.jsonl")


def source(**settings: Any) -> ml_collections.ConfigDict:
    """One source of text.

    path: a file, a folder, a glob or a comma-separated list of them; for reader
      "docstrings" names of installed packages. A folder is read by what lies in it.
      A name that exists as it stands is meant, whatever commas or wildcards it has.
    reader: "jsonl", "text", "parquet", "arrow" (of Hugging Face datasets), "tfds",
      "array_record" or "docstrings"; empty: from the file names, see `sources.read`.
      The flag `--config.sources.NAME.path` replaces "docstrings" by empty.
    split: of a dataset that has several, a folder with the Hub's names of files
      among them; empty: "train", or the only one; "all": every file.
    format: "document", "instruction" or "preference", as plain text; "chat";
      "chat_preference" for pairs; or "cloze", a context and the target it is to be
      continued with, which alone is learnt or measured.
    fields: names of the record's fields where they are not the format's own.
    preference_side: "chosen", "rejected" or "both" go into the plain text.
    weight: share of the mixture's tokens, relative to the other sources.
    final_weight: the same at the end of the phase, reached linearly; None: it stays.
    epochs: how often the source is read at most; 0: as often as its share asks.
    max_tokens: how many of its tokens are learnt at most, to a row; 0: no limit. What
      a source at its limit leaves free, the others take up.
    max_records: only the first so many are read; 0: all.
    on_bad_record: "refuse", or "skip" for a warning and going on without a record that
      cannot be read, lacks a field, has a blank one or is no conversation, and without
      the rest of a damaged file.
    holdout: records that are measured, chosen by a hash of their text. In `eval.texts`
      and `eval.pairs` 0 stands for all. What is measured is left out of every source.
    ntp_weight, lssd_weight, kd_weight, selective_weight: objectives on this source;
      None: the config's.
    """
    values = ml_collections.ConfigDict(
        {
            "path": "",
            "reader": "",
            "split": "",
            "format": "document",
            "fields": ml_collections.ConfigDict(),
            "preference_side": "chosen",
            "weight": 1.0,
            "final_weight": config_dict.placeholder(float),
            "epochs": 0.0,
            "max_tokens": 0,
            "max_records": 0,
            "on_bad_record": "refuse",
            "holdout": 0,
            "ntp_weight": config_dict.placeholder(float),
            "lssd_weight": config_dict.placeholder(float),
            "kd_weight": config_dict.placeholder(float),
            "selective_weight": config_dict.placeholder(float),
        }
    )
    return _fill(values, settings, "source")


def exam(**settings: Any) -> ml_collections.ConfigDict:
    """One multiple-choice exam.

    path: JSONL of {question, choices, answer}; empty when built from a source.
    source: the source with reader "docstrings" whose held-in documents are asked about.
    num_questions: how many questions; 0: all of the file.
    """
    values = ml_collections.ConfigDict({"path": "", "source": "", "num_questions": 0})
    return _fill(values, settings, "exam")


def add_entry(config: ml_collections.ConfigDict, section: str, name: str) -> None:
    """Readies an entry for a path: a source, or a text, exam or pairs to measure.

    An entry that the config does not have is added; phases that choose among the sources,
    such as SFT, do not train on it. One whose reader is "docstrings" has names of packages
    where a path will stand, so it is then read by the names of its files.

    Args:
      config: of a run; may be locked.
      section: "sources", "eval.texts", "eval.exams" or "eval.pairs".
      name: of the entry.
    """
    if name in _section(config, section):
        entry = _section(config, section)[name]
        if entry.get("reader") == "docstrings":
            entry.reader = ""
        return
    entry = exam() if section == "eval.exams" else source()
    if section == "eval.pairs":
        entry.format = "chat_preference"
    with config.unlocked():
        _section(config, section)[name] = entry
        for phase in config.overrides.values() if section == "sources" else ():
            if "sources" in phase:
                phase.sources[name] = ml_collections.ConfigDict({"weight": 0.0})


def _section(config: ml_collections.ConfigDict, key: str) -> ml_collections.ConfigDict:
    return functools.reduce(lambda part, name: part[name], key.split("."), config)


def check_variant(variant: str, known: tuple[str, ...]) -> None:
    """Refuses a variant (`--config=FILE:VARIANT`) that the config file does not have.

    Raises:
      InputError: names those it has.
    """
    if variant and variant not in known:
        raise InputError(
            f"--config=...:{variant}: no such variant; known: {', '.join(known)}"
        )


def validate(config: ml_collections.ConfigDict, num_devices: int | None = None) -> None:
    """Checks keys, types, values and combinations.

    Args:
      config: a whole config, with any phase's overrides already applied.
      num_devices: of all hosts; None skips what depends on it.

    Raises:
      InputError: names the key, what was found and the remedy.
    """
    _check_keys(config, default(), "")
    for place, entry in all_sources(config):
        _check_keys(entry, source(), f"{place}.")
    for name, entry in config.eval.exams.items():
        _check_keys(entry, exam(), f"eval.exams.{name}.")
    for key, choices in _CHOICES.items():
        _check(config[key] in choices, config, key, f"one of {', '.join(choices)}")
    for key in _POSITIVE:
        _check(config[key] > 0, config, key, "a number above 0")
    for key in _NOT_NEGATIVE:
        _check(config[key] >= 0, config, key, "0 or more")
    if config.train.num_steps:
        check_schedule(config, config.train.num_steps)
    _check_paths(config)
    optimizer = config.optimizer
    for key in ("beta1", "beta2"):
        _check(0 <= optimizer[key] < 1, config, f"optimizer.{key}", "0 to below 1")
    _check(
        optimizer.spike_factor == 0 or optimizer.spike_factor > 1,
        config,
        "optimizer.spike_factor",
        "0, or more than 1",
    )
    if optimizer.spike_factor and not config.train.max_skipped:
        raise InputError(
            f"optimizer.spike_factor={optimizer.spike_factor}: spikes are skipped within "
            "train.max_skipped, which is 0; set it to how many may follow each other"
        )
    if config.metrics.wandb_project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"metrics.wandb_project={config.metrics.wandb_project}: the package wandb is "
            "not installed; run `pip install wandb`, or leave it empty"
        )
    preference, lora = config.preference, config.lora
    _check(
        preference.label_smoothing < 0.5, config, "preference.label_smoothing", "< 0.5"
    )
    if preference.loss == "ipo" and preference.label_smoothing:
        raise InputError(
            "preference.label_smoothing: preference.loss=ipo has none; set it to 0"
        )
    unknown = sorted(set(lora.targets) - set(default().lora.targets))
    if unknown or not lora.targets:
        raise InputError(
            f"lora.targets={','.join(lora.targets)}: some of "
            f"{', '.join(default().lora.targets)} are wanted"
        )
    temperature = config.data.temperature
    _check(
        temperature == 0 or temperature >= 1,
        config,
        "data.temperature",
        "0, or 1 or more",
    )
    for key in (
        "select.near_duplicates",
        "select.origin_share",
        "clean.near_duplicates",
        "clean.min_letters",
        "clean.max_repetition",
        "optimizer.warmup_share",
    ):
        _check(config[key] <= 1, config, key, "at most 1")
    _check(
        "://" not in config.data.prepared,
        config,
        "data.prepared",
        "a folder on a local disk",
    )
    if config.clean.decontaminate and not any(
        exam.path for exam in config.eval.exams.values()
    ):
        raise InputError(
            f"clean.decontaminate={config.clean.decontaminate}: looks for the exams of "
            "eval.exams, of which none has a path; add one, or set it to 0"
        )
    _check_teacher(config)
    _check_sources(config)
    _check_formats(config)
    _check_selection(config)
    if config.job != "export":
        _check_batch(config, num_devices)


def frozen_dtype(model: ml_collections.ConfigDict) -> str:
    """What a phase keeps its frozen model in, from `config.model`."""
    return model.teacher_dtype or _coarser(model.param_dtype, model.compute_dtype)


def _coarser(*dtypes: str) -> str:
    return "bfloat16" if "bfloat16" in dtypes else "float32"


def _check_teacher(config) -> None:
    """Raises InputError if the teacher, or what is prepared of it, does not suit."""
    model = config.model
    student = _coarser(model.param_dtype, model.compute_dtype)
    frozen = _coarser(frozen_dtype(model), model.compute_dtype)
    # Adapters are trained on the frozen model itself.
    if config.job == "train" and not config.lora.rank and frozen != student:
        raise InputError(
            f"model.teacher_dtype={model.teacher_dtype}: rounds the start otherwise than "
            f"model.param_dtype={model.param_dtype} and "
            f"model.compute_dtype={model.compute_dtype} do, so that margins and KL would "
            "not begin at 0; leave it empty"
        )
    objective = config.objective
    if objective.teacher == "step":
        if objective.teacher_top_k:
            raise InputError(
                f"objective.teacher_top_k={objective.teacher_top_k}: goes with "
                "objective.teacher='prepared'"
            )
    elif config.job == "train" and not config.data.prepared:
        raise InputError(
            "objective.teacher=prepared: set data.prepared to the folder that holds it"
        )


def check_schedule(config: ml_collections.ConfigDict, num_steps: int) -> None:
    """Checks the learning rate's schedule against the length of the phase.

    Raises:
      InputError: its parts do not fit into `num_steps`.
    """
    optimizer = config.optimizer
    steps = f"train.num_steps={num_steps}"
    if not config.train.num_steps:
        steps = f"the {num_steps} steps that the limits of the sources make"
    _check(
        optimizer.warmup_steps < num_steps,
        config,
        "optimizer.warmup_steps",
        f"less than {steps}",
    )
    warmup = warmup_steps(optimizer, num_steps)
    if optimizer.schedule == "wsd":
        decay_steps = round(optimizer.decay_fraction * num_steps)
        _check(
            0 < decay_steps <= num_steps - warmup,
            config,
            "optimizer.decay_fraction",
            f"a share of the steps that leaves room for {warmup} of warm-up",
        )


def warmup_steps(optimizer: ml_collections.ConfigDict, num_steps: int) -> int:
    """Steps of warm-up in a phase of `num_steps`, see `config.optimizer`."""
    share = int(optimizer.warmup_share * num_steps + 0.5)
    return optimizer.warmup_steps or min(share, num_steps - 1)


def objective_weights(config: ml_collections.ConfigDict, name: str) -> dict[str, float]:
    """The weight of each objective on the tokens of one source."""
    entry = config.sources[name]
    return {
        objective: config.objective[key] if entry[key] is None else entry[key]
        for objective in OBJECTIVES
        for key in (f"{objective}_weight",)
    }


def for_phase(
    config: ml_collections.ConfigDict, phase: str
) -> ml_collections.ConfigDict:
    """The config of one phase: the shared one with the phase's overrides.

    Raises:
      InputError: the overrides name a key that does not exist or change its type.
    """
    merged = ml_collections.ConfigDict(config.to_dict())
    merged.phases = ()
    merged.overrides = ml_collections.ConfigDict()
    for name in config.overrides:
        if name not in config.phases:
            raise InputError(
                f"overrides.{name}: no such phase; config.phases has "
                f"{', '.join(config.phases)}"
            )
    overrides = config.overrides.get(phase, {})
    _check_keys(overrides, merged, f"overrides.{phase}.")
    merged.update(overrides)
    earlier = tuple(config.phases)[: list(config.phases).index(phase)]
    for key, value in _leaves(merged.to_dict()):
        for part in _PHASE.split(value)[1:] if isinstance(value, str) else ():
            name = re.split("[/,]", part)[0]
            # A source of a later phase may be named where it is not read.
            known = earlier if key == "init_from" else tuple(config.phases)
            if name not in known:
                raise InputError(
                    f"{key}={value!r} (phase {phase}): there is no phase {name!r}"
                    f"{' before it' if key == 'init_from' else ''}; known: "
                    f"{', '.join(known) or 'none'}"
                )
    return merged


def resolve_phases(
    config: ml_collections.ConfigDict, run_folder: str
) -> ml_collections.ConfigDict:
    """The same config with every path "phase:NAME/..." one under the run's folder."""

    def resolve(value):
        if isinstance(value, dict):
            return {key: resolve(entry) for key, entry in value.items()}
        if isinstance(value, str):
            return _PHASE.sub(lambda _: f"{run_folder}/", value)
        return value

    return ml_collections.ConfigDict(resolve(config.to_dict()))


def changed(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a config that are not at their defaults, by dotted key.

    What a stored config is too old to have is at its default, so two configs say the
    same if this does.
    """
    return {key: value for key, value in _leaves(config) if _default_of(key) != value}


def _default_of(key: str) -> Any:
    """The default of a dotted key, or None."""
    for pattern, defaults in _defaults():
        if found := pattern.fullmatch(key):
            return defaults.get(found[1])
    return None


@functools.cache
def _defaults() -> list[tuple[re.Pattern, dict[str, Any]]]:
    sections = [
        (r"(?:sources|eval\.texts|eval\.pairs)\.[^.]+\.(.+)", source()),
        (r"eval\.exams\.[^.]+\.(.+)", exam()),
        ("(.+)", default()),
    ]
    return [(re.compile(p), dict(_leaves(part.to_dict()))) for p, part in sections]


def first_difference(
    config: ml_collections.ConfigDict,
    stored: dict[str, Any],
    is_finished: bool = False,
) -> tuple[str, Any, Any] | None:
    """The first setting in which a stored config computes something else, or None.

    Args:
      config: the config now.
      stored: the one that a folder was begun with.
      is_finished: whether the folder's phase is at its end. Before it, the batch size
        may change, where the rows of the stream do not depend on it.

    Returns:
      (key, stored value, value now).
    """
    now, then = (changed(c) for c in (config.to_dict(), stored))
    free = (*FREE_ON_RESUME, *_unread(config))
    moves = any(entry.final_weight is not None for entry in config.sources.values())
    if config.train.num_steps and not moves and not is_finished:
        free = (*free, "data.batch_size")
    for key in sorted(now.keys() | then.keys()):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if now.get(key) != then.get(key):
            default = _default_of(key)
            return key, then.get(key, default), now.get(key, default)
    return None


def _unread(config) -> Iterator[str]:
    """What the config's job does not read."""
    yield from _UNREAD.get(config.job, ())
    if config.job != "train":
        return
    if config.objective.kind != "preference":
        yield "preference"
    asked = {exam.source for exam in config.eval.exams.values()}
    for name, entry in config.sources.items():
        if not (entry.weight or entry.holdout or name in asked):
            yield f"sources.{name}"


def all_sources(config) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """Place in the config -> all that `source` made: what is learnt, and measured."""
    for section in ("sources", "eval.texts", "eval.pairs"):
        for name, entry in config[section].items():
            yield f"{section}.{name}", entry


def _check_paths(config) -> None:
    """Of what has no default, all that is missing is told at once."""
    wanted = [("model", config.model), *all_sources(config)]
    missing = [f"{place}.path" for place, entry in wanted if not entry.path]
    if missing:
        flags = " ".join(f"--config.{key}=..." for key in missing)
        raise InputError(f"{', '.join(missing)}: no path is given; add {flags}")


def _check_sources(config) -> None:
    is_training = config.job == "train"
    if is_training and not any(entry.weight > 0 for entry in config.sources.values()):
        raise InputError(
            "sources: none has a weight above 0; give at least one something to learn"
        )
    for place, entry in all_sources(config):
        for key in ("weight", "holdout", "max_records", "epochs", "max_tokens"):
            _check(entry[key] >= 0, config, f"{place}.{key}", "0 or more")
        if entry.final_weight is not None and not (
            entry.weight > 0 and 0 < entry.final_weight < math.inf
        ):
            raise InputError(
                f"{place}.final_weight={entry.final_weight}: a number above 0 is wanted, "
                f"and {place}.weight above 0 (as little as 1e-6 will do)"
            )
        for key, choices in (
            ("on_bad_record", ("refuse", "skip")),
            ("format", FORMATS),
        ):
            known = f"one of {', '.join(choices)}"
            _check(entry[key] in choices, config, f"{place}.{key}", known)
    if (
        is_training
        and not config.train.num_steps
        and not any(
            entry.weight and (entry.epochs or entry.max_tokens)
            for entry in config.sources.values()
        )
    ):
        raise InputError(
            "train.num_steps=0: reads to the limits of the sources, and none has one; set "
            "epochs or max_tokens of the source that decides, or train.num_steps"
        )
    for name, entry in config.sources.items():
        is_pair = entry.format == "chat_preference"
        measured = config.eval.pairs if is_pair else config.eval.texts
        if name == "eval" or (entry.holdout and name in measured):
            raise InputError(
                f"sources.{name}: this name is taken by eval; choose another"
            )
        weights = objective_weights(config, name)
        if config.objective.kind != "tokens":
            continue
        if entry.weight and (min(weights.values()) < 0 or not any(weights.values())):
            raise InputError(
                f"sources.{name}: objective weights {weights}: one must be above 0 and "
                f"none below; set objective.* or sources.{name}.*_weight"
            )
    for name, entry in config.eval.exams.items():
        place = f"eval.exams.{name}"
        if bool(entry.path) == bool(entry.source):
            raise InputError(f"{place}: give either path or source")
        if entry.source:
            known = entry.source in config.sources
            _check(
                known and config.sources[entry.source].reader == "docstrings",
                config,
                f"{place}.source",
                "a source whose reader is docstrings",
            )
            _check(entry.num_questions > 0, config, f"{place}.num_questions", "above 0")


def _check_formats(config) -> None:
    """Pairs are for preference objectives alone, and these for pairs alone."""
    kind = config.objective.kind
    for name, entry in config.sources.items():
        is_pair = entry.format == "chat_preference"
        if config.job == "train" and entry.weight and is_pair != (kind == "preference"):
            raise InputError(
                f"sources.{name}.format={entry.format!r} does not go with "
                f"objective.kind={kind!r}: pairs ('chat_preference') are learnt with "
                "'preference', all other formats with 'tokens'"
            )
    for section, is_pair in (("texts", False), ("pairs", True)):
        for name, entry in config.eval[section].items():
            for trained, source_entry in config.sources.items():
                if config.job == "train" and _is_all_measured(source_entry, entry):
                    raise InputError(
                        f"eval.{section}.{name}: sources.{trained} trains on the same "
                        "files, of which nothing is left once all of them are measured; "
                        f"set eval.{section}.{name}.holdout to a number above 0, or name "
                        "other files"
                    )
            _check(
                (entry.format == "chat_preference") == is_pair,
                config,
                f"eval.{section}.{name}.format",
                "chat_preference" if is_pair else "no chat_preference",
            )
    if kind == "preference" and config.data.overlong == "split":
        raise InputError(
            "data.overlong='split': a pair cannot be split; use truncate, drop or refuse"
        )


def _is_all_measured(trained, measured) -> bool:
    """Whether all that a source would train on is measured, as far as settings tell."""
    is_read_whole = not measured.max_records or (
        0 < trained.max_records <= measured.max_records
    )
    return (
        trained.weight > 0
        and not measured.holdout
        and is_read_whole
        and trained.split == measured.split
        and (
            trained.reader == measured.reader or "" in (trained.reader, measured.reader)
        )
        and _spelt_out(trained.path) == _spelt_out(measured.path)
    )


def _spelt_out(path: str) -> str:
    """A path on a local disk without links and dots; another one as it stands."""
    if "://" in path or path.startswith(("package:", "phase:")):
        return path
    return os.path.realpath(os.path.expanduser(path))


def _check_selection(config) -> None:
    for name, count in config.select.keep.items():
        place = f"select.keep.{name}"
        if name not in config.sources:
            raise InputError(
                f"{place}: no such source; known: {', '.join(config.sources)}"
            )
        if not _same_type(count, 0) or count < 1:
            raise InputError(f"{place}={count!r}: a number of samples is wanted")
        _check(
            config.sources[name].format in ("instruction", "preference", "chat"),
            config,
            f"sources.{name}.format",
            "instruction, preference or chat (for select.keep)",
        )
        most = config.select.max_candidates
        if config.job == "select" and count > most:
            raise InputError(
                f"{place}={count}: more than select.max_candidates={most}; raise that"
            )
    if config.job == "select" and not config.select.keep:
        raise InputError("select.keep: names no source; say how many samples of which")


def _check_batch(config, num_devices: int | None) -> None:
    batch, parts = config.data.batch_size, config.optimizer.accumulation_steps
    if batch % parts:
        raise InputError(
            f"optimizer.accumulation_steps={parts} does not divide "
            f"data.batch_size={batch}; make the batch a multiple"
        )
    if num_devices is None:
        return
    # Imported here: reading a config must not load jax.
    from mixcpt_jax import sharding

    data, fsdp, _ = sharding.mesh_shape(config.mesh, num_devices)
    for key, rows in (
        ("data.batch_size / optimizer.accumulation_steps", batch // parts),
        ("eval.batch_size", config.eval.batch_size),
    ):
        if rows % (data * fsdp):
            raise InputError(
                f"{key} = {rows} rows do not divide over the mesh's "
                f"data x fsdp = {data} x {fsdp}; use a multiple of {data * fsdp}"
            )


def _check_keys(config, reference, place: str) -> None:
    """Unknown keys and changed types, recursively; free-form sections end it."""
    for key, value in config.items():
        if key not in reference:
            known = ", ".join(reference)
            raise InputError(f"{place}{key}: unknown key; known here: {known}")
        wanted = reference[key]
        if isinstance(wanted, ml_collections.ConfigDict):
            if not isinstance(value, ml_collections.ConfigDict):
                raise InputError(f"{place}{key}={value!r}: a section is wanted")
            if len(wanted):
                _check_keys(value, wanted, f"{place}{key}.")
        elif wanted is None:
            if value is not None and not _same_type(value, 0.0):
                raise InputError(f"{place}{key}={value!r}: a number or None is wanted")
        elif not _same_type(value, wanted):
            raise InputError(
                f"{place}{key}={value!r}: {type(wanted).__name__} is wanted, "
                f"found {type(value).__name__}"
            )


def _same_type(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(wanted, bool)
    if isinstance(wanted, tuple):
        return isinstance(value, (list, tuple))
    if isinstance(wanted, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(wanted))


def _check(holds: bool, config, key: str, wanted: str) -> None:
    if not holds:
        raise InputError(f"{key}={config[key]!r}: {wanted} is wanted")


def _fill(values, settings, what: str) -> ml_collections.ConfigDict:
    for key, value in settings.items():
        if key not in values:
            raise InputError(
                f"{what}({key}=...): unknown setting; known: {', '.join(values)}"
            )
        values[key] = value
    return values


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, list(tree) if isinstance(tree, tuple) else tree
