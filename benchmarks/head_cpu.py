"""Compares forms of the head on a CPU: loss and both gradients, in one run.

    python -m benchmarks.head_cpu [--tokens 2048 --hidden 576 --vocabulary 49152]

All forms get the same random float32 operands, by default in SmolLM2-135M's shapes, and
return the mean over tokens and its gradients for hidden states and unembedding. The results
are compared before anything is printed. There are three objectives: LSSD, plain
distillation (only if Tunix is installed, which has no swap) and cross-entropy.

Time: all forms are compiled in one process and alternate, so that changes in the machine's
speed affect all of them. Ratios are taken within a round, to the bare products and to the
streamed form of the same objective; the result is the median over rounds.

Memory: each form runs once in its own process, after a run on a few tokens that loads its
libraries. "Resident" is the growth of the process's resident set during that run, after
operands are built and the form is compiled. It includes the results (gradients; for the
bare products also the teacher's logits). The kernel's high-water mark is reset before; if
that is not allowed, the growth is a lower bound. "Temporary" is the memory that XLA plans
to allocate in addition to operands and results.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import importlib.metadata
import logging
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import head_forms
from mixcpt_jax.objectives import dense, streamed
from mixcpt_jax.training import steps

_LOGIT_DEVIATION = 3.0
_TEACHER_NOISE = 0.1  # relative to the student's hidden states and unembedding
# Relative to the largest entry: float32 sums over a vocabulary in different orders.
_TOLERANCE = 1e-4

Operands = tuple[jax.Array, ...]


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int


class Form(NamedTuple):
    """One way to compute an objective."""

    objective: str
    name: str
    # Operands -> a function that runs the form, and the bytes that XLA plans to allocate.
    build: Callable[[Operands], tuple[Callable[[], Any], float]]
    package: str = "jax"  # the package that it needs


class Row(NamedTuple):
    form: Form
    seconds: list[float]
    over_products: list[float]  # per round, as is the next
    over_streamed: list[float]
    temporary_bytes: float
    resident_bytes: int
    value: float


def make_operands(shape: Shape) -> Operands:
    """Student, slightly perturbed teacher, targets, and weights that make a mean."""
    rng = np.random.default_rng(0)

    def normal(shape, deviation):
        return rng.standard_normal(shape, np.float32) * np.float32(deviation)

    tokens, hidden_size, vocabulary = shape
    hidden_TxD = normal((tokens, hidden_size), _LOGIT_DEVIATION)
    kernel_DxV = normal((hidden_size, vocabulary), hidden_size**-0.5)
    student = hidden_TxD, kernel_DxV
    teacher = (x + normal(x.shape, _TEACHER_NOISE * x.std()) for x in student)
    targets_T = rng.integers(0, vocabulary, tokens, np.int32)
    weights_T = np.full(tokens, 1 / tokens, np.float32)
    operands = jax.device_put((*student, *teacher, targets_T, weights_T))
    return jax.block_until_ready(_transpose_kernels(operands))


def _transpose_kernels(operands: Operands) -> Operands:
    """Transposes unembeddings: SmolLM2's are `[V, D]`, most forms take `[D, V]`."""
    hidden, kernel, teacher_hidden, teacher_kernel, *rest = operands
    return hidden, kernel.T, teacher_hidden, teacher_kernel.T, *rest


def _dense_form(function):
    """A JAX form for unembeddings `[D, V]`, which XLA does not copy."""

    def transposed(*operands):
        value, gradients = function(*_transpose_kernels(operands))
        return value, (gradients[0], gradients[1].T)

    return _jax_form(transposed)


def _jax_form(function):
    def build(operands):
        jitted = jax.jit(function, compiler_options=steps.COMPILER_OPTIONS["cpu"])
        compiled = jitted.lower(*operands).compile()
        temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
        return lambda: jax.block_until_ready(compiled(*operands)), temporary_bytes

    return build


_with_gradients = functools.partial(jax.value_and_grad, argnums=(0, 1))


def _four_products(*operands):
    return head_forms.bare_products(*_transpose_kernels(operands))


def _three_products(*operands):
    """The products without a teacher; the compiler drops the teacher's."""
    return _four_products(*operands)[:2]


@_with_gradients
def _streamed_distillation(hidden, kernel, *rest_and_weights):
    *rest, weights = rest_and_weights
    token_weights = streamed.TokenWeights.of(len(weights), kd=weights)
    return streamed.head_loss(hidden, kernel, *rest, token_weights, vocab_first=True)[0]


@_with_gradients
def _streamed_cross_entropy(hidden, kernel, _, __, targets, weights):
    token_weights = streamed.TokenWeights.of(len(weights), ntp=weights)
    return streamed.head_loss(
        hidden, kernel, None, None, targets, token_weights, vocab_first=True
    )[0]


@_with_gradients
def _dense_cross_entropy(hidden, kernel, _, __, targets, weights):
    return jnp.sum(weights * dense.cross_entropy(hidden @ kernel, targets))


@_with_gradients
def _tunix(hidden, kernel, teacher_hidden, teacher_kernel, targets, _):
    """Tunix's loss, a mean, with weight 0 for its cross-entropy."""
    from tunix.distillation.strategies import logit

    strategy = logit.LogitStrategy(*[lambda: None] * 3, temperature=1.0, alpha=1.0)
    teacher_logits = jax.lax.stop_gradient(teacher_hidden @ teacher_kernel)
    labels = jax.nn.one_hot(targets, kernel.shape[1])
    return strategy.compute_loss(hidden @ kernel, teacher_logits, labels)[0]


@_with_gradients
def _tokamax(hidden, kernel, _, __, targets, ___):
    import tokamax

    # tokamax warns that it uses its default configuration on a CPU.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, targets, kernel, reduction="mean", implementation="chunked_xla"
    )


def _torch_lssd(hidden, weight, teacher_hidden, teacher_weight, targets):
    """The literal swap, in place."""
    import torch

    with torch.no_grad():
        logits = teacher_hidden @ teacher_weight.T
        top_logit, top = logits.max(-1, keepdim=True)
        gold = targets[:, None]
        gold_logit = logits.gather(-1, gold)
        logits.scatter_(-1, top, gold_logit).scatter_(-1, gold, top_logit)
        log_p = torch.log_softmax(logits, -1)
        del logits
    log_q = torch.log_softmax(hidden @ weight.T, -1)
    kl_div = torch.nn.functional.kl_div
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _torch_cross_entropy(hidden, weight, _, __, targets):
    import torch

    return torch.nn.functional.cross_entropy(hidden @ weight.T, targets)


def _torch_form(loss):
    """Dense logits and autograd, with unembeddings `[V, D]` as torch keeps them."""

    def build(operands):
        import torch

        student, teacher = operands[:2], operands[2:4]
        hidden, weight, *rest = (
            torch.from_numpy(np.array(x, order="C"))
            for pair in (student, teacher)
            for x in pair
        )
        targets = torch.from_numpy(np.array(operands[4])).long()
        for x in (hidden, weight):
            x.requires_grad_()

        def run():
            hidden.grad = weight.grad = None
            value = loss(hidden, weight, *rest, targets)
            value.backward()
            return value.item(), (hidden.grad.numpy(), weight.grad.numpy())

        return run, math.nan

    return build


_LSSD, _KD, _NTP = "LSSD", "distillation", "cross-entropy"
_PRODUCTS, _STREAMED = "bare products", "streamed (ours)"
_TUNIX = "google-tunix"
FORMS = (
    Form(_LSSD, _PRODUCTS, _jax_form(_four_products)),
    Form(_LSSD, "dense, swapped copy", _dense_form(head_forms.dense_swap)),
    Form(_LSSD, "dense, identity", _dense_form(head_forms.dense_identity)),
    Form(_LSSD, "chunks, remat", _dense_form(head_forms.chunks_with_remat)),
    Form(
        _LSSD,
        _STREAMED,
        _jax_form(functools.partial(head_forms.streamed, vocab_first=True)),
    ),
    Form(_LSSD, "PyTorch, dense, swapped copy", _torch_form(_torch_lssd), "torch"),
    Form(_KD, _STREAMED, _jax_form(_streamed_distillation), _TUNIX),
    Form(_KD, "Tunix, dense, no swap", _dense_form(_tunix), _TUNIX),
    Form(_NTP, _PRODUCTS, _jax_form(_three_products)),
    Form(_NTP, "dense", _dense_form(_dense_cross_entropy)),
    Form(_NTP, _STREAMED, _jax_form(_streamed_cross_entropy)),
    Form(_NTP, "PyTorch, dense", _torch_form(_torch_cross_entropy), "torch"),
    Form(_NTP, "tokamax, chunked_xla", _dense_form(_tokamax), "tokamax"),
)
_PACKAGES = tuple(dict.fromkeys(form.package for form in FORMS))


@functools.cache
def _version(package: str) -> str | None:
    try:
        importlib.import_module(package.removeprefix("google-"))
    except ImportError:
        return None
    return importlib.metadata.version(package)


def measure(shape: Shape, rounds: int) -> list[Row]:
    """Runs every form whose package is installed; rows in the order of `FORMS`."""
    chosen = [i for i, form in enumerate(FORMS) if _version(form.package)]
    # Before the timing, while this process is small.
    memory = [_in_own_process(_measure_memory, i, shape) for i in chosen]

    operands = make_operands(shape)
    runs = {FORMS[i]: FORMS[i].build(operands)[0] for i in chosen}
    values = _check(runs)
    seconds = {form[:2]: [] for form in runs}
    for _ in range(rounds):
        for form, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[form[:2]].append(time.perf_counter() - start)

    rows = []
    for form, sizes, value in zip(runs, memory, values, strict=True):
        own = seconds[form[:2]]
        # Distillation needs the same products as LSSD.
        products = seconds[_NTP if form.objective == _NTP else _LSSD, _PRODUCTS]
        streamed = seconds[form.objective, _STREAMED]
        over_products, over_streamed = (
            [a / b for a, b in zip(own, base, strict=True)]
            for base in (products, streamed)
        )
        rows.append(Row(form, own, over_products, over_streamed, *sizes, value))
    return rows


def _check(runs) -> list[float]:
    """The values; checks that all forms of an objective agree on values and gradients."""
    values, first = [], {}
    for form, run in runs.items():
        results = run()
        if form.name == _PRODUCTS:
            values.append(math.nan)
            continue
        value, (d_hidden, d_kernel) = results
        values.append(float(value))
        arrays = {"value": value, "d_hidden": d_hidden, "d_kernel": d_kernel}
        name, expected = first.setdefault(form.objective, (form.name, arrays))
        for part in arrays:
            a, b = np.asarray(arrays[part]), np.asarray(expected[part])
            difference = np.max(np.abs(a - b)) / np.max(np.abs(b))
            assert difference < _TOLERANCE, (
                f"{form.objective}: {part} of {form.name!r} differs from that of "
                f"{name!r} by {difference:.1e} of the largest entry"
            )
    return values


def _in_own_process(function, *args):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def _measure_memory(index: int, shape: Shape) -> tuple[float, int]:
    """XLA's temporary bytes of one form, and the growth of the peak in one run."""
    build = FORMS[index].build
    small = Shape(min(128, shape.tokens), shape.hidden, min(2048, shape.vocabulary))
    build(make_operands(small))[0]()
    run, temporary_bytes = build(make_operands(shape))
    # Memory that compiling freed would be reused and hide the growth.
    ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    before = _peak_bytes()
    run()
    return temporary_bytes, _peak_bytes() - before


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


SMOLLM2 = Shape(tokens=2048, hidden=576, vocabulary=49152)


def print_table(shape: Shape = SMOLLM2, rounds: int = 5) -> None:
    """Measures and prints every form that is installed."""
    if jax.default_backend() != "cpu":
        raise SystemExit("this compares forms on a CPU: set JAX_PLATFORMS=cpu")
    rows = measure(shape, rounds)
    versions = [f"{p} {v}" for p in _PACKAGES if (v := _version(p))]
    print(
        f"\n{shape.tokens} tokens, {shape.hidden} hidden, {shape.vocabulary} "
        f"vocabulary; {rounds} rounds; {', '.join(versions)}\n\n"
        "| objective | form | seconds | times the bare products | times streamed "
        "| temporary MB | resident MB | loss |\n|---|---|--:|--:|--:|--:|--:|--:|"
    )
    for row in rows:
        line = (
            f"| {row.form.objective} | {row.form.name} "
            f"| {statistics.median(row.seconds):.3f} "
            f"| {statistics.median(row.over_products):.2f} "
            f"| {statistics.median(row.over_streamed):.2f} "
            f"({min(row.over_streamed):.2f}–{max(row.over_streamed):.2f}) "
            f"| {row.temporary_bytes / 1e6:.0f} | {row.resident_bytes / 1e6:.0f} "
            f"| {row.value:.6f} |"
        )
        print(line.replace("nan", "–"))
    for package in _PACKAGES:
        if not _version(package):
            print(f"\nnot measured: {package} is not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in SMOLLM2._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print_table(Shape(args.tokens, args.hidden, args.vocabulary), args.rounds)


if __name__ == "__main__":
    main()
