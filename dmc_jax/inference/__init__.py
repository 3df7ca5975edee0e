"""Decoding with a compressed cache."""
