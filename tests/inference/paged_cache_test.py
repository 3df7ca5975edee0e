"""Pages are neither shared nor lost, and decoding over them is the parallel form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.gates import Gates
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.errors import UserError
from dmc_jax.inference import decoding, paged_cache
from dmc_jax.model.llama import Llama
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Tokens, attend_whole

TOLERANCE = 1e-5  # float32 logits and states of size 1
# Above every merge logit; at the middle of them; below most; below all.
NEVER, HALF, MOSTLY, ALWAYS = 1e3, 0.0, -1.5, -1e3


# ---- the allocator against a model in plain Python --------------------------------------------

SEATS, PAGES, PAGE, MAX_LENGTH = 3, 12, 8, 32
LAYERS = ((0, 2), (2, 1))  # first row and KV heads of each
ROWS, WINDOW = 3, 2
SMALL = ModelConfig(
    vocab_size=5,
    width=4,
    layers=2,
    heads=2,
    kv_heads=(2, 1),
    head_dim=4,
    mlp_width=4,
    rope_theta=100.0,
    norm_eps=1e-5,
    max_length=MAX_LENGTH,
    tied_embeddings=True,
)
FREQUENCIES = rotary_frequencies(SMALL.head_dim, SMALL.rope_theta)
POLICIES = {"dmc": DMCSettings(window=WINDOW), "dense": None}


def policy_of(settings, threshold=0.0):
    return Dense() if settings is None else DMC(settings, threshold)


@functools.partial(jax.jit, static_argnames="settings")
def read_token(cache, k, v, decision, omega, active, settings):
    """Keys and queries whose last channels say what the rows decide."""
    policy = policy_of(settings)
    k = k.at[..., -1].set(jnp.where(decision > 0, 100.0, -100.0)) if settings else k
    weight = omega - DMCSettings().eps
    q = jnp.zeros_like(k).at[..., -1].set(jnp.log(weight / (1 - weight)) - DMCSettings().offset)
    cache, reads, granted = decoding.begin_step(cache, active)
    for first, heads in LAYERS:
        of_layer = slice(first, first + heads)
        token = Tokens(
            jnp.repeat(q[:, of_layer], SMALL.heads // heads, axis=1),
            *(k[:, of_layer], v[:, of_layer], cache.position, FREQUENCIES),
        )
        _, cache = decoding.read_token(cache, policy, first, token, active=reads)
    return decoding.end_step(cache, active, granted)


free = jax.jit(paged_cache.free)
reserve = jax.jit(functools.partial(paged_cache.reserve, first=0, most=3))
pages_for_one_token = jax.jit(paged_cache.pages_for_one_token)


def small_cache(settings, pages=PAGES):
    return paged_cache.init(
        SMALL,
        policy_of(settings),
        seats=SEATS,
        pages=pages,
        page_size=PAGE,
        max_length=MAX_LENGTH,
        dtype=jnp.float32,
    )


class Allocator(RuleBasedStateMachine):
    """Sequences read tokens, take pages and leave; every row is a list of slots in Python."""

    policy = "dmc"
    masks = st.lists(st.booleans(), min_size=SEATS, max_size=SEATS)
    merges = st.integers(0, 2 ** (SEATS * ROWS) - 1)

    def __init__(self):
        super().__init__()
        self.settings = POLICIES[self.policy]
        self.cache = small_cache(self.settings)
        self.random = np.random.default_rng(0)
        self.slots = {(s, r): [] for s in range(SEATS) for r in range(ROWS)}  # mean values
        self.open = {row: [] for row in self.slots}  # (weight, value) of the open segment
        self.failed = [False] * SEATS
        self.position = [0] * SEATS

    def pages_held(self):
        return sum(-(-len(held) // PAGE) for held in self.slots.values())

    def grow(self, wanted):
        """Rows that get their slots, of a dictionary row -> new slots, in row order."""
        available, asked, granted = PAGES - self.pages_held(), 0, set()
        for row, new in wanted.items():
            length = len(self.slots[row])
            need = -(-(length + new) // PAGE) - -(-length // PAGE)
            possible = length + new <= MAX_LENGTH
            asked += need if possible else 0
            if possible and (need == 0 or asked <= available):
                granted.add(row)
        for row in wanted:
            if row in granted:
                self.slots[row] += [None] * wanted[row]
            else:
                self.failed[row[0]] = True
        return granted

    @rule(active=masks, merges=merges, tokens=st.integers(1, 7))
    def read(self, active, merges, tokens):
        decision = np.array([merges >> i & 1 for i in range(SEATS * ROWS)], np.float32)
        decision = decision.reshape(SEATS, ROWS)
        for _ in range(tokens):
            k, v = self.random.normal(size=(2, SEATS, ROWS, SMALL.head_dim)).astype(np.float32)
            omega = self.random.uniform(0.1, 1, (SEATS, ROWS)).astype(np.float32)
            wanted = np.asarray(pages_for_one_token(self.cache))[np.array(active)].sum()
            enough = PAGES - self.pages_held() >= wanted
            tall = max(len(held) for held in self.slots.values()) == MAX_LENGTH
            before = list(self.failed)
            self.cache = read_token(
                self.cache, jnp.asarray(k), v, decision, omega, np.array(active), self.settings
            )
            self.expect_token(active, decision, v, omega)
            assert tall or not enough or self.failed == before
            self.position = [p + a for p, a in zip(self.position, active, strict=True)]

    def expect_token(self, active, decision, v, omega):
        rows = [row for row in self.slots if active[row[0]] and not self.failed[row[0]]]
        # Rows whose pages are full are in line for the free ones, whatever they decide.
        lengths = {row: len(self.slots[row]) for row in rows}
        full = [row for row in rows if lengths[row] % PAGE == 0]
        lucky = [row for row in full if lengths[row] < MAX_LENGTH][: PAGES - self.pages_held()]
        for row in rows:
            appends = self.settings is None or not self.open[row] or not decision[row]
            if appends and row in full and row not in lucky:
                self.failed[row[0]] = True
                continue
            if appends:
                self.slots[row].append(None)
                self.open[row] = []
            self.open[row].append((omega[row], v[row]))
            window = self.open[row][-WINDOW:]
            total = sum(weight for weight, _ in window)
            self.slots[row][-1] = sum(weight * value for weight, value in window) / total

    @rule(extra=st.lists(st.integers(0, 2 * PAGE), min_size=2 * SEATS, max_size=2 * SEATS))
    def take_many(self, extra):
        """As prefill does, in the first layer; what the slots hold stays open."""
        rows = [(s, r) for s in range(SEATS) for r in range(2)]
        wanted = {
            row: 0 if self.failed[row[0]] else new for row, new in zip(rows, extra, strict=True)
        }
        lengths = np.array([[len(self.slots[s, r]) for r in range(2)] for s in range(SEATS)])
        lengths += np.array(list(wanted.values())).reshape(SEATS, 2)
        self.cache, granted = reserve(self.cache, lengths.astype(np.int32))
        expected = self.grow(wanted)
        assert {row for row in rows if granted[row]} == expected

    @rule(leaving=masks)
    def leave(self, leaving):
        self.cache = free(self.cache, np.array(leaving))
        for seat in np.flatnonzero(leaving):
            self.failed[seat], self.position[seat] = False, 0
            for row in range(ROWS):
                self.slots[seat, row], self.open[seat, row] = [], []

    @invariant()
    def rows_have_their_lengths(self):
        lengths = np.asarray(self.cache.lengths)
        assert {row: lengths[row] for row in self.slots} == {
            row: len(held) for row, held in self.slots.items()
        }
        assert list(self.cache.failed) == self.failed
        assert list(self.cache.position) == self.position

    @invariant()
    def every_page_is_owned_once_or_free_once(self):
        table, free_count = np.asarray(self.cache.page_table), int(self.cache.free_count)
        owned = [
            page for row, held in self.slots.items() for page in table[row][: -(-len(held) // PAGE)]
        ]
        free_pages = np.asarray(self.cache.free_pages)[:free_count]
        assert sorted([*owned, *free_pages]) == list(range(PAGES))
        page_bytes = 2 * PAGE * SMALL.head_dim * 4
        assert paged_cache.bytes_live(self.cache) == self.pages_held() * page_bytes

    @invariant()
    def slots_hold_the_average_of_their_segment(self):
        table, v_pages = np.asarray(self.cache.page_table), np.asarray(self.cache.pages.v)
        for row, held in self.slots.items():
            if not self.failed[row[0]]:
                for index, value in enumerate(held):
                    if value is not None:
                        stored = v_pages[table[row][index // PAGE], index % PAGE]
                        np.testing.assert_allclose(stored, value, atol=TOLERANCE, rtol=0)


class DenseAllocator(Allocator):
    policy = "dense"


for machine, examples in ((Allocator, 25), (DenseAllocator, 8)):
    machine.TestCase.settings = hypothesis_settings(
        max_examples=examples, stateful_step_count=16, deadline=None
    )
AllocatorTest = Allocator.TestCase
DenseAllocatorTest = DenseAllocator.TestCase


# ---- what pages mean --------------------------------------------------------------------------


def a_write_without_a_page_goes_nowhere_and_is_reported_test():
    cache = small_cache(POLICIES["dense"], pages=2 * ROWS)
    k = v = jnp.ones((SEATS, ROWS, SMALL.head_dim))
    nothing = np.zeros((SEATS, ROWS), np.float32)
    for seat in (0, 1):
        cache = read_token(cache, k, v, nothing, nothing, np.arange(SEATS) == seat, None)
    assert cache.free_count == 0 and not cache.failed.any()
    full = read_token(cache, 2 * k, v, nothing, nothing, np.arange(SEATS) == 2, None)
    np.testing.assert_array_equal(full.failed, [False, False, True])
    for name in ("lengths", "free_count"):
        np.testing.assert_array_equal(getattr(full, name), getattr(cache, name), err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, full.pages, cache.pages)
    # The others go on in the pages that they have, and the third where one of them leaves.
    full = read_token(full, k, v, nothing, nothing, np.array([True, True, True]), None)
    np.testing.assert_array_equal(full.lengths, [[2] * ROWS, [2] * ROWS, [0] * ROWS])
    full = free(full, np.array([True, False, True]))
    full = read_token(full, k, v, nothing, nothing, np.arange(SEATS) == 2, None)
    np.testing.assert_array_equal(full.lengths, [[0] * ROWS, [2] * ROWS, [1] * ROWS])
    assert not full.failed.any()


def a_row_longer_than_its_page_table_is_reported_test():
    cache = small_cache(None, pages=100)
    wanted = np.full((SEATS, 2), 3 * PAGE, np.int32)
    cache, granted = reserve(cache, wanted)
    assert granted.all() and not cache.failed.any()
    wanted[1, 1] = MAX_LENGTH + 1
    cache, granted = reserve(cache, wanted)
    np.testing.assert_array_equal(granted, [[True, True], [True, False], [True, True]])
    np.testing.assert_array_equal(cache.failed, [False, True, False])


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"page_size": 12}, "page_size must be a power of two, 8 or more, got 12"),
        ({"page_size": 4}, "page_size must be a power of two, 8 or more, got 4"),
        ({"pages": 0}, "pages must be 1 or more, got 0"),
        ({"seats": 0}, "seats must be 1 or more, got 0"),
        ({"max_length": 0}, "max_length must be 1 or more, got 0"),
        ({"dtype": jnp.float16}, "float32 or bfloat16 or int8, got float16"),
    ],
)
def a_cache_that_cannot_be_is_refused_test(changes, complaint):
    sizes = {"seats": 1, "pages": 1, "page_size": 8, "max_length": 8, "dtype": jnp.float32}
    with pytest.raises(UserError, match=complaint):
        paged_cache.init(SMALL, policy_of(None), **sizes | changes)


def reserved_bytes_are_those_of_the_arrays_test():
    cache = small_cache(POLICIES["dmc"])
    pool = 2 * PAGES * PAGE * SMALL.head_dim * 4
    rings = SEATS * ROWS * (2 * WINDOW * SMALL.head_dim + WINDOW + 1) * 4
    table = SEATS * ROWS * (MAX_LENGTH // PAGE + 1) * 4  # and the lengths
    assert paged_cache.bytes_reserved(cache) == pool + rings + table + PAGES * 4 + 4 + SEATS * 9


# ---- decoding over pages ----------------------------------------------------------------------

T = 40  # tokens of every sequence
# (seat, first step, tokens) of sequences that come and go: 2 takes the pages of 0, 3 those of 1.
STAYS = ((0, 0, 25), (1, 4, 40), (0, 27, 40), (1, 45, 18))
STEPS = 67


def random_tokens():
    return np.random.default_rng(1).integers(0, 50, (len(STAYS), T)).astype(np.int32)


def schedule(tokens):
    """Token, whether it is read, and whether the seat is emptied before, each [STEPS, 2]."""
    column, active, leaving = (np.zeros((STEPS, 2), np.int32) for _ in range(3))
    for sequence, (seat, start, count) in zip(tokens, STAYS, strict=True):
        column[start : start + count, seat] = sequence[:count]
        active[start : start + count, seat] = 1
        leaving[start, seat] = 1
    return column, active.astype(bool), leaving.astype(bool)


@functools.partial(jax.jit, static_argnums=(1, 2))
def decode_paged(params, config, settings, tokens_active_leaving, threshold, cache):
    def step(cache, now):
        tokens, active, leaving = now
        cache = paged_cache.free(cache, leaving)
        return decoding.decode_step(
            params, config, cache, tokens, active, policy=policy_of(settings, threshold)
        )

    return jax.lax.scan(step, cache, tokens_active_leaving)


@functools.partial(jax.jit, static_argnums=(1, 2))
def evaluate_all(params, config, settings, tokens, threshold):
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    attend = attend_whole(policy_of(settings, threshold), config, positions)
    return Llama(config).apply({"params": params}, tokens, attend=attend)


def opened_by_row(output):
    """0/1 [R, B, T]: the tokens that took a slot, in every row."""
    appends = [np.moveaxis(np.asarray(record.appends), 3, 1) for record in output.records]
    return np.concatenate([x.reshape(-1, *x.shape[2:]) for x in appends])


def longest_segment(opened):
    """Tokens of it."""
    ends = np.flatnonzero(np.append(opened, 1))
    return np.diff(ends).max()


def poisoned_cache(config, settings, pages, dtype=jnp.float32):
    """A cache of two seats in which everything that no sequence wrote is NaN."""
    cache = paged_cache.init(
        config, policy_of(settings), seats=2, pages=pages, page_size=8, max_length=T, dtype=dtype
    )
    nan = functools.partial(jax.tree.map, lambda x: x * np.nan if x.dtype != jnp.int32 else x)
    return dataclasses.replace(
        cache,
        pages=nan(cache.pages),
        state=nan(cache.state),
    )


@pytest.mark.parametrize(
    "kv_heads, window", [(4, 12), (2, None), (1, 1), ((4, 2), 3), ((1, 4), "dense")]
)
def sequences_that_come_and_go_get_the_logits_of_the_whole_sequence_test(
    build_model, kv_heads, window
):
    params, config = build_model(kv_heads)
    settings = None if window == "dense" else DMCSettings(window=window, offset=0.0)
    tokens, ratios = random_tokens(), []
    for threshold in (NEVER,) if settings is None else (NEVER, HALF, MOSTLY, ALWAYS):
        expected = evaluate_all(params, config, settings, tokens, threshold)
        opened = opened_by_row(expected)
        # Room for two dense sequences, so that the later two need the pages of the first.
        cache = poisoned_cache(config, settings, 2 * config.kv_rows * -(-T // 8))
        cache, logits = decode_paged(params, config, settings, schedule(tokens), threshold, cache)
        assert not cache.failed.any()
        logits, expected = np.asarray(logits), np.asarray(expected.logits)
        for row, (seat, start, count) in enumerate(STAYS):
            mine = logits[start : start + count, seat]
            np.testing.assert_allclose(mine, expected[row, :count], atol=TOLERANCE, rtol=0)
        for row in (2, 3):  # those that stayed
            seat, _, count = STAYS[row]
            np.testing.assert_array_equal(cache.lengths[seat], opened[:, row, :count].sum(axis=-1))
            assert cache.position[seat] == count
        ratios.append(opened.size / opened.sum())
        if threshold == MOSTLY:  # the ring of the open segment must have gone round
            assert max(map(longest_segment, opened.reshape(-1, T))) > 12
    if settings is None:
        assert ratios == [1]
    else:
        never, half, mostly, always = ratios
        assert never == 1 and 1.3 < half < 3 < mostly < 10 and always == T


def the_comparison_would_notice_another_threshold_or_window_test(tiny_model):
    params, config = tiny_model
    logits = [
        evaluate_all(params, config, DMCSettings(window=w, offset=0.0), random_tokens(), t).logits
        for w, t in ((12, HALF), (12, MOSTLY), (11, MOSTLY))
    ]
    assert jnp.abs(logits[0] - logits[1]).max() > 1000 * TOLERANCE
    assert jnp.abs(logits[1] - logits[2]).max() > 100 * TOLERANCE


def bfloat16_pages_hold_the_float32_average_rounded_once_test(tiny_model):
    params, config = tiny_model
    settings, pages = DMCSettings(offset=0.0), {}
    tokens = random_tokens()
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = poisoned_cache(config, settings, 100, dtype)
        cache, _ = decode_paged(params, config, settings, schedule(tokens), MOSTLY, cache)
        assert cache.pages.k.dtype == cache.pages.v.dtype == dtype
        assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(cache.state))
        length = int(cache.lengths[0, 0])  # in the first layer, which reads the same inputs
        assert 1 < length < 30
        ids = cache.page_table[0, 0, : -(-length // 8)]
        pages[dtype] = [
            pool[ids].reshape(-1, config.head_dim)[:length]
            for pool in (cache.pages.k, cache.pages.v)
        ]
    for wide, narrow in zip(pages[jnp.float32], pages[jnp.bfloat16], strict=True):
        np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


@pytest.mark.parametrize("merges", ["window 12", "unlimited window", "by gates, 5 tokens later"])
def an_int8_slot_is_off_by_one_rounding_however_often_it_was_written_test(merges):
    """Half a step at every time: the average is never taken of what a page holds."""
    steps, rng = 200, np.random.default_rng(0)
    if merges.startswith("by gates"):
        row = jnp.full((SMALL.kv_rows, SMALL.width), 0.3, jnp.float32)
        mean = jnp.zeros((SMALL.layers, SMALL.width), jnp.float32)
        gates = Gates(mean, mean + 1, row, jnp.ones(SMALL.kv_rows, jnp.float32), None, None, None)
        policy = DelayedDMC(gates, delay=5).of_layer(0, 0, 2)
    else:
        window = 12 if merges == "window 12" else None
        policy = DMC(DMCSettings(window=window, offset=0.0), -1.5)
    tokens = rng.normal(size=(3, steps, 1, 2, SMALL.head_dim)).astype(np.float32)
    inputs = rng.normal(size=(steps, 1, SMALL.width)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="dtype")
    def slots_over_time(dtype):
        sizes = {"seats": 1, "pages": 100, "page_size": PAGE, "max_length": steps}
        cache = paged_cache.init(SMALL, policy, dtype=dtype, **sizes)

        def step(cache, now):
            (q, k, v), x = now
            token = Tokens(q, k, v, cache.position, FREQUENCIES, x)
            cache, reads, granted = decoding.begin_step(cache, jnp.ones(1, bool))
            _, cache = decoding.read_token(cache, policy, 0, token, active=reads)
            cache = decoding.end_step(cache, jnp.ones(1, bool), granted)
            return cache, (*cache.pages.read(cache.page_table[0, :2]), cache.lengths[0, :2])

        _, held = jax.lax.scan(step, cache, (tuple(tokens), inputs))
        return held

    *exact, lengths = map(np.asarray, slots_over_time("float32"))  # [steps, 2, slots, H]
    *rounded, same = map(np.asarray, slots_over_time("int8"))
    np.testing.assert_array_equal(lengths, same)
    assert lengths[-1].min() > 4 and lengths[-1].max() < steps / 2  # segments of many tokens
    for before, after in zip(exact, rounded, strict=True):
        live = np.arange(before.shape[2]) < lengths[..., None]
        half_a_step = np.abs(before).max(axis=-1) / 254
        off = np.abs(after - before).max(axis=-1)
        assert (off[live] <= 1.0001 * half_a_step[live]).all()
        assert off[live].max() > 0


def sequences_that_are_not_active_stay_as_they_are_and_attend_to_nothing_test():
    cache = small_cache(POLICIES["dmc"])
    tokens = jax.random.normal(jax.random.key(0), (2, 3, SEATS, 1, 2, SMALL.head_dim))
    active = np.array([True, False, True])

    @jax.jit
    def attend(cache, active, q, k, v):
        attend = decoding.attend_cached(SMALL, policy_of(POLICIES["dmc"]), active=active)
        return attend(q, k, v, jnp.zeros((SEATS, 1, SMALL.width)), 0, cache)[:2]

    _, cache = attend(cache, np.full(SEATS, True), *tokens[0])
    out, after = attend(cache, active, *tokens[1])
    assert (out[1] == 0).all() and (out[::2] != 0).any(axis=(1, 2, 3)).all()
    for name in ("lengths", "page_table", "failed"):
        np.testing.assert_array_equal(getattr(after, name)[1], getattr(cache, name)[1])
    for new, old in zip(*map(jax.tree.leaves, (after.state, cache.state)), strict=True):
        np.testing.assert_array_equal(new[1], old[1])
    assert (after.state.keys[0] != cache.state.keys[0]).any()
