"""Masked image modeling in JAX: SimMIM pretraining and what follows it."""
