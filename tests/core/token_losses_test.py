"""Losses of predictions that are read a block of the vocabulary at a time, against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core import losses
from dmc_jax.core.losses import Prediction, token_losses

B, T, D = 2, 3, 5


def prediction(seed, ids, tied, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = rng.normal(size=(ids, D) if tied else (D, ids)).astype(np.float32)
    return Prediction(hidden, jnp.asarray(head), tied)


def formulas(student, targets, teacher):
    """Negative log-likelihood and KL divergence of whole logits, in NumPy and float64."""

    def log_softmax(model):
        head = np.asarray(model.head.T if model.tied else model.head, np.float64)
        logits = np.asarray(model.hidden, np.float64) @ head
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    s, t = log_softmax(student), log_softmax(teacher)
    nats = -np.take_along_axis(s, np.asarray(targets)[..., None], axis=-1)[..., 0]
    return nats, (np.exp(t) * (t - s)).sum(axis=-1)


@pytest.fixture
def four_at_a_time(monkeypatch):
    monkeypatch.setattr(losses, "_IDS_AT_A_TIME", 4)


# One block, two, some that divide the vocabulary, and some that do not.
@pytest.mark.parametrize("ids", [4, 8, 16, 13, 17])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("four_at_a_time")
def losses_are_those_of_whole_logits_test(ids, tied):
    student, teacher = prediction(0, ids, tied), prediction(1, ids, not tied)
    targets = jax.random.randint(jax.random.key(0), (B, T), 0, ids)
    expected = formulas(student, targets, teacher)
    actual = jax.jit(token_losses)(student, targets, teacher)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    alone, nothing = jax.jit(token_losses)(student, targets)
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5)
    assert not nothing.any()


@pytest.mark.parametrize("ids", [4, 16, 13])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.usefixtures("four_at_a_time")
def gradients_are_softmax_less_what_was_wanted_test(ids, tied):
    """dL/dlogits = a (p - onehot) + b (p - teacher's p), with weights a and b of a token."""
    student, teacher = prediction(0, ids, tied), prediction(1, ids, tied)
    targets = jax.random.randint(jax.random.key(0), (B, T), 0, ids)
    a, b = np.random.default_rng(2).normal(size=(2, B, T)).astype(np.float32)

    def loss(student, teacher):
        nats, divergence = token_losses(student, targets, teacher)
        return jnp.sum(a * nats + b * divergence)

    gradient, none = jax.jit(jax.grad(loss, argnums=(0, 1)))(student, teacher)
    assert not any(leaf.any() for leaf in jax.tree.leaves(none))
    p, q = (np.asarray(jax.nn.softmax(model.logits), np.float64) for model in (student, teacher))
    d = a[..., None] * (p - np.eye(ids)[np.asarray(targets)]) + b[..., None] * (p - q)
    head = student.head.T if tied else student.head
    d_head = np.einsum("btd,btv->dv", student.hidden, d)
    np.testing.assert_allclose(gradient.hidden, d @ head.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient.head, d_head.T if tied else d_head, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("four_at_a_time")
def blocks_add_up_narrow_gradients_in_float32_test(monkeypatch):
    student = prediction(0, 256, True, jnp.bfloat16)
    targets = jax.random.randint(jax.random.key(0), (B, T), 0, 256)

    def gradient():
        return jax.grad(lambda s: token_losses(s, targets)[0].sum())(student)

    in_blocks = gradient()
    monkeypatch.setattr(losses, "_IDS_AT_A_TIME", 256)
    whole = gradient()
    assert in_blocks.hidden.dtype == jnp.bfloat16 and in_blocks.head.dtype == jnp.float32
    # 64 sums of ever larger numbers in bfloat16 would be off by several of its steps.
    np.testing.assert_allclose(
        *(np.asarray(x.hidden, np.float32) for x in (in_blocks, whole)), rtol=0.02, atol=0.02
    )
    np.testing.assert_allclose(in_blocks.head, whole.head, rtol=0.02, atol=0.01)


@pytest.mark.usefixtures("four_at_a_time")
def likely_ids_and_bad_numbers_are_told_as_they_are_test():
    """Uniform, certain and wrong without a limit; what is not a number stays that."""
    logits = np.zeros((1, 4, 10), np.float32)
    logits[0, 1, 7], logits[0, 2, 3], logits[0, 3, 9] = 1000, 1000, np.nan
    targets = jnp.array([[0, 7, 7, 7]])
    nats, _ = token_losses(Prediction(jnp.asarray(logits), jnp.eye(10), False), targets)
    np.testing.assert_allclose(nats, [[np.log(10), 0, 1000, np.nan]], rtol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def logits_of_a_large_vocabulary_are_never_held_test(tied):
    """Neither in float32 nor in any other form that is as large, forward and backward."""
    tokens, width, ids = 1024, 16, 2**17
    hidden = jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((ids, width) if tied else (width, ids), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(student, teacher, targets):
        return sum(x.sum() for x in token_losses(student, targets, teacher))

    model = Prediction(hidden, head, tied)
    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(model, model, targets).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 2 * tokens * ids
