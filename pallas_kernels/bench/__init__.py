"""Decode attention against the speed of memory: `python -m pallas_kernels.bench`."""
