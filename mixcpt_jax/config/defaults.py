"""Every key with its default, its meaning and its bounds.

A config file calls `default()`, adds its sources with `source(...)` and changes what it
needs.
"""

import functools
from collections.abc import Iterator
from typing import Any

import ml_collections

from mixcpt_jax.config.settings import defaults_of, number, one_of
from mixcpt_jax.core.errors import InputError

OBJECTIVES = ("ntp", "lssd", "kd", "selective")

REMAT = ("none", "dots", "full")


def default() -> ml_collections.ConfigDict:
    """Every key at its default."""
    return defaults_of(bounded_config())


def bounded_config() -> ml_collections.ConfigDict:
    """Every key there is, with its default, its bounds and its meaning."""
    config = ml_collections.ConfigDict()
    config.seed = number(0, least=0, most=2**31 - 1)
    # What the phase does: train; generate a source (see `generate`); merge the start and
    # the end of a trained phase (see `merge`); select samples (see `select`); evaluate;
    # export to a Hugging Face folder.
    config.job = one_of("train", "generate", "merge", "select", "evaluate", "export")
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
            "weights": one_of("pretrained", "random"),
            # config.json of the architecture, for `plan` where `path` is not at hand.
            "architecture": "",
            # Folder or file of the tokenizer; empty: where the model is.
            "tokenizer": "",
            # File of a Jinja chat template; empty: the tokenizer's own, or ChatML.
            "chat_template": "",
            # Of what is trained. To bfloat16 each update is rounded up or down by chance,
            # so that small ones are not lost. Norm scales and biases are always float32.
            "param_dtype": one_of("float32", "bfloat16"),
            "compute_dtype": one_of("bfloat16", "float32"),
            # Of the frozen model: teacher, reference, what adapters adapt. Empty: the
            # coarser of the two above, with which it computes at the start what the
            # trained model computes, so that margins and KL begin at 0.
            "teacher_dtype": one_of("", "float32", "bfloat16"),
            # What the backward pass recomputes: none, dots (all but matrix products)
            # or full (each layer from its input).
            "remat": one_of("full", "none", "dots"),
        }
    )

    # The device mesh; one size may be -1: all devices the others leave. `topology` is the
    # TPU slice it is meant for, such as v5e:4x4; only `plan` reads it.
    config.mesh = ml_collections.ConfigDict(
        {
            "data": number(1, least=1, most=2**20, also=-1),
            "fsdp": number(-1, least=1, most=2**20, also=-1),
            "tensor": number(1, least=1, most=2**20, also=-1),
            "topology": "",
        }
    )

    # The unembedding and the losses, as in `streamed.head_loss`. A size of 0 is chosen from
    # the device and the vocabulary.
    config.head = ml_collections.ConfigDict(
        {
            # Tokens whose logits exist at a time on a device.
            "chunk_size": number(0, least=8, most=2**20, also=0),
            # Tokens whose logits' gradient is kept for one pair of products; a
            # multiple of chunk_size.
            "block_size": number(0, least=8, most=2**22, also=0),
            # Columns of the vocabulary at a time; 0: all of the device's.
            "vocab_tile": number(0, least=8, most=2**24, also=0),
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
            "rank": number(0, least=0, most=8192),
            # The adapters' product is scaled by alpha / rank.
            "alpha": number(16.0, above=0, most=1e6),
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
            "kind": one_of("tokens", "preference"),
            "ntp_weight": number(0.8, least=0, most=1000),  # next-token prediction
            "lssd_weight": number(
                0.2, least=0, most=1000
            ),  # logit swap self-distillation
            "kd_weight": number(0.0, least=0, most=1000),  # plain distillation
            # Next-token prediction where the teacher's top token is not the gold one,
            # plain distillation where it is. With weights m here and 1 - m for LSSD the
            # gold token's target is m + (1 - m) p_a wherever the teacher is wrong.
            "selective_weight": number(0.0, least=0, most=1000),
            # "step" runs the teacher in every step; "prepared" reads what it said from
            # `data.prepared`, where `python -m mixcpt_jax prepare --teacher` puts it.
            "teacher": one_of("step", "prepared"),
            # What is prepared of it. 0: its last hidden states, in bfloat16. Above: so
            # many most likely tokens and the gold one, all others as one outcome.
            "teacher_top_k": number(0, least=0, most=2**16),
        }
    )

    # DPO and its relatives (`dense.preference_loss`), for objective.kind "preference".
    # The reference is the frozen model that the phase starts from.
    config.preference = ml_collections.ConfigDict(
        {
            "loss": one_of("sigmoid", "ipo"),  # sigmoid: DPO; ipo
            "beta": number(0.1, above=0, most=1000),
            # Share of pairs that are taken to be the wrong way round.
            "label_smoothing": number(0.0, least=0, below=0.5),
            "length_normalised": False,  # means over tokens for sums; ipo always does
            # Of the chosen answer's NLL per token (RPO).
            "sft_weight": number(0.0, least=0, most=1000),
            # Where the reference's log-probabilities come from: "step" runs it beside
            # the policy, "precomputed" once over all pairs before the first step.
            "reference": one_of("step", "precomputed"),
        }
    )

    # The knowledge mixture: name -> source(...).
    config.sources = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict(
        {
            # Tokens per row, and rows per step over all devices. With a batch_size of 0 it,
            # optimizer.accumulation_steps and eval.batch_size, and a row_length of 0, are
            # chosen from the corpus and the memory of a device, see `sizing`.
            "row_length": number(2048, least=0, most=2**20),
            "batch_size": number(8, least=0, most=2**20),
            # split: all of a source end to end, cut into full rows; best_fit and first_fit
            # keep whole what fits a row, and leave a little padding. by_format: split for
            # documents, best_fit for all others, whose answers mean little without their
            # questions.
            "packing": one_of("by_format", "split", "best_fit", "first_fit"),
            # 0: shares are the weights alone. From 1 on: weight x size^(1 / temperature),
            # size being the tokens to learn: at 1 in proportion to size, the higher the
            # more alike.
            "temperature": number(0.0, least=1, most=1000, also=0),
            # Examples longer than a row, or pairs that do not fit one together: split
            # (documents go on in the next row), truncate (cut at their end; of a pair
            # each side to half of a row), drop, or refuse. All but refuse are counted.
            "overlong": one_of("split", "truncate", "drop", "refuse"),
            # Epochs of one source above which a run warns, and above which it does not
            # start; 0: never. Up to four, repeated text is nearly as good as new, and
            # from about forty on worth nothing (Muennighoff et al. 2023).
            "warn_epochs": number(4.0, least=0, most=1e6),
            "max_epochs": number(40.0, least=0, most=1e6),
            # Processes that build batches; 0: threads.
            "num_workers": number(0, least=0, most=256),
            # Folder of tokens that `python -m mixcpt_jax prepare` made; a source
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
            "near_duplicates": number(0.0, least=0, most=1),
            # Documents by their length in characters; 0: no limit. This rule and the
            # next two are for format "document" only.
            "min_characters": number(0, least=0, most=10**9),
            "max_characters": number(0, least=0, most=10**9),
            # Least share of letters, of any script, in a document's characters that are
            # not blank.
            "min_letters": number(0.0, least=0, most=1),
            # Greatest share of a document that repeats what stands before it there.
            "max_repetition": number(1.0, least=0, most=1),
            # Texts with so many words in a row that are also in an exam of `eval.exams`;
            # 13 is usual, 0: off.
            "decontaminate": number(0, least=0, most=1000),
        }
    )

    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": number(1e-5, above=0, most=10),
            "schedule": one_of("cosine", "wsd", "constant"),
            # Steps in which the rate rises to its peak; 0: `warmup_share` of the phase's.
            "warmup_steps": number(0, least=0, most=10**8),
            "warmup_share": number(0.0, least=0, most=1),
            # Learning rate of the last step / peak (cosine, wsd).
            "final_ratio": number(0.1, least=0, most=1),
            # Share of the steps that decay (wsd).
            "decay_fraction": number(0.2, above=0, most=1),
            "weight_decay": number(0.1, least=0, most=100),
            "beta1": number(0.9, least=0, below=1),
            "beta2": number(0.95, least=0, below=1),
            "epsilon": number(1e-8, above=0, most=1),
            # What Adam's moments are kept in; to bfloat16 they are rounded by chance too.
            "moments_dtype": one_of("float32", "bfloat16"),
            "clip_norm": number(1.0, least=0, most=1e6),  # 0: no clipping
            # A step whose gradient norm is above so many times the running mean of the
            # last hundred or so is skipped, within train.max_skipped; 0: none is.
            "spike_factor": number(0.0, above=1, most=1e6, also=0),
            "accumulation_steps": number(
                1, least=1, most=2**20
            ),  # microbatches per step
        }
    )

    config.train = ml_collections.ConfigDict(
        {
            # 0: until every source that has `epochs` or `max_tokens` has given them; the
            # others are read for as long as that takes.
            "num_steps": number(1000, least=0, most=10**8),
            # Steps between lines of metrics.jsonl.
            "log_every": number(1, least=1, most=10**8),
            "save_every": number(200, least=0, most=10**8),  # 0: only at the end
            "eval_every": number(0, least=0, most=10**8),  # 0: only before and after
            "eval_before": True,
            # Checkpoints that stay: should the newest be damaged on the disk, the one
            # before is used.
            "keep_last": number(2, least=1, most=10**8),
            # How many steps in a row may be skipped, because their gradient is not
            # finite or a spike: parameters and moments stay as they are, and the run
            # goes on with the next batch. More of them end the run. 0: the first loss
            # that is not finite does.
            "max_skipped": number(0, least=0, most=10**8),
            # Seconds after which a run that shows no sign of life (a step, a batch
            # measured, a checkpoint saved) says where every thread is and ends; 0: never.
            # More than a compilation, `log_every` steps, a save or the answers to all
            # prompts take: 1800 on a slice.
            "timeout": number(0.0, least=0, most=7 * 86_400),
        }
    )

    config.eval = ml_collections.ConfigDict(
        {
            "batch_size": number(8, least=0, most=2**20),
            # Tokens per row of what is measured; 0: data.row_length. Phases whose numbers
            # are compared want the same: longer rows give more context.
            "row_length": number(0, least=0, most=2**20),
            # Tokens of each text, exam and pairs that are measured at most; 0: all. Long
            # texts are cut to one length, the rest is spread over the file: see
            # `mixture.within`.
            "max_tokens": number(65536, least=0, most=10**12),
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
            "max_new_tokens": number(128, least=1, most=2**20),
        }
    )

    # A source that a phase writes (job "generate"); later ones read it from
    # "phase:NAME/generated".
    config.generate = ml_collections.ConfigDict(
        {
            # replay: samples of the model that the phase starts from, as documents, or
            # answers to the prompts of `prompts` or of `source`. comprehension: each
            # document of `source` with questions and answers by rules behind it.
            # questions: with one that the model writes.
            "kind": one_of("replay", "comprehension", "questions"),
            # The source of documents or prompts; empty: none.
            "source": "",
            # JSONL of {"prompt"} or {"messages"}, for kind replay; empty: none.
            "prompts": "",
            "num_tokens": number(100_000, least=1, most=2**40),
            "max_new_tokens": number(256, least=1, most=2**20),
            # At 1 samples are distributed as the model's own.
            "temperature": number(1.0, least=0, most=100),
            "top_p": number(1.0, above=0, most=1),
        }
    )

    # Weights between the start and the end of the phase `init_from` (job "merge").
    config.merge = ml_collections.ConfigDict(
        {
            # Of `start + share (end - start)`: which are measured, besides the start.
            "shares": (0.25, 0.5, 0.75, 1.0),
            # Measure -> how much worse than at the start it may be: losses by how much
            # higher, all others by how much lower, such as {"general/loss": 0.02}. The
            # largest share within all budgets is saved; without one the largest is.
            "keep": ml_collections.ConfigDict(),
        }
    )

    # Which samples of the mixture go to format alignment (job "select").
    config.select = ml_collections.ConfigDict(
        {
            # random, which runs no model; perplexity, which scores every sample once; or
            # format_alignment, which scores it twice. In our study all three did alike.
            "method": one_of("random", "perplexity", "format_alignment"),
            # Samples of a source that are scored at most, picked by a hash of their text.
            "max_candidates": number(2000, least=1, most=10**8),
            # Source -> how many of its samples are wanted.
            "keep": ml_collections.ConfigDict(),
            # Length of a sample in its chat format, in tokens; others are left out.
            "min_tokens": number(1, least=0, most=2**20),
            "max_tokens": number(1024, least=1, most=2**20),
            # Length of its response alone; the scores of shorter ones are mostly noise.
            "min_response_tokens": number(8, least=0, most=2**20),
            # Samples at least so similar (Jaccard, of word 5-grams) to an earlier one
            # are left out; 0: only exact copies are.
            "near_duplicates": number(0.8, least=0, most=1),
            # Field that says where a sample comes from, and the largest share of the
            # kept samples that may come from one place; 1: no limit.
            "origin_field": "origin",
            "origin_share": number(1.0, above=0, most=1),
        }
    )

    config.export = ml_collections.ConfigDict(
        {"dtype": one_of("bfloat16", "float32", "float16")}
    )
    config.metrics = ml_collections.ConfigDict(
        {
            "tensorboard": True,
            "wandb_project": "",  # empty: none
            "progress": True,
            # What the terminal shows: "text", or "json", one object a line with time,
            # severity, message and a step's scalars, as GKE and Cloud Logging read it.
            "log": one_of("text", "json"),
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
    return _fill(defaults_of(bounded_source()), settings, "source")


def bounded_source() -> ml_collections.ConfigDict:
    """Every key of a source, with its default and its bounds."""
    return ml_collections.ConfigDict(
        {
            "path": "",
            "reader": "",
            "split": "",
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
            "on_bad_record": one_of("refuse", "skip"),
            "holdout": number(0, least=0, most=10**9),
            "ntp_weight": number(None, least=0, most=1000),
            "lssd_weight": number(None, least=0, most=1000),
            "kd_weight": number(None, least=0, most=1000),
            "selective_weight": number(None, least=0, most=1000),
        }
    )


def exam(**settings: Any) -> ml_collections.ConfigDict:
    """One multiple-choice exam.

    path: JSONL of {question, choices, answer}; empty when built from a source.
    source: the source with reader "docstrings" whose held-in documents are asked about.
    num_questions: how many questions; 0: all of the file.
    """
    return _fill(defaults_of(bounded_exam()), settings, "exam")


def bounded_exam() -> ml_collections.ConfigDict:
    """Every key of an exam, with its default and its bounds."""
    return ml_collections.ConfigDict(
        {"path": "", "source": "", "num_questions": number(0, least=0, most=10**9)}
    )


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


def all_sources(config) -> Iterator[tuple[str, ml_collections.ConfigDict]]:
    """Place in the config -> all that `source` made: what is learnt, and measured."""
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
