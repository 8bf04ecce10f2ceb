"""What the reference of a preference phase says about answers, once, ahead of training.

The reference does not change, so the log-probability of an answer under it is a number:
of held-out pairs always, for rewards, and of training pairs where the config asks for
it, which then need no second model in the step. They are kept in the phase's folder.
"""

import io
import json
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from mixcpt_jax.core import paths
from mixcpt_jax.data import pipeline
from mixcpt_jax.evaluation import evaluator

FILE = "reference.npz"
_KEY = "__key__"

# "sources/NAME" or "pairs/NAME" -> summed log-probability of each example's learnt
# tokens, nats, float32 [examples].
References = dict[str, np.ndarray]


def compute(
    score: Callable[..., Any],
    params: Any,
    config: ml_collections.ConfigDict,
    data: pipeline.Data,
) -> References:
    """Runs the reference over all pairs that are asked for.

    Args:
      score: `Phase.eval_step()`.
      params: the reference's.
      config: the phase's.
      data: what the phase reads.
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
    """Writes them whole or not at all; the first host does.

    Args:
      folder: the phase's.
      key: what they belong to: hashes of the pairs, and the start of the phase.
      references: from `compute`.
    """
    if jax.process_index() != 0:
        return
    buffer = io.BytesIO()
    np.savez(buffer, **references, **{_KEY: json.dumps(key, sort_keys=True)})
    paths.replace(folder / FILE, buffer.getvalue())


def load(folder: epath.Path, key: dict[str, Any]) -> References | None:
    """What `save` wrote, or None if there is nothing of this key."""
    path = folder / FILE
    if not path.exists():
        return None
    stored = dict(np.load(io.BytesIO(path.read_bytes())))
    if str(stored.pop(_KEY)) != json.dumps(key, sort_keys=True):
        return None
    return stored
