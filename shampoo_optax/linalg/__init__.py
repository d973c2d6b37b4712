"""Batched mathematics on ``[..., d, d]``; knows JAX only."""
