"""Dynamic Memory Compression for Llama in JAX."""
