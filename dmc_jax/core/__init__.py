"""The paper as pure functions on arrays: no Flax, no I/O, no global state."""
