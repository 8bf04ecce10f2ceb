"""Forms of the head: the LSSD of a batch and its two gradients from hidden states.

Each form is a function of `(hidden_TxD, unembedding_DxV, teacher_hidden_TxE,
teacher_unembedding_ExV, targets_T, weights_T)` that returns the weighted sum and its
gradients for `hidden_TxD` and `unembedding_DxV`. All but `bare_products` compute the
same three arrays.
"""

import functools

import jax
import jax.numpy as jnp

from mixcpt_jax.objectives import dense
from mixcpt_jax.objectives import streamed as fused

_CHUNK_SIZE = 1024


def bare_products(hidden, kernel, teacher_hidden, teacher_kernel, targets, weights):
    """The four matrix products that every form needs, and nothing else.

    Their results are in the dtype of their operands, so that memory traffic is the
    least possible; the gradient products read the logits as they are.
    """
    del targets, weights
    logits_TxV = hidden @ kernel
    teacher_logits_TxV = teacher_hidden @ teacher_kernel
    return logits_TxV @ kernel.T, hidden.T @ logits_TxV, teacher_logits_TxV


def _with_gradients(loss):
    return jax.value_and_grad(loss, (0, 1))


def _logits(hidden, kernel):
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)


@_with_gradients
def dense_swap(hidden, kernel, teacher_hidden, teacher_kernel, targets, weights):
    """All logits of both models at once, and a swapped copy of the teacher's."""
    student, teacher = _logits(hidden, kernel), _logits(teacher_hidden, teacher_kernel)
    return jnp.sum(weights * dense.lssd(student, teacher, targets))


@_with_gradients
def dense_identity(hidden, kernel, teacher_hidden, teacher_kernel, targets, weights):
    """All logits of both models at once, without the copy."""
    student, teacher = _logits(hidden, kernel), _logits(teacher_hidden, teacher_kernel)
    return jnp.sum(weights * dense.lssd_by_identity(student, teacher, targets))


@_with_gradients
def chunks_with_remat(hidden, kernel, teacher_hidden, teacher_kernel, targets, weights):
    """Logits chunk by chunk; the backward pass computes them a second time."""
    chunk_size = min(_CHUNK_SIZE, targets.shape[0])

    @jax.checkpoint
    def chunk_loss(hidden, teacher_hidden, targets, weights):
        student = _logits(hidden, kernel)
        teacher = _logits(teacher_hidden, teacher_kernel)
        return jnp.sum(weights * dense.lssd_by_identity(student, teacher, targets))

    def step(total, chunk):
        return total + chunk_loss(*chunk), None

    chunks = jax.tree.map(
        lambda x: x.reshape(-1, chunk_size, *x.shape[1:]),
        (hidden, teacher_hidden, targets, weights),
    )
    return jax.lax.scan(step, jnp.zeros(()), chunks)[0]


def streamed(*operands, **options):
    """`streamed.lssd`, the form that training runs."""
    return _with_gradients(functools.partial(fused.lssd, **options))(*operands)
