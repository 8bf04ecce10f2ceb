"""LSSD's swap when the vocabulary is sharded over devices.

The teacher's top token and the gold token may lie on different devices, so no device can
exchange their logits. No device needs to: the swap adds

    (p_top - p_gold) (s_top - s_gold)

to the divergence, where `p` are the teacher's probabilities and `s` the student's logits.
Each device reduces its columns of the vocabulary to a `VocabSlice`, a few scalars per
token. `merge_shards` gathers and merges the slices; after that every device has the four
numbers.

Shape suffixes: C tokens of a chunk, K slices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Replaces -inf in masked entries: far below any logit but finite, so that
# 0 * (masked - masked) is 0.
MASKED = -1e30


class VocabSlice(NamedTuple):
    """Some columns of the vocabulary, reduced to scalars per token of a chunk, `[C]`.

    Sums of exponentials are relative to the largest logit of the same slice. Picked
    entries are 0 if another slice owns them. Without a teacher its fields are None.
    """

    student_top: jax.Array  # the largest logit
    student_sum: jax.Array  # of exp(s - top)
    student_gold: jax.Array  # the gold token's logit
    student_top_id: jax.Array  # the lowest id of the largest logits, as a float
    teacher_top: jax.Array | None
    teacher_sum: jax.Array | None
    teacher_gold: jax.Array | None
    teacher_top_id: jax.Array | None
    student_at_top: jax.Array | None  # the student's logit of the teacher's top token
    # Sum of exp(t - top) ((t - top) - (s - student_top)).
    cross: jax.Array | None
    # The student's part of the tokens that a compact teacher does not list, else None.
    tail: "VocabSlice | None"

    def with_tops(self, value: float) -> "VocabSlice":
        """A copy whose largest logits are all `value`."""
        tops = {"student_top": jnp.full_like(self.student_top, value)}
        if self.teacher_top is not None:
            tops["teacher_top"] = jnp.full_like(self.teacher_top, value)
        if self.tail is not None:
            tops["tail"] = self.tail.with_tops(value)
        return self._replace(**tops)

    def with_tail(self, logp_C: jax.Array) -> "VocabSlice":
        """Adds a compact teacher's tail, one outcome, to the whole vocabulary's slice."""
        tail = self.tail
        teacher_below = jnp.maximum(logp_C.astype(jnp.float32), MASKED)
        # The difference never exceeds log V except in padding, which the clip keeps finite.
        teacher_below = jnp.minimum(teacher_below - self.teacher_top, 60.0)
        student_below = tail.student_top - self.student_top + jnp.log(tail.student_sum)
        teacher_sum = jnp.exp(teacher_below)
        return self._replace(
            teacher_sum=self.teacher_sum + teacher_sum,
            cross=self.cross + teacher_sum * (teacher_below - student_below),
            tail=tail._replace(teacher_sum=teacher_sum),
        )

    def p_top_minus_p_gold(self, targets_C: jax.Array) -> jax.Array:
        """The probability that the swap exchanges; 0 where the teacher is right."""
        gold_C = jnp.exp(self.teacher_gold - self.teacher_top)
        return jnp.where(self.is_swapped(targets_C), 1.0 - gold_C, 0.0) / (
            self.teacher_sum
        )

    def is_swapped(self, targets_C: jax.Array) -> jax.Array:
        return self.teacher_top_id.astype(jnp.int32) != targets_C


def merge(slices: VocabSlice) -> VocabSlice:
    """Merges slices stacked in the vocabulary's order, `[K, C]`, into one, `[C]`."""

    def at_first_max(x_KxC, top_KxC):
        """Among equal maxima, takes the first: the one with the lowest ids."""
        first_1xC = jnp.argmax(top_KxC, axis=0)[None]
        return jnp.take_along_axis(x_KxC, first_1xC, axis=0)[0]

    student_top = slices.student_top.max(0)
    student_below = slices.student_top - student_top[None]
    merged = VocabSlice(
        student_top=student_top,
        student_sum=(slices.student_sum * jnp.exp(student_below)).sum(0),
        student_gold=slices.student_gold.sum(0),
        student_top_id=at_first_max(slices.student_top_id, slices.student_top),
        **dict.fromkeys(VocabSlice._fields[4:]),
    )
    if slices.teacher_top is None:
        return merged
    teacher_top = slices.teacher_top.max(0)
    teacher_below = slices.teacher_top - teacher_top[None]
    scale = jnp.exp(teacher_below)
    cross = slices.cross + slices.teacher_sum * (teacher_below - student_below)
    return merged._replace(
        teacher_top=teacher_top,
        teacher_sum=(slices.teacher_sum * scale).sum(0),
        teacher_gold=slices.teacher_gold.sum(0),
        teacher_top_id=at_first_max(slices.teacher_top_id, slices.teacher_top),
        student_at_top=at_first_max(slices.student_at_top, slices.teacher_top),
        cross=(cross * scale).sum(0),
        tail=None if slices.tail is None else merge(slices.tail),
    )


def merge_shards(part: VocabSlice, vocab_axes: tuple[str, ...]) -> VocabSlice:
    """The slice of the whole vocabulary, the same on every device of some mesh axes."""
    if not vocab_axes:
        return part
    return merge(jax.tree.map(lambda x: jax.lax.all_gather(x, vocab_axes), part))
