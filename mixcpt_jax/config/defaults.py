"""Every key with its default, its meaning and its bounds.

A config file calls `default()`, adds sources with `source(...)` and sets the keys that
differ.
"""

import functools
from collections.abc import Iterator
from typing import Any

import ml_collections

from mixcpt_jax.config.settings import defaults_of, matching, number, one_of
from mixcpt_jax.core.errors import InputError

OBJECTIVES = ("ntp", "lssd", "kd", "selective")

REMAT = ("none", "dots", "full", "offload")


# The size of the text in a compressed file, as a multiple of the file's; text rarely
# expands tenfold.
MAX_EXPANSION = 200

# Bounds of the values in `select.keep`, and in `merge.keep` and `train.keep_budget`.
SAMPLES = number(200, least=1, most=10**8)
BUDGET = number(0.02, least=0, most=1e6)


def default() -> ml_collections.ConfigDict:
    """Every key at its default."""
    return defaults_of(bounded_config())


def bounded_config() -> ml_collections.ConfigDict:
    """Every key with its default, its bounds and its meaning."""
    config = ml_collections.ConfigDict()
    # Of random weights, the order of rows, holdouts and sampling.
    config.seed = number(0, least=0, most=2**31 - 1)
    # What the phase does: train; generate a source (see `generate`); merge the start and
    # the end of a trained phase (see `merge`); select samples (see `select`); evaluate;
    # export to a Hugging Face folder.
    config.job = one_of("train", "generate", "merge", "select", "evaluate", "export")
    # Folder of a phase: training starts from the parameters of its last checkpoint.
    # Empty: from the weights of `model.path`.
    config.init_from = ""
    # Names of the phases to run one after the other, each in its own folder under the
    # workdir; `overrides[name]` holds the settings that differ in that phase. Empty: a
    # single phase with this config. A path that begins with "phase:NAME" is in the
    # folder of phase NAME.
    config.phases = ()
    # Phase -> its settings that differ from those of this config.
    config.overrides = ml_collections.ConfigDict()

    # The model: an HF folder (config.json and safetensors), a GGUF file, or a model of the
    # Hub, ORG/NAME or hf://ORG/NAME@REVISION. So is the tokenizer.
    config.model = ml_collections.ConfigDict(
        {
            # Folder or file of the model; an empty path is an error.
            "path": "",
            # "random" initializes the weights from `seed`; then only config.json and
            # the tokenizer of the HF folder at `path` are read.
            "weights": one_of("pretrained", "random"),
            # config.json of the architecture, for `plan` on machines without `path`.
            "architecture": "",
            # Folder or file of the tokenizer; empty: `path`.
            "tokenizer": "",
            # File of a Jinja chat template; empty: the tokenizer's own, or ChatML.
            "chat_template": "",
            # Dtype of the trained parameters. With bfloat16, updates are rounded
            # stochastically, so that small ones are not lost. Norm scales and biases
            # are always float32.
            "param_dtype": one_of("float32", "bfloat16"),
            # Dtype of the activations and of matrix products, which add up in float32.
            "compute_dtype": one_of("bfloat16", "float32"),
            # Dtype of the frozen model: teacher, reference or base of the adapters.
            # Empty: the coarser of the two above. Then both models compute the same at
            # the start, so margins and KL begin at 0.
            "teacher_dtype": one_of("", "float32", "bfloat16"),
            # What the backward pass recomputes. none: nothing; dots: everything except
            # matrix products; full: each layer from its input. offload: as full, but on
            # a TPU the inputs wait in the host's memory, not in the chip's; elsewhere it
            # is full.
            "remat": one_of("full", "none", "dots", "offload"),
        }
    )

    # Another teacher: the model whose distributions `lssd_weight`, `kd_weight`,
    # `selective_weight` and `token_weighting` of `objective` use. Empty paths: the model
    # that the phase starts from. It must have the vocabulary of `model`; its size, depth
    # and number of padding rows may differ. The reference of preference phases, the base of
    # adapters, measures and selection are always the model that the phase starts from.
    config.teacher = ml_collections.ConfigDict(
        {
            # As `model.path`; for `plan`, a config.json is enough. Empty with `init_from`:
            # `model.path`.
            "path": "",
            # Folder of a phase: the teacher is the model at its end. Empty: the weights of
            # `path`.
            "init_from": "",
            # Folder or file of its tokenizer; empty: `path`.
            "tokenizer": "",
        }
    )

    # The device mesh; one size may be -1: the remaining devices. `topology` is the TPU
    # slice that the mesh is for, such as v5e:4x4, or v5e:16x16*4 for four slices; only
    # `plan` reads it.
    config.mesh = ml_collections.ConfigDict(
        {
            # Slices, which only the data center network connects. 0: found from the
            # devices. A number is checked on TPUs; elsewhere it groups the devices.
            "slices": number(0, least=1, most=2**12, also=0),
            # Copies of the weights, over which the batch is split; on several slices a
            # multiple of their number.
            "data": number(1, least=1, most=2**20, also=-1),
            # Devices over which weights, moments and the batch are split.
            "fsdp": number(-1, least=1, most=2**20, also=-1),
            # Devices over which heads, the MLP and the vocabulary are split.
            "tensor": number(1, least=1, most=2**20, also=-1),
            # Mixture of experts: devices over which experts are split; must divide fsdp.
            "expert": number(1, least=1, most=2**20),
            # TPU slice of the mesh, such as v5e:4x4, for `plan`; v5e:16x16*4: four slices.
            "topology": "",
        }
    )

    # Sizes of the unembedding and the losses, see `streamed.head_loss`. 0: chosen from the
    # device and the vocabulary.
    config.head = ml_collections.ConfigDict(
        {
            # Tokens whose logits are in a device's memory at a time.
            "chunk_size": number(0, least=8, most=2**20, also=0),
            # Tokens whose logit gradients share one pair of matrix products; a multiple
            # of chunk_size.
            "block_size": number(0, least=8, most=2**22, also=0),
            # Columns of the vocabulary at a time; 0: all columns of the device.
            "vocab_tile": number(0, least=8, most=2**24, also=0),
            # True: splits the vocabulary over mesh.fsdp too and gathers hidden states.
            # False: gathers the unembedding, which takes several times the memory.
            "vocab_parallel": True,
        }
    )

    # Low-rank adapters (LoRA). With a rank above 0 only adapters are trained, saved and in
    # the optimizer. Their frozen base is also the teacher or reference, in one copy.
    config.lora = ml_collections.ConfigDict(
        {
            # Columns of each adapter; 0: all weights are trained.
            "rank": number(0, least=0, most=8192),
            # The adapters' product is scaled by alpha / rank.
            "alpha": number(16.0, above=0, most=1e6),
            # The layers' matrices that have adapters.
            "targets": ("query", "key", "value", "output", "gate", "up", "down"),
        }
    )

    # The training objective. Kind "tokens": a weighted sum of the losses below on each
    # token; a source can set its own weights. Kind "preference": pairs of answers, see
    # `preference`. The default is Mix-CPT's objective: next-token prediction plus logit
    # swap self-distillation. The paper does not publish the weight of the latter; 0.8 and
    # 0.2 were the best of the weights compared in experiments/README.md.
    config.objective = ml_collections.ConfigDict(
        {
            # "tokens" or "preference", as above.
            "kind": one_of("tokens", "preference"),
            "ntp_weight": number(0.8, least=0, most=1000),  # next-token prediction
            # Logit swap self-distillation.
            "lssd_weight": number(0.2, least=0, most=1000),
            "kd_weight": number(0.0, least=0, most=1000),  # plain distillation
            # Next-token prediction where the teacher's top token is not the gold one,
            # plain distillation where it is. With weights m here and 1 - m for LSSD the
            # gold token's target is m + (1 - m) p_a wherever the teacher is wrong.
            "selective_weight": number(0.0, least=0, most=1000),
            # The factor on the weight of next-token prediction at each token: none;
            # teacher_probability, the teacher's probability of the gold token; or
            # excess_loss, twice the sigmoid of the model's loss minus the teacher's. See
            # `dense.token_factor`.
            "token_weighting": one_of("none", "teacher_probability", "excess_loss"),
            # "step" runs the teacher in every step; "prepared" reads the teacher's
            # outputs from `data.prepared`, where `python -m mixcpt_jax prepare
            # --teacher` writes them.
            "teacher": one_of("step", "prepared"),
            # What is prepared of the teacher. 0: its last hidden states, in bfloat16.
            # k > 0: its k most likely tokens and the gold token; all other tokens are
            # one outcome.
            "teacher_top_k": number(0, least=0, most=2**16),
            # Mixture of experts: the weight of the loss that makes routers choose all
            # experts equally often; 0.01 is common in pre-training. 0: routers change
            # only as the other losses ask.
            "load_balance": number(0.0, least=0, most=1000),
        }
    )

    # DPO and its variants (`dense.preference_loss`), for objective.kind "preference".
    # The reference is the frozen model that the phase starts from.
    config.preference = ml_collections.ConfigDict(
        {
            "loss": one_of("sigmoid", "ipo"),  # sigmoid: DPO; ipo
            # Scales the margin: a larger value keeps the model nearer to the reference.
            "beta": number(0.1, above=0, most=1000),
            # Assumed share of pairs whose chosen and rejected answers are swapped.
            "label_smoothing": number(0.0, least=0, below=0.5),
            # Means over tokens instead of sums; ipo always uses means.
            "length_normalised": False,
            # Weight of the chosen answer's NLL per token (RPO).
            "sft_weight": number(0.0, least=0, most=1000),
            # When the reference runs: "step": in every step, beside the policy;
            # "precomputed": once over all pairs, before the first step.
            "reference": one_of("step", "precomputed"),
        }
    )

    # The knowledge mixture: name -> source(...).
    config.sources = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict(
        {
            # Tokens per row, and rows per step over all devices. With batch_size=0 the
            # batch sizes, optimizer.accumulation_steps and a row_length of 0 are chosen
            # from the corpus and the memory of a device, see `sizing`.
            "row_length": number(2048, least=0, most=2**20),
            # Rows of a step, over all devices and microbatches.
            "batch_size": number(8, least=0, most=2**20),
            # split: joins all examples of a source end to end and cuts them into full
            # rows. best_fit: keeps an example whole if it fits in a row, and pads a
            # little. by_format: split for documents, best_fit for all other formats,
            # whose answers mean little without their questions.
            "packing": one_of("by_format", "split", "best_fit"),
            # 0: a source's share of the mixture is its weight. >= 1: its share is
            # weight x size^(1 / temperature), where size is its number of loss tokens:
            # at 1 the share is proportional to size; higher values make the shares more
            # alike.
            "temperature": number(0.0, least=1, most=1000, also=0),
            # Examples longer than a row, and pairs that do not fit in one: split
            # (documents continue in the next row), truncate (at the end; of a pair each
            # answer to half a row), drop or refuse. The run counts how many were split,
            # cut or dropped.
            "overlong": one_of("split", "truncate", "drop", "refuse"),
            # Epochs of one source above which a run warns, and above which it is refused;
            # 0: no limit. Up to 4 epochs, repeated text is nearly as good as new text; from
            # about 40 epochs on it is worth nothing (Muennighoff et al. 2023).
            "warn_epochs": number(4.0, least=0, most=1e6),
            # Epochs from which a source is refused; 0: no limit.
            "max_epochs": number(40.0, least=0, most=1e6),
            # Processes that build batches; 0: threads.
            "num_workers": number(0, least=0, most=256),
            # Folder of tokens that `python -m mixcpt_jax prepare` wrote. Sources that
            # have not changed since then are read from it. Empty: none.
            "prepared": "",
        }
    )

    # Filters that leave texts of the sources out of training. All are off by default.
    # They apply after the holdout is chosen, so measured records stay the same.
    config.clean = ml_collections.ConfigDict(
        {
            # Texts that equal an earlier one of their source, ignoring case and whitespace.
            "exact_duplicates": False,
            # Texts whose similarity to an earlier one of their source (Jaccard, word
            # 5-grams) is at least this; 0: off.
            "near_duplicates": number(0.0, least=0, most=1),
            # Documents shorter or longer than this, in characters; 0: no limit. These and
            # the next two rules are for format "document" only.
            "min_characters": number(0, least=0, most=10**9),
            # The maximum, see above.
            "max_characters": number(0, least=0, most=10**9),
            # Documents with a smaller share of letters (any script) among the
            # non-whitespace characters.
            "min_letters": number(0.0, least=0, most=1),
            # Documents with a larger share of text that repeats an earlier part of the
            # document.
            "max_repetition": number(1.0, least=0, most=1),
            # Texts that share this many words in a row with an exam of `eval.exams`; 13 is
            # usual; 0: off.
            "decontaminate": number(0, least=0, most=1000),
        }
    )

    config.optimizer = ml_collections.ConfigDict(
        {
            # The peak of the schedule.
            "learning_rate": number(1e-5, above=0, most=10),
            # After the warmup: cosine decay; wsd: constant, then a linear decay; constant.
            "schedule": one_of("cosine", "wsd", "constant"),
            # Steps over which the rate rises to its peak; 0: `warmup_share` of all
            # steps.
            "warmup_steps": number(0, least=0, most=10**8),
            # Share of the steps over which the rate rises, if `warmup_steps` is 0.
            "warmup_share": number(0.0, least=0, most=1),
            # Learning rate of the last step / peak (cosine, wsd).
            "final_ratio": number(0.1, least=0, most=1),
            # Share of the steps over which the rate decays (wsd).
            "decay_fraction": number(0.2, above=0, most=1),
            # Decoupled, on matrices alone, as in AdamW.
            "weight_decay": number(0.1, least=0, most=100),
            # Decay of Adam's first moment.
            "beta1": number(0.9, least=0, below=1),
            # Decay of Adam's second moment.
            "beta2": number(0.95, least=0, below=1),
            # Added to the root of Adam's second moment.
            "epsilon": number(1e-8, above=0, most=1),
            # Dtype of Adam's moments; with bfloat16 they are rounded stochastically
            # too.
            "moments_dtype": one_of("float32", "bfloat16"),
            "clip_norm": number(1.0, least=0, most=1e6),  # 0: no clipping
            # A step is skipped (see train.max_skipped) if its gradient norm is above this
            # multiple of the running mean over about 100 steps; 0: off.
            "spike_factor": number(0.0, above=1, most=1e6, also=0),
            "accumulation_steps": number(
                1, least=1, most=2**20
            ),  # microbatches per step
        }
    )

    config.train = ml_collections.ConfigDict(
        {
            # 0: until every source with `epochs` or `max_tokens` reaches its limit; the
            # other sources keep their shares until then.
            "num_steps": number(1000, least=0, most=10**8),
            # Steps between lines of metrics.jsonl.
            "log_every": number(1, least=1, most=10**8),
            "save_every": number(200, least=0, most=10**8),  # 0: only at the end
            # 0: only before the first step and after the last.
            "eval_every": number(0, least=0, most=10**8),
            # Whether to measure before the first step, which every change is relative to.
            "eval_before": True,
            # Measure -> its budget, as in `merge.keep`: how much worse than at the start of
            # the phase it may become, such as {"general/kl_from_start": 0.05}. Training
            # stops at the first evaluation that finds a budget exceeded, and the phase
            # ends with the weights of the evaluation before. Needs `eval_every`; every
            # evaluation also saves a checkpoint. Empty: no budget.
            "keep_budget": ml_collections.ConfigDict(),
            # Checkpoints to keep. If the newest is damaged on disk, the previous one is
            # used.
            "keep_last": number(2, least=1, most=10**8),
            # How many steps in a row may be skipped because their gradient is not
            # finite or a spike. A skipped step leaves parameters and moments unchanged.
            # One more skipped step in a row ends the run. 0: the first loss that is not
            # finite ends the run.
            "max_skipped": number(0, least=0, most=10**8),
            # Seconds without progress (a step, a measured batch, a checkpoint) after
            # which the run prints the stacks of all threads and ends; 0: never. Set it
            # to more than the time of a compilation, of `log_every` steps, of a save
            # and of the answers to all prompts, such as 1800 on a slice.
            "timeout": number(0.0, least=0, most=7 * 86_400),
            # Steps to trace for XProf, as "10:13"; SIGUSR1 traces the next three. Each
            # host writes below PHASE/tensorboard, where TensorBoard's XProf opens it.
            "profile": matching(
                "", r"|[1-9]\d{0,7}:[1-9]\d{0,7}", "FIRST:LAST, as in 10:13"
            ),
            # Port from which XProf captures a trace of a run that is under way; 0: none.
            "profiler_port": number(0, least=0, most=65_535),
        }
    )

    config.eval = ml_collections.ConfigDict(
        {
            # Rows measured at a time.
            "batch_size": number(8, least=0, most=2**20),
            # Tokens per measured row; 0: data.row_length. To compare the numbers of
            # phases, give them the same length, since longer rows give more context.
            "row_length": number(0, least=0, most=2**20),
            # Maximum number of tokens to measure of each text, exam and set of pairs;
            # 0: all. `mixture.within` selects the examples.
            "max_tokens": number(65536, least=0, most=10**12),
            # Whether to measure `kl_from_start` on each text, the forecast of forgetting:
            # KL(start || now) per loss token. if_loaded: if training holds the start
            # anyway, as teacher, reference or base of adapters; always: the start is
            # loaded, in `model.teacher_dtype`; never. The start is what a training
            # phase starts from. A merge measures from its share 0, and an evaluation from
            # the weights of `model.path`, both only with "always".
            "kl_from_start": one_of("if_loaded", "always", "never"),
            # Measured texts: name -> source(...). No source trains on them. With a
            # `holdout`, that many records are measured: the same records as the holdout
            # of a source with the same path. For format "cloze", the share of targets
            # that greedy decoding generates exactly is measured too.
            "texts": ml_collections.ConfigDict(),
            # Multiple choice: name -> exam(...).
            "exams": ml_collections.ConfigDict(),
            # Preference pairs: name -> source(format="chat_preference", ...).
            "pairs": ml_collections.ConfigDict(),
            # JSONL of {"prompt"} or {"messages"}, answered greedily before the first step
            # and after the last.
            "prompts": "",
            # Longer answers to `prompts` are cut off.
            "max_new_tokens": number(128, least=1, most=2**20),
        }
    )

    # A source that a phase writes (job "generate"); later ones read it from
    # "phase:NAME/generated".
    config.generate = ml_collections.ConfigDict(
        {
            # replay: samples of the model that the phase starts from, as documents, or
            # answers to the prompts of `prompts` or of `source`. comprehension: each
            # document of `source`, followed by questions and answers made by rules.
            # questions: followed by a question and an answer that the model writes.
            "kind": one_of("replay", "comprehension", "questions"),
            # The source of documents or prompts; empty: none.
            "source": "",
            # JSONL of {"prompt"} or {"messages"}, for kind replay; empty: none.
            "prompts": "",
            # Tokens to write, at least.
            "num_tokens": number(100_000, least=1, most=2**40),
            # Longer samples are cut off.
            "max_new_tokens": number(256, least=1, most=2**20),
            # 1 samples from the model's own distribution.
            "temperature": number(1.0, least=0, most=100),
            # Samples from the most likely tokens with this share of the probability.
            "top_p": number(1.0, above=0, most=1),
        }
    )

    # Weights between the start and the end of the phase `init_from` (job "merge").
    config.merge = ml_collections.ConfigDict(
        {
            # Shares to measure, besides the start: each is the weights
            # `start + share (end - start)`.
            "shares": (0.25, 0.5, 0.75, 1.0),
            # Measure -> its budget, how much worse than at the start it may become,
            # such as {"general/loss": 0.02}: higher for losses and perplexities, lower
            # for all others. The largest share within all budgets is saved; without a
            # budget, the largest share.
            "keep": ml_collections.ConfigDict(),
        }
    )

    # Which samples of the mixture go to format alignment (job "select").
    config.select = ml_collections.ConfigDict(
        {
            # random: runs no model; perplexity: scores each sample once;
            # format_alignment: scores each sample twice. In our study all three gave the
            # same quality.
            "method": one_of("random", "perplexity", "format_alignment"),
            # Maximum number of samples of a source to score, chosen by a hash of their
            # text.
            "max_candidates": number(2000, least=1, most=10**8),
            # Source -> how many of its samples to select.
            "keep": ml_collections.ConfigDict(),
            # Maximum length of a sample in its chat format, in tokens; longer samples
            # are left out.
            "max_tokens": number(1024, least=1, most=2**20),
            # Minimum length of its response, in tokens. Scores of shorter responses are
            # mostly noise, so these samples are left out too.
            "min_response_tokens": number(8, least=0, most=2**20),
            # Samples whose similarity to an earlier one (Jaccard, word 5-grams) is at least
            # this are left out; 0: only exact copies are.
            "near_duplicates": number(0.8, least=0, most=1),
            # Field with a sample's origin, and the largest share of the selected samples
            # that may have the same origin; 1: no limit.
            "origin_field": "origin",
            # The largest share of one origin, see above.
            "origin_share": number(1.0, above=0, most=1),
        }
    )

    config.export = ml_collections.ConfigDict(
        {
            # Of the exported weights.
            "dtype": one_of("bfloat16", "float32", "float16"),
            # The model of the Hub, ORG/NAME, that the folder is pushed to with a model
            # card, as the owner of HF_TOKEN; empty: none.
            "hub_id": "",
            # Whether that model, if it is new, is private.
            "private": True,
        }
    )
    config.runtime = ml_collections.ConfigDict(
        {
            # Folder for compiled programs, so that a resumed run does not compile again;
            # "off"; or "auto": on TPUs and GPUs, a folder of the user's cache, or of the
            # workdir if that is in a bucket. JAX_COMPILATION_CACHE_DIR takes precedence.
            "compilation_cache": "auto",
        }
    )
    config.metrics = ml_collections.ConfigDict(
        {
            # Whether to write TensorBoard files beside metrics.jsonl.
            "tensorboard": True,
            "wandb_project": "",  # empty: none
            # Name of the run for ml-goodput-measurement, which records in Google Cloud
            # Logging; empty: none.
            "goodput_job": "",
            # Whether to print progress.
            "progress": True,
            # Terminal output: "text"; or "json": one object per line with time, severity,
            # message and a step's scalars, as GKE and Cloud Logging expect.
            "log": one_of("text", "json"),
        }
    )
    return config


def measure_general(config: ml_collections.ConfigDict) -> None:
    """Adds this package's general text and general exam, which no phase trains on.

    They measure what the model preserves. To use others:
    `--config.eval.texts.general.path=FILE` and `--config.eval.exams.general.path=FILE`.
    """
    assets = "package:mixcpt_jax/assets"
    config.eval.texts.general = source(path=f"{assets}/general_text.jsonl")
    config.eval.exams.general = exam(path=f"{assets}/general_exam.jsonl")


def source(**settings: Any) -> ml_collections.ConfigDict:
    """One source of text.

    path: a file, a folder, a glob or a comma-separated list of them, also of a data set on
      the Hub, hf://datasets/ORG/NAME@REVISION. The files in a folder decide how it is read.
      A local path that exists is taken literally, with its commas and wildcards.
    reader: "text", "html", "pdf", "docx", "csv", "jsonl", "json", "parquet", "arrow" (of
      Hugging Face datasets), "tfds" or "array_record"; empty: from the file names, see
      `sources.read`.
    split: the split of a dataset with several splits, such as a folder whose files are
      named by the Hub's conventions; empty: "train", or the only split; "all": every file.
    subset: of a data set on the Hub, as its card names it, or else a folder of it; empty:
      "default", or the only one.
    data_files: of a data set on the Hub: files or globs, separated by commas, instead of
      those of the subset and the split.
    format: "document", "instruction" or "preference", as plain text; "chat";
      "chat_preference" for pairs; or "cloze", a context and a target that continues it,
      where only the target is trained on or measured.
    fields: the record's field names, where they differ from the format's and from those
      that `data.layouts` recognises, as in {"text": "abstract"}; "a.b" is nested.
      {"csv": {"text": "abstract"}} is a map for one reader; files that are one text have
      no fields to map.
    preference_side: the answer that goes into the plain text: "chosen", "rejected" or
      "both".
    weight: share of the mixture's tokens, relative to the other sources.
    final_weight: the weight at the end of the phase, reached linearly; None: constant.
    epochs: maximum number of passes over the source; 0: as many as its share needs.
    max_tokens: maximum number of its loss tokens, to within a row; 0: no limit. When a
      source reaches a limit, the other sources fill its share.
    max_records: only this many records are read, from the beginning; 0: all.
    on_bad_record: what happens to records that cannot be read, lack a field, have a blank
      field or are not a conversation, and to the rest of a damaged file. "by_kind": of
      documents (text, HTML, PDF, docx, CSV) they are left out and counted by reason; of
      data sets they end the run. "refuse": they end the run. "skip": they are left out.
    holdout: how many records are measured, chosen by a hash of their text. In
      `eval.texts` and `eval.pairs` 0 means all. No source trains on measured records.
    ntp_weight, lssd_weight, kd_weight, selective_weight: weights of the losses on this
      source; None: those of `config.objective`.
    """
    return _fill(defaults_of(bounded_source()), settings, "source")


def bounded_source() -> ml_collections.ConfigDict:
    """Every key of a source, with its default and its bounds."""
    return ml_collections.ConfigDict(
        {
            "path": "",
            "reader": "",
            "split": "",
            "subset": "",
            "data_files": "",
            "format": one_of(
                "document",
                "instruction",
                "preference",
                "cloze",
                "chat",
                "chat_preference",
            ),
            "fields": ml_collections.ConfigDict(),
            "preference_side": one_of("chosen", "rejected", "both"),
            "weight": number(1.0, least=0, most=1e6),
            "final_weight": number(None, above=0, most=1e6),
            "epochs": number(0.0, least=0, most=1e6),
            "max_tokens": number(0, least=0, most=10**15),
            "max_records": number(0, least=0, most=10**12),
            "on_bad_record": one_of("by_kind", "refuse", "skip"),
            "max_expansion": number(MAX_EXPANSION, least=1, most=10**9),
            "holdout": number(0, least=0, most=10**9),
            "ntp_weight": number(None, least=0, most=1000),
            "lssd_weight": number(None, least=0, most=1000),
            "kd_weight": number(None, least=0, most=1000),
            "selective_weight": number(None, least=0, most=1000),
        }
    )


def exam(**settings: Any) -> ml_collections.ConfigDict:
    """One multiple-choice exam.

    path: JSONL of {question, choices, answer}.
    num_questions: how many questions; 0: all of the file.
    """
    return _fill(defaults_of(bounded_exam()), settings, "exam")


def bounded_exam() -> ml_collections.ConfigDict:
    """Every key of an exam, with its default and its bounds."""
    return ml_collections.ConfigDict(
        {"path": "", "num_questions": number(0, least=0, most=10**9)}
    )


def add_entry(config: ml_collections.ConfigDict, section: str, name: str) -> None:
    """Prepares an entry for a path: a source, or a text, exam or pairs to measure.

    A missing entry is added; phases that choose among the sources, such as SFT, do not
    train on it.

    Args:
      config: of a run; may be locked.
      section: "sources", "eval.texts", "eval.exams" or "eval.pairs".
      name: of the entry.
    """
    if name in _section(config, section):
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
    """Checks that the config file has a variant (`--config=FILE:VARIANT`).

    Raises:
      InputError: names the variants that it has.
    """
    if variant and variant not in known:
        raise InputError(
            f"--config=...:{variant}: no such variant; known: {', '.join(known)}"
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


def needs_teacher(config: ml_collections.ConfigDict, weights: dict[str, float]) -> bool:
    """Whether the losses with these weights, by objective, need a teacher."""
    alone = ("ntp",) if config.objective.token_weighting == "none" else ()
    return any(weight for name, weight in weights.items() if name not in alone)


def uses_teacher(config: ml_collections.ConfigDict) -> bool:
    """Whether a phase trains with a teacher."""
    return (
        config.job == "train"
        and config.objective.kind == "tokens"
        and any(
            entry.weight and needs_teacher(config, objective_weights(config, name))
            for name, entry in config.sources.items()
        )
    )


def has_other_teacher(config: ml_collections.ConfigDict) -> bool:
    """Whether a phase trains with a teacher that is not the model it starts from."""
    named = config.teacher.path or config.teacher.init_from
    return bool(named) and uses_teacher(config)


def holds_start(config: ml_collections.ConfigDict) -> bool:
    """Whether a training step holds the whole model that its phase starts from."""
    if config.lora.rank:
        return True
    if config.objective.kind == "preference":
        return config.preference.reference == "step"
    is_start = uses_teacher(config) and not has_other_teacher(config)
    return is_start and config.objective.teacher == "step"


def measures_kl(config: ml_collections.ConfigDict) -> bool:
    """Whether the phase measures `kl_from_start`, see `config.eval`."""
    setting = config.eval.kl_from_start
    if config.job == "train" and setting == "if_loaded":
        return holds_start(config)
    return setting == "always" and (config.job != "evaluate" or bool(config.init_from))


def all_sources(config) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """Dotted key -> every entry that `source` made, trained on or measured."""
    for section in ("sources", "eval.texts", "eval.pairs"):
        for name, entry in config[section].items():
            yield f"{section}.{name}", entry


def _fill(values, settings, what: str) -> ml_collections.ConfigDict:
    for key, value in settings.items():
        if key not in values:
            raise InputError(
                f"{what}({key}=...): unknown setting; known: {', '.join(values)}"
            )
        values[key] = value
    return values
