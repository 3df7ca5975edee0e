"""The Llama: thin Flax modules that hold parameters and call `core`."""
