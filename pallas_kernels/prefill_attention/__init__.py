"""Attention of many new tokens a sequence over the paged cache that they were written to."""
