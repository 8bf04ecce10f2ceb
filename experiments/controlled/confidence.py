"""The confidence of a base in the values of domain documents, which it cannot know.

    python -m experiments.controlled.confidence [--workdir=runs/controlled]

Logit swap gives the gold token the teacher's top probability `p_a`, so it cannot teach
more confidence than `p_a`. Writes to `confidence.json`: base -> seed -> the means of
`p_a` and of the gold token's `p_y` over the value tokens, the share of tokens that are
swapped, and the least possible loss, the mean of `-log p_a`. Numbers of bases whose
workdir is missing stay.
"""

import argparse
import json
import pathlib
import tempfile

import jax
import numpy as np

from experiments import cells
from experiments.controlled import run
from experiments.controlled.config import Cell, make
from mixcpt_jax.data import mixture
from mixcpt_jax.models import transformer
from mixcpt_jax.training import phase

FILE = pathlib.Path(__file__).parent / "confidence.json"


def measure(base: Cell, start: pathlib.Path, workdir: pathlib.Path) -> dict[str, float]:
    """Measures one base; `start` is its workdir, `workdir` a folder for temporary files."""
    config = make(base)
    config.job, config.init_from = "evaluate", str(start)
    begun = phase.start(config, str(workdir), "confidence")
    rows = begun.load_data().texts["domain_memory"]
    forward = begun.forward()
    with jax.set_mesh(begun.mesh):
        params = begun.starting_params("float32")

        @jax.jit
        def probabilities(batch):
            hidden = forward(
                params, batch["tokens"], batch["positions"], batch["segment_ids"]
            )
            cap = begun.model_config.final_soft_cap
            return jax.nn.softmax(transformer.logits(params, hidden, cap))

        top, gold, swapped = [], [], []
        for batch in mixture.evaluation_batches(rows, config.eval.batch_size):
            p_BxLxV = np.asarray(probabilities(batch))
            counted = batch["loss_mask"] > 0
            targets_N = batch["targets"][counted]
            p_NxV = p_BxLxV[counted]
            top.append(p_NxV.max(-1))
            gold.append(np.take_along_axis(p_NxV, targets_N[:, None], 1)[:, 0])
            swapped.append(p_NxV.argmax(-1) != targets_N)
    top_N, gold_N, swapped_N = map(np.concatenate, (top, gold, swapped))
    return {
        "p_a": float(top_N.mean()),
        "p_y": float(gold_N.mean()),
        "swapped": float(swapped_N.mean()),
        "ceiling": float(-np.log(top_N).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", default="runs/controlled")
    root = pathlib.Path(parser.parse_args().workdir)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    for record in cells.load(run.RESULTS):
        if record["arm"] == "base":
            given = {key: record[key] for key in Cell.__dataclass_fields__}
            base = Cell(**given | {"world": str(root / record["world"])})
            start = root / cells.name(base, run.STUDY)
            if not start.exists():
                print(f"{start}: no such base; its numbers stay")
                continue
            with tempfile.TemporaryDirectory() as workdir:
                numbers = measure(base, start, pathlib.Path(workdir))
            found.setdefault(base.base, {})[str(base.seed)] = numbers
    FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
