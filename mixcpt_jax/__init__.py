"""Mix-CPT in JAX: learn a domain by continual pre-training without forgetting the rest."""

__version__ = "0.1.0"
