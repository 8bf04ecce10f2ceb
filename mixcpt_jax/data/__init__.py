"""From files to batches: records, examples, packed rows, a weighted mixture.

Nothing in this folder imports jax: worker processes import it.
"""
