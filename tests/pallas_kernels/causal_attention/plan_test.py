"""Where documents begin and end."""

import jax.numpy as jnp

from pallas_kernels.causal_attention.plan import document_bounds


def documents_begin_and_end_where_ids_change_test():
    ids = jnp.array([[7, 7, 7, 2, 9, 9], [0, 0, 0, 0, 0, 0]])
    starts, ends = document_bounds(ids, ids.shape)
    assert starts.tolist() == [[0, 0, 0, 3, 4, 4], [0] * 6]
    assert ends.tolist() == [[3, 3, 3, 4, 6, 6], [6] * 6]
    starts, ends = document_bounds(None, (1, 3))
    assert (starts.tolist(), ends.tolist()) == ([[0] * 3], [[3] * 3])
