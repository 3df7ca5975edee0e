"""Attention kernels over paged caches; usable without the rest of this repository."""
