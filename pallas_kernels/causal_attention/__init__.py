"""Causal attention with a per-key bias and an open diagonal, for training on a GPU."""
