"""Products of a step, counted in what is traced, are those that a hand counts."""

import dataclasses

import jax
import pytest

from dmc_jax.model.llama import abstract_params
from dmc_jax.training.flops import model_flops, step_flops


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
def products_of_a_dense_step_are_those_of_its_matrices_and_pairs_test(tiny_run, remat, passes):
    block = 8
    run = dataclasses.replace(tiny_run, remat=remat, attention="xla", attention_block=block)
    c, T = run.model, run.data.length
    params = abstract_params(c)
    head = params["head"].size
    in_layers = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 2)
    down = params["run_0"]["down"]["kernel"].size
    # What comes after `down` is not needed again. Of a small vocabulary logits are kept.
    matrices = passes * in_layers + 3 * head - (down if remat == "full" else 0)
    # Blocks up to the diagonal; two products forward, once or twice, and five backward.
    pairs = T * (T + block) // 2
    products = 2 * (passes - 2) + 5
    attention = products * c.layers * c.heads * c.head_dim * pairs
    counted = step_flops(run, "pretrain")
    assert counted == 2 * run.data.batch * (T * matrices + attention)
    if remat == "none":
        assert 1 < counted / (run.data.batch * T * model_flops(c, T)) < 1.3


def merging_adds_products_and_parts_of_a_batch_add_none_test(tiny_run):
    run = dataclasses.replace(tiny_run, attention="xla")
    dense, merging = (step_flops(run, stage) for stage in ("pretrain", "retrofit"))
    assert dense < merging < 1.2 * dense
    assert step_flops(dataclasses.replace(run, accumulation=2), "pretrain") == dense
