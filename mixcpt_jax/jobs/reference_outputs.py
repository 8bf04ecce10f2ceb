"""The reference's log-probabilities of answers, computed once before preference training.

They do not change while the policy trains. Rewards of holdout pairs always need them. For
training pairs `preference.reference="precomputed"` computes them too, and then the step
needs no second model. They are stored in the phase's folder.
"""

import io
import json
from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax.core import paths, small_files
from mixcpt_jax.data import pipeline
from mixcpt_jax.evaluation import evaluator
from mixcpt_jax.runtime import hosts

FILE = "reference.npz"
_KEY = "__key__"

# "sources/NAME" or "pairs/NAME" -> summed log-probability of each example's loss tokens,
# nats, float32 [examples].
References = dict[str, np.ndarray]


def compute(
    score: Callable[..., Any],
    params: Any,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
) -> References:
    """Runs the reference over the pairs that need it.

    Args:
      score: `Phase.eval_step()`.
      params: the reference's.
      config: the phase's.
      data: of the phase.
    """
    rows = {f"pairs/{name}": rows for name, rows in data.pairs.items()}
    if config.preference.reference == "precomputed":
        rows |= {
            f"sources/{packed.source.name}": packed
            for packed in data.packed
            if packed.source.share
        }
    return {
        name: -evaluator.sums_per_example(
            lambda batch: score(params, batch), packed, config.eval.batch_size
        )[0].astype(np.float32)
        for name, packed in rows.items()
    }


def save(folder: epath.Path, key: dict[str, Any], references: References) -> None:
    """Writes the file, on the first host, whole or not at all.

    Args:
      folder: the phase's.
      key: of the file: hashes of the pairs, and the start of the phase.
      references: from `compute`.
    """
    if not hosts.is_first():
        return
    buffer = io.BytesIO()
    np.savez(buffer, **references, **{_KEY: json.dumps(key, sort_keys=True)})
    paths.replace(folder / FILE, buffer.getvalue())


def load(folder: epath.Path, key: dict[str, Any]) -> References | None:
    """The content of the file, or None if there is none with this key."""
    path = folder / FILE
    if not path.exists():
        return None
    remedy = "delete it, and it is computed again"
    stored = small_files.read_npz(path, {_KEY: ("U", 0), str: ("f", 1)}, remedy)
    if str(stored.pop(_KEY)) != json.dumps(key, sort_keys=True):
        return None
    return stored
