"""Attention of one new token a row over a paged cache whose rows differ in length."""
