"""The kernel against the reference, against numbers worked out by hand, and against XLA's form.

Without a GPU the kernel runs interpreted.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.inference import decoding, paged_cache
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Tokens
from pallas_kernels import target, tuning
from pallas_kernels.cache_update import api
from pallas_kernels.cache_update.api import IMPLEMENTATIONS, Segment, State, cache_update
from pallas_kernels.cache_update.settings import Settings
from pallas_kernels.cache_update.workloads import CORRECTNESS, make_inputs
from pallas_kernels.implementations import Implementations
from tests.pallas_kernels import interpreted

# Of averages of tokens of size 1. A bfloat16 key is rounded before the rotation and after it; where
# sums differ in their last bit, either may go the other way, though seldom.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-5}
EQUAL_BITS = 0.98  # of bfloat16 numbers

every_update = pytest.mark.parametrize("update", IMPLEMENTATIONS.names)


def bits(x):
    x = np.asarray(x)
    return x.view(f"uint{8 * x.itemsize}")


def assert_close(actual, expected, dtype):
    """NaN where NaN is, and nowhere else."""
    assert actual.dtype == expected.dtype
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def assert_close_in_int8(after, expected, dtype):
    """Where sums differ in their last bit, what is rounded may go the other way, though seldom."""
    for name in "kv":
        scales = [getattr(x, f"{name}_scale") for x in (after, expected)]
        assert_close(*scales, dtype)
        steps = [
            np.asarray(getattr(x, f"{name}_pages"), int)[np.isfinite(scales[1])]
            for x in (after, expected)
        ]
        off = np.abs(steps[0] - steps[1])
        assert off.max() <= 1 + 127 * TOLERANCE[dtype]
        if dtype == "float32":
            assert (off > 0).mean() < 0.01
        assert (np.abs(steps[0]).max(axis=-1) == 127).all()


# ---- the meaning, by hand -----------------------------------------------------------------------


@every_update
@pytest.mark.parametrize("window", [2, None])
def a_segment_of_three_tokens_is_their_weighted_mean_within_the_window_test(update, window):
    pages, ring = jnp.full((1, 8, 4), jnp.nan), (1, 1, window or 1)
    segment = Segment(
        *(jnp.zeros((*ring, 4)), jnp.zeros((*ring, 4)), jnp.zeros(ring)),
        jnp.zeros((1, 1), jnp.int32),
    )
    state = State(pages, pages, jnp.full((1, 1), 5, jnp.int32), segment)
    # Row's tokens 8, 16, 24 with weights 1, 1, 3 (of two queries that say less and more); the first
    # says "merge" and must not.
    for token, weight in ((8.0, 1.0), (16.0, 1.0), (24.0, 3.0)):
        logit = math.log(weight / 4) - math.log(1 - weight / 4)
        queries = jnp.zeros((1, 2, 4)).at[0, :, -1].set(jnp.array([logit + 3, logit - 1]))
        _, state = cache_update(
            state,
            queries,
            jnp.full((1, 1, 4), token),
            jnp.full((1, 1, 4), -token),
            page_table=jnp.zeros((1, 1, 1), jnp.int32),
            first=0,
            active=jnp.ones(1, bool),
            position=jnp.zeros(1, jnp.int32),
            frequencies=jnp.ones(2),
            channel=0.0,
            threshold=8.5,
            offset=-1.0,
            window=window,
            implementation=update,
        )
    mean = (16 + 3 * 24) / 4 if window else (8 + 16 + 3 * 24) / 5
    np.testing.assert_allclose(state.v_pages[0, 5], -mean, rtol=1e-6)
    assert state.lengths[0, 0] == 6
    # Position 0 does not rotate, and the last channel takes no part.
    np.testing.assert_allclose(state.k_pages[0, 5], [mean, mean, mean, 0], rtol=1e-6)
    assert np.isnan(np.delete(state.k_pages[0], 5, axis=0)).all()
    assert state.segment.count[0, 0] == 3
    # Token 2 took the place of token 0. Weights are a quarter of those above, which cancels.
    expected = [0.75, 0.25] if window else [1.25]
    np.testing.assert_allclose(state.segment.weights[0, 0], expected, rtol=1e-6)


@every_update
def every_sequence_decides_by_its_own_threshold_test(update):
    # No page is full, and every row has a segment; the last channel of a key says its threshold.
    workload = dataclasses.replace(CORRECTNESS[0], seats=3, rows=2)
    state, (q, k, v), others = make_inputs(workload)
    state = state._replace(
        lengths=jnp.full_like(state.lengths, 5),
        segment=state.segment._replace(count=jnp.full_like(state.segment.count, 2)),
    )
    others |= {"active": jnp.ones(3, bool), "threshold": jnp.array([2.0, -1.0, 0.5])}
    k = k.at[..., -1].set(jnp.array([[2.1, 1.9], [-0.9, -1.1], [0.6, 0.4]]) + others["offset"])
    table = jnp.arange(18, dtype=jnp.int32).reshape(3, 2, 3)
    others |= {"page_table": table, "first": 0}
    _, after = cache_update(state, q, k, v, **others, implementation=update)
    np.testing.assert_array_equal(after.lengths, [[5, 6]] * 3)
    np.testing.assert_array_equal(after.segment.count, [[3, 1]] * 3)


@every_update
@pytest.mark.parametrize("channel, last", [(0.0, 0), (0.5, 25), (1.0, 100)])
def keys_and_queries_are_rotated_at_the_position_and_their_last_channel_scaled_test(
    update, channel, last
):
    workload = dataclasses.replace(CORRECTNESS[1], seats=1, rows=1, heads=1, width=4, window=0)
    inputs = make_inputs(workload)
    head = jnp.array([3.0, 5.0, 4.0, 100.0])[None, None]
    others = inputs.others | {
        "page_table": jnp.array([[[7]]], jnp.int32),
        "position": jnp.array([2], jnp.int32),
        "frequencies": jnp.array([np.pi / 4, 0.0], jnp.float32),
        "channel": channel,
    }
    state = inputs.state._replace(
        lengths=jnp.array([[3]], jnp.int32),
        **dict.fromkeys(("k_pages", "v_pages"), jnp.full((8, 8, 4), jnp.nan)),
    )
    rotated, after = cache_update(state, head, head, head, **others, implementation=update)
    # A quarter turn takes (3, 4) to (-4, 3); (5, 100) stays, but for the factor, twice.
    for turned in (after.k_pages[7, 3], rotated[0, 0]):
        np.testing.assert_allclose(turned, [-4, 5, 3, last], atol=2e-6)
    np.testing.assert_array_equal(after.v_pages[7, 3], head[0, 0])


# ---- the kernel against the reference -----------------------------------------------------------


@functools.cache
def inputs_and_expected(workload):
    state, token, others = inputs = make_inputs(workload)
    return inputs, cache_update(state, *token, **others, implementation="reference")


@pytest.mark.parametrize("update", ["triton"])
@pytest.mark.parametrize("workload", CORRECTNESS, ids=str)
def the_kernel_gives_what_the_reference_gives_test(update, workload):
    (state, token, others), (expected_q, expected) = inputs_and_expected(workload)
    rotated, after = cache_update(state, *token, **others, implementation=update)
    active = np.asarray(others["active"])
    assert_close(rotated[active], expected_q[active], workload.tokens)
    np.testing.assert_array_equal(after.lengths, expected.lengths)
    assert (after.segment is None) == (workload.window == 0)
    if after.segment is not None:
        np.testing.assert_array_equal(after.segment.count, expected.segment.count)
        for name in ("keys", "values", "weights"):
            assert_close(*(getattr(x.segment, name) for x in (after, expected)), "float32")
    if workload.pages == "int8":
        assert_close_in_int8(after, expected, workload.tokens)
        return
    # The coarser of the two dtypes rounds last.
    coarse = "bfloat16" if "bfloat16" in (workload.pages, workload.tokens) else "float32"
    assert_close(after.k_pages, expected.k_pages, coarse)
    assert_close(after.v_pages, expected.v_pages, workload.pages)


@pytest.mark.parametrize("update", ["triton"])
@pytest.mark.parametrize("entries", [1, 4])
def results_do_not_depend_on_the_settings_test(update, entries):
    """A ring of 12 in tiles of 1 and of 4."""
    (state, token, others), (_, expected) = inputs_and_expected(CORRECTNESS[0])
    arrays = {"first": jnp.int32, "channel": jnp.float32, "threshold": jnp.float32}
    others = others | {name: jnp.asarray(others[name], dtype) for name, dtype in arrays.items()}
    unlimited = not others.pop("window")
    _, after = IMPLEMENTATIONS.load(update).cache_update(
        state, *token, **others, unlimited=unlimited, settings=Settings(entries, 256)
    )
    jax.tree.map(lambda x, y: assert_close(x, y, "float32"), after, expected)


@every_update
@pytest.mark.parametrize("workload", CORRECTNESS, ids=str)
def what_is_no_row_of_a_token_keeps_every_bit_test(update, workload):
    (state, token, others), (_, after) = inputs_and_expected(workload)
    first, active = others["first"], np.asarray(others["active"])
    if update != "reference":
        _, after = cache_update(state, *token, **others, implementation=update)
    kept = np.ones((workload.seats, workload.rows), bool)
    kept[active, first : first + workload.heads] = False
    assert kept.any() or workload.rows == workload.heads
    for before, now in zip(*(jax.tree.leaves(x[2:4]) for x in (state, after)), strict=True):
        np.testing.assert_array_equal(bits(now)[kept], bits(before)[kept])
    # The newest slot of every row that was not refused is written, and no other.
    lengths, page = np.asarray(after.lengths), workload.page
    assert (lengths[kept] > 0).all() and (lengths[~kept] > 0).any() and (lengths[~kept] < 0).any()
    np.testing.assert_array_equal(~lengths[lengths < 0], np.asarray(state.lengths)[lengths < 0])
    rows = np.nonzero(~kept & (lengths > 0))
    newest = lengths[rows] - 1
    untouched = np.ones(state.k_pages.shape[:2], bool)
    untouched[np.asarray(others["page_table"])[(*rows, newest // page)], newest % page] = False
    scales = () if state.k_scale is None else ("k_scale", "v_scale")
    for name in ("k_pages", "v_pages", *scales):
        before, now = getattr(state, name), getattr(after, name)
        np.testing.assert_array_equal(bits(now)[untouched], bits(before)[untouched])
        assert np.isfinite(np.asarray(now, np.float32)[~untouched]).all()


@every_update
def entries_that_no_token_of_the_segment_is_in_are_zero_test(update):
    workload = CORRECTNESS[0]
    (state, token, others), (_, after) = inputs_and_expected(workload)
    if update != "reference":
        _, after = cache_update(state, *token, **others, implementation=update)
    *rings, count = after.segment
    unused = np.arange(workload.window) >= np.asarray(count)[..., None]
    appended = (np.asarray(count) == 1) & (np.asarray(state.segment.count) > 1)
    assert appended.any()  # so there was something to clear
    for ring in rings:
        assert not np.asarray(ring)[unused].any()


# ---- in the cache, against XLA's form -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Many steps of a cache whose pool is too small for all."""

    seats: int
    kv_heads: tuple[int, ...]
    window: int | None
    width: int
    dtype: str
    steps: int
    pages: str | None = None  # dtype; None: as well

    @property
    def config(self):
        return ModelConfig(
            vocab_size=5,
            width=8,
            layers=len(self.kv_heads),
            heads=6,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            mlp_width=8,
            rope_theta=100.0,
            norm_eps=1e-5,
            max_length=64,
            tied_embeddings=True,
        )


DECODING = (
    Decoding(3, (2, 1), 2, 16, "float32", 14),
    Decoding(2, (1, 2), 12, 64, "bfloat16", 30),
    Decoding(2, (2,), None, 80, "bfloat16", 14),
    Decoding(2, (3,), 1, 16, "float32", 12),
    Decoding(1, (2,), 16, 16, "float32", 36),
    Decoding(2, (2, 1), 3, 16, "float32", 24, "int8"),
)


@functools.cache
def decoded_by_xla(case):
    return decoded(case, "xla")


def decoded(case, implementation):
    """The cache after all steps, and the sequences that failed in each of them."""
    config, settings = case.config, DMCSettings(window=case.window)
    policy = DMC(settings)
    rng = np.random.default_rng(0)
    cache = paged_cache.init(
        *(config, policy),
        seats=case.seats,
        pages=case.seats * config.kv_rows + 1,
        page_size=8,
        max_length=64,
        dtype=jnp.dtype(case.pages or case.dtype),
        tokens=jnp.dtype(case.dtype),
    )
    poison = jax.tree.map(
        lambda x: jnp.full_like(x, 99 if x.dtype == jnp.int8 else jnp.nan), cache.pages
    )
    cache = dataclasses.replace(cache, pages=poison)
    frequencies = rotary_frequencies(case.width, config.rope_theta)

    @jax.jit
    def step(cache, k, v, decision, omega, active):
        # The last channels say what the rows decide.
        k = k.at[..., -1].set(jnp.where(decision > 0, 100, -100).astype(k.dtype))
        weight = omega - settings.eps
        q = jnp.zeros(k.shape).at[..., -1].set(jnp.log(weight / (1 - weight)) - settings.offset)
        q = q.astype(k.dtype)
        cache, reads, granted = decoding.begin_step(cache, active)
        row = 0
        for heads in case.kv_heads:
            rows = slice(row, row + heads)
            token = Tokens(
                jnp.repeat(q[:, rows], config.heads // heads, axis=1),
                *(k[:, rows], v[:, rows], cache.position, frequencies),
            )
            rotated, cache = decoding.read_token(
                *(cache, policy, row, token), active=reads, implementation=implementation
            )
            row += heads
        return decoding.end_step(cache, active, granted)

    rows, failed = (case.seats, config.kv_rows), []
    # Heads differ in how much they merge: the last one soon needs more pages than there are.
    rate = np.linspace(0.9, 0.3, rows[1])
    for _ in range(case.steps):
        k, v = (jnp.asarray(x, case.dtype) for x in rng.normal(size=(2, *rows, case.width)))
        decision = (rng.random(rows) < rate).astype(np.float32)
        omega = rng.uniform(0.1, 1, rows).astype(np.float32)
        active = rng.random(case.seats) < 0.9
        cache = step(cache, k, v, decision, omega, active)
        failed.append(np.asarray(cache.failed))
    return jax.device_get(cache), np.array(failed)


@pytest.mark.parametrize(
    "update, case",
    [
        *(("triton", case) for case in (*DECODING[:2], DECODING[-1])),
        *(pytest.param("triton", x, marks=pytest.mark.slow) for x in DECODING[2:-1]),
        ("reference", DECODING[0]),
    ],
    ids=str,
)
def many_steps_give_the_cache_that_they_give_by_xla_test(update, case):
    expected, failed = decoded_by_xla(case)
    after, failed_too = decoded(case, update)
    np.testing.assert_array_equal(failed_too, failed)
    for name in ("page_table", "lengths", "position", "free_pages", "free_count"):
        np.testing.assert_array_equal(getattr(after, name), getattr(expected, name))
    np.testing.assert_array_equal(after.state.count, expected.state.count)
    for name in ("keys", "values", "weights"):
        assert_close(*(getattr(x.state, name) for x in (after, expected)), "float32")
    if case.pages == "int8":
        held = [
            State(x.pages.k, x.pages.v, None, None, x.pages.k_scale, x.pages.v_scale)
            for x in (after, expected)
        ]
        assert_close_in_int8(*held, case.dtype)
        return
    for name in ("k", "v"):
        pages, expected_pages = getattr(after.pages, name), getattr(expected.pages, name)
        assert_close(pages, expected_pages, case.dtype)
        if case.dtype == "bfloat16":  # rounded in the same places, then
            live = ~np.isnan(np.asarray(expected_pages, np.float32))
            assert (bits(pages) == bits(expected_pages))[live].mean() >= EQUAL_BITS


def those_steps_run_out_of_pages_and_wrap_their_rings_test():
    caches = [decoded_by_xla(case) for case in DECODING[:2]]
    assert any(failed[-1].any() and not failed[0].any() for _, failed in caches)
    assert any((cache.lengths < cache.position[:, None]).any() for cache, _ in caches)
    longest = DECODING[0]
    assert (caches[0][0].state.count > longest.window).any()


def tiny_model():
    config = dataclasses.replace(
        DECODING[0].config, vocab_size=20, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24
    )
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: unstack_layers(init_params(config, jax.random.key(0)), config, jnp.float32)
    )
    return config, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def logits_of_steps(update):
    config, params = tiny_model()
    policy = DMC(DMCSettings(window=3, offset=0.0), jnp.array([-0.1, 0.1, 9.0]))  # one a seat
    cache = paged_cache.init(
        *(config, policy), seats=3, pages=40, page_size=8, max_length=32, dtype=jnp.float32
    )
    step = jax.jit(
        functools.partial(
            decoding.decode_step,
            config=config,
            policy=policy,
            implementation="xla",
            update=update,
        )
    )
    active, logits = jnp.array([True, True, False]), []
    for tokens in np.random.default_rng(1).integers(0, 20, (8, 3)):
        cache, out = step(params, cache=cache, tokens=tokens, active=active)
        logits.append(out[:2])
    return np.stack(logits), np.asarray(cache.lengths)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("update", ["triton"])
def a_model_decodes_as_by_xla_test(update):
    expected, lengths = logits_of_steps("xla")
    assert 7 > lengths[:2].mean() > 2  # some merge, some do not
    logits, lengths_too = logits_of_steps(update)
    np.testing.assert_array_equal(lengths_too, lengths)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


# ---- who is chosen ------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A GPU on which every kernel can run."""
    module = types.ModuleType("any")
    module.unavailable = lambda: None
    monkeypatch.setattr(target, "current", lambda: interpreted.GPU)
    monkeypatch.setattr(Implementations, "_module", lambda self, name: module)
    return module


@pytest.mark.parametrize("form", ["xla", "triton"])
def the_form_that_is_kept_as_the_fastest_is_chosen_where_it_can_run_test(
    on_a_gpu, monkeypatch, form
):
    monkeypatch.setattr(tuning, "entry", lambda name, kind: form)
    assert api.choose(None) == form
    on_a_gpu.unavailable = lambda: "it is gone"
    assert api.choose(None) == "xla"


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def without_a_gpu_xla_is_chosen_whatever_was_measured_test(monkeypatch):
    monkeypatch.setattr(tuning, "entry", lambda name, kind: "triton")
    assert api.choose(None) == "xla"


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize(
    "field, change, complaint",
    [
        ("v_pages", lambda x: x.astype(jnp.bfloat16), "v_pages must be float32, got bfloat16"),
        ("lengths", lambda x: x[:, 1:], r"lengths must be of shape \(3, 5\), got \(3, 4\)"),
        ("keys", lambda x: x[:, :, :-1], r"keys must be of shape \(3, 5, 12, 64\), got .*11, 64"),
        ("weights", lambda x: x[:, 1:], r"weights must be of shape \(3, 5, 12\)"),
        ("count", lambda x: x.astype(jnp.float32), "count must be int32, got float32"),
        ("k_pages", lambda x: x[0], r"k_pages must be \[P page H\], got shape"),
    ],
)
def a_state_that_breaks_the_contract_is_refused_test(field, change, complaint):
    (state, token, others), _ = inputs_and_expected(CORRECTNESS[0])
    if field in State._fields:
        state = state._replace(**{field: change(getattr(state, field))})
    else:
        segment = state.segment
        segment = segment._replace(**{field: change(getattr(segment, field))})
        state = state._replace(segment=segment)
    with pytest.raises(ValueError, match=complaint):
        cache_update(state, *token, **others, implementation="reference")


@pytest.mark.usefixtures("annotations_aside")
@pytest.mark.parametrize(
    "index, change, complaint",
    [
        (0, lambda x: x[:, 1:], "7 query heads cannot share 2 KV heads"),
        (0, lambda x: x.astype(jnp.bfloat16), "q must be float32, got bfloat16"),
        (1, lambda x: x[0], r"k_t must be \[seats K H\], got shape \(2, 64\)"),
        (2, lambda x: x[:, :1], r"v_t must be of shape \(3, 2, 64\), got \(3, 1, 64\)"),
    ],
)
def a_token_that_breaks_the_contract_is_refused_test(index, change, complaint):
    (state, token, others), _ = inputs_and_expected(CORRECTNESS[0])
    token = [change(x) if i == index else x for i, x in enumerate(token)]
    with pytest.raises(ValueError, match=complaint):
        cache_update(state, *token, **others, implementation="reference")


@pytest.mark.usefixtures("annotations_aside")
def thresholds_for_other_sequences_are_refused_test():
    (state, token, others), _ = inputs_and_expected(CORRECTNESS[0])
    others = others | {"threshold": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"threshold must be a number or \(3,\), got \(2,\)"):
        cache_update(state, *token, **others, implementation="reference")
