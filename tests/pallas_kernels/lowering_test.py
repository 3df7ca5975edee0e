"""Whole programs, lowered for a GPU on a machine that need not have one."""

import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import decoding
from dmc_jax.model.causal_attention import choose_attention
from dmc_jax.model.llama import Llama, init_params
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole
from pallas_kernels import target
from pallas_kernels.decode_attention import api
from pallas_kernels.triton_call import unavailable
from tests.inference.chunks import read_chunk
from tests.pallas_kernels.lowered import (
    CONFIG,
    PAGE,
    PAGES,
    SEATS,
    empty_cache,
    mesh_of,
    on,
    shapes_of_a_step,
)

CALL = r"custom_call @triton_kernel_call_ffi\("


def step_by(implementation, dtype):
    def step(params, cache, tokens, active):
        return decoding.decode_step(
            *(params, CONFIG, cache, tokens, active),
            policy=DMC(DMCSettings()),
            dtype=dtype,
            implementation=implementation,
            update="xla",
        )

    return step


def lowered_step(kind):
    shapes = shapes_of_a_step()
    with on(kind):
        reason = unavailable()
        if reason is not None:
            pytest.skip(reason)
        step = jax.jit(step_by("triton", "bfloat16"))
        return step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def every_layer_of_a_decoding_step_calls_two_kernels_after_one_plan_test(kind, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or Triton 3.9 warns that 3.10 changes it
    text = lowered_step(kind)
    assert len(re.findall(CALL, text)) == 2 + 1
    assert len(re.findall(r"call @_attend\(", text)) == CONFIG.layers
    assert f"tensor<{PAGES}x{PAGE}x{CONFIG.head_dim}xbf16>" in text
    assert f"tensor<{PAGES}x{PAGE}x{CONFIG.head_dim}xf32>" not in text, "the pool is widened"


def every_layer_that_reads_prompts_calls_a_kernel_and_has_no_loop_test(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    params, cache, *_ = shapes_of_a_step()

    def read(params, cache, tokens, counts):
        policy = DMC(DMCSettings())
        return read_chunk(params, CONFIG, cache, tokens, counts, jnp.arange(2), policy=policy)

    tokens, counts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 128), (2,)))
    with on("NVIDIA H200"):
        reason = unavailable()
        if reason is not None:
            pytest.skip(reason)
        traced = jax.jit(read).trace(params, cache, tokens, counts)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @triton_kernel_call_ffi(") == 1
    assert len(re.findall(r"call @_attend\(", text)) == CONFIG.layers
    assert "stablehlo.while" not in text and "stablehlo.case" not in text


def the_gradient_of_a_model_calls_the_attention_kernels_test(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    T = 200
    where = jnp.broadcast_to(jnp.arange(T), (SEATS, T)), jnp.zeros((SEATS, T), jnp.int32)
    key = jax.random.key(0)

    def loss(params, tokens):
        attend = attend_whole(
            *(DMC(DMCSettings()), CONFIG, *where),
            noise_key=key,
            attention=choose_attention("triton"),
        )
        model = Llama(CONFIG, dtype=jnp.bfloat16, remat="full")
        return model.apply({"params": params}, tokens, attend=attend).logits.sum()

    params = jax.eval_shape(lambda: init_params(CONFIG, key))
    tokens = jax.ShapeDtypeStruct((SEATS, T), jnp.int32)
    with on("NVIDIA H200"):
        reason = unavailable()
        if reason is not None:
            pytest.skip(reason)
        lowered = jax.jit(jax.grad(loss)).trace(params, tokens).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    # A body of the scan over layers forward, one backward, which attends once more.
    assert len(re.findall(r"call @_forward\w*\(", text)) == 2
    assert len(re.findall(r"call @_backward\w*\(", text)) == 1
    assert len(re.findall(CALL, text)) in (3, 4)  # functions may be shared
    assert f"{T}x{T}x" not in text, "some array has all scores"


def every_gpu_of_a_mesh_attends_for_its_own_sequences_and_heads_test(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    mesh = mesh_of("NVIDIA H200", data=2, fsdp=2, tensor=2)

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    with use_abstract_mesh(mesh):
        reason = unavailable()
        if reason is not None:
            pytest.skip(reason)
        attend = choose_attention("triton", mesh=mesh)
        lowered = (
            jax.jit(
                jax.grad(lambda *x: attend(*x, scale=0.1).sum(dtype=jnp.float32), argnums=(0, 1))
            )
            .trace(shape(8, 96, 8, 64), *[shape(8, 96, 2, 64)] * 2, shape(8, 96, 2))
            .lower(lowering_platforms=("cuda",))
        )
    calls = [line for line in lowered.as_text().splitlines() if re.search(CALL, line)]
    assert len(calls) == 3
    assert all("tensor<2x96x4x64xbf16>" in call for call in calls)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("implementation", ["triton"])
def a_decoding_step_gives_what_it_gives_by_xla_test(implementation):
    rng = np.random.default_rng(0)
    shapes, *_ = shapes_of_a_step()
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
    cache = jax.jit(empty_cache)()
    active = jnp.arange(SEATS) != 3
    by = {name: jax.jit(step_by(name, "float32")) for name in ("xla", implementation)}
    cache, _ = by["xla"](params, cache, jnp.arange(SEATS), active)
    arguments = (params, cache, jnp.arange(SEATS) + 9, active)
    (after, logits), (expected_after, expected) = (
        by[implementation](*arguments),
        by["xla"](*arguments),
    )
    np.testing.assert_allclose(logits[active], expected[active], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(after.lengths, expected_after.lengths)


def an_abstract_device_is_the_target_test():
    with on("NVIDIA H200"):
        assert target.current() == target.Target("gpu", "NVIDIA H200", 132, 90)
    with on("NVIDIA A100-SXM4-80GB"):
        assert target.current().capability == 80
    assert target.current().platform == jax.default_backend()


def an_abstract_gpu_of_unknown_capability_is_refused_test():
    with (
        on("NVIDIA X1"),
        pytest.raises(ValueError, match="'NVIDIA X1' is not known; expected .*A100"),
    ):
        target.current()


def what_the_gpu_lacks_is_said_test(monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with on("NVIDIA H200"):
        assert "jax_triton cannot be imported" in api.unavailable("triton")
        assert api.choose(None) == "xla"
