"""Masked image modelling in JAX: SimMIM pretraining and what follows it."""
