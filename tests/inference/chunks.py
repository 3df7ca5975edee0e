"""A chunk of some sequences, read in one program: what prefill does layer by layer."""

import dataclasses

from dmc_jax.inference.prefill import attend_chunk
from dmc_jax.model.llama import forward


def read_chunk(params, config, cache, tokens, counts, seats, *, policy):
    """The cache with the tokens [B, T], of which `counts` are real, and logits after each."""
    attend = attend_chunk(config, policy, counts=counts, seats=seats)
    output = forward(params, config, tokens, dtype="float32", attend=attend, state=cache)
    position = output.state.position.at[seats].add(counts, mode="drop")
    return dataclasses.replace(output.state, position=position), output.logits
