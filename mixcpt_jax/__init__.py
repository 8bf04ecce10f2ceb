"""Mix-CPT in JAX: learn a domain by continual pre-training without forgetting the rest.

The library, each name imported when it is first used:

- `lssd`, `swap_logits`: the loss on logits, as in the formulas; see `objectives.dense`.
- `head_loss`, `TokenWeights`: all losses on hidden states, in chunks; see
  `objectives.streamed`.
- `Mixture`: batches of several sources, packed and interleaved.
- `load_model`, `evaluate`, `generate`: for the model of a run, a folder or a file.
- `InputError`: what a wrong setting, file or record raises, in one line.
"""

import importlib

from mixcpt_jax.core import machine as _machine

# Before jax is imported, by a command or by code of the user.
_machine.choose_platform()

__version__ = "0.1.0"

_HOMES = {
    "lssd": "objectives.dense",
    "swap_logits": "objectives.dense",
    "head_loss": "objectives.streamed",
    "TokenWeights": "objectives.streamed",
    "Mixture": "library",
    "load_model": "library",
    "evaluate": "library",
    "generate": "library",
    "InputError": "core.errors",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mixcpt_jax.{_HOMES[name]}"), name)


def __dir__():
    return sorted({*globals(), *__all__})
