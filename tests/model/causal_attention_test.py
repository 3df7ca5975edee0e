"""Who attends: what is chosen, what is refused, and that devices may share the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dmc_jax.core.attention import causal_attention, join
from dmc_jax.errors import UserError
from dmc_jax.model.causal_attention import choose_attention, evaluation_attention
from pallas_kernels import target
from pallas_kernels.causal_attention import api

# As the kernels are: XLA's own splitting would not show what shard_map does wrong.
STAND_IN = causal_attention


@pytest.fixture
def kernels_run(monkeypatch):
    """On a GPU, the kernels' place is taken by the chunked form."""
    triton = pytest.importorskip("pallas_kernels.causal_attention.triton")
    monkeypatch.setattr(target, "current", lambda: target.Target("gpu", "any", 1, 90))
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "causal_attention", STAND_IN)


def is_kernels(chosen):
    return (chosen.func, chosen.keywords) == (api.causal_attention, {"implementation": "triton"})


def make_inputs(B, T, N, K, H):
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (B, T, N, H))
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[1:3])
    bias = -jax.random.exponential(keys[3], (B, T, K))
    segment_ids = jnp.cumsum(jax.random.bernoulli(keys[4], 0.2, (B, T)), axis=1)
    return (q, k, v, bias), segment_ids, jax.random.normal(keys[5], q.shape)


def without_a_gpu_the_chunked_form_attends_test():
    chosen = choose_attention("auto", block=32)
    assert (chosen.func, chosen.keywords) == (causal_attention, {"block": 32})
    assert choose_attention("auto", block=32) is chosen  # or jit would compile anew


def evaluation_takes_the_kernels_unless_training_was_told_not_to_test(kernels_run, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert evaluation_attention("triton", 32) is evaluation_attention("auto", 32)
    assert is_kernels(evaluation_attention("auto", 32))
    assert evaluation_attention("xla", 32) is choose_attention("xla", block=32)
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # which would all get everything
    assert evaluation_attention("triton", 32) is choose_attention("xla", block=32)


def a_kernel_that_cannot_run_is_refused_with_the_reason_test(monkeypatch):
    triton = pytest.importorskip("pallas_kernels.causal_attention.triton")
    monkeypatch.setattr(triton, "unavailable", lambda: "it needs an NVIDIA GPU")
    with pytest.raises(UserError, match="'triton', which cannot run here: it needs an NVIDIA GPU"):
        choose_attention("triton")
    assert choose_attention("auto").func is causal_attention


def kernels_attend_where_they_can_run_test(kernels_run):
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    assert is_kernels(choose_attention("auto", mesh=one))
    assert choose_attention("xla", mesh=one).func is causal_attention
    # Arrays may be anywhere on several devices, and XLA would bring all of them to each.
    without_mesh = choose_attention("auto")
    alone = jax.device_count() == 1
    assert is_kernels(without_mesh) if alone else without_mesh is choose_attention("xla")


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("sizes, K", [((2, 2, 2), 2), ((1, 2, 4), 2), ((8, 1, 1), 1)])
@pytest.mark.parametrize("with_bias", [True, False, "two"])
def devices_that_share_the_work_give_outputs_and_gradients_of_one_test(
    kernels_run, sizes, K, with_bias
):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(sizes), ("data", "fsdp", "tensor"))
    inputs, segment_ids, d_out = make_inputs(8, 12, 4, K, 8)
    inputs = inputs if with_bias else inputs[:3]
    more = {"scale": 0.3, "segment_ids": segment_ids if with_bias else None}

    def in_two_sets(attend):
        """Raw keys and states, as after a delay."""

        def run(q, k, v, bias):
            raw = attend(q, k, v, until=3, with_lse=True, **more)
            of_states = {"spared_bias": bias / 2, "spared": 4, "first": 3, "with_lse": True}
            return join(raw, attend(q, 2 * k, v, bias, **of_states, **more))

        return run

    def with_gradients(attend):
        if with_bias == "two":
            attend, how = in_two_sets(attend), {}
        else:
            how = more

        def run(inputs, d_out):
            out, pullback = jax.vjp(lambda *x: attend(*x, **how), *inputs)
            return out, *pullback(d_out)

        return jax.jit(run)(inputs, d_out)

    split = choose_attention("triton", mesh=mesh)
    assert split is choose_attention("triton", mesh=mesh)
    got, expected = with_gradients(split), with_gradients(causal_attention)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    data, fsdp, tensor = sizes
    share = got[0].sharding.shard_shape(got[0].shape)
    assert share[0] == 8 // (data * fsdp)
    assert share[2] == (4 // tensor if K % tensor == 0 else 4)
