"""SnapKV against its rule in plain NumPy, and what a cut leaves in a cache and gives back."""

import dataclasses
import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.errors import UserError
from dmc_jax.inference import paged_cache
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.prompt_cut import keep_slots
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import load_snapshot
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.policy import Where
from dmc_jax.policies.snapkv import SnapKV
from tests.policies.policy_test import Ids, model

THETA = 100.0


def stays(policy, prompt):
    """Slots of a prompt after the cut."""
    share = prompt // fractions.Fraction(str(policy.ratio)) if policy.ratio else 0
    return min(prompt, max(policy.budget, math.floor(share)))


def kept_by_the_paper(policy, weights):
    """Which tokens of a prompt stay, from the attention of its last tokens (listing 1).

    Args:
        policy: with kernel and observers.
        weights: of the query heads of a KV head, [G, P, P], lower triangles.
    """
    P, reach = weights.shape[1], policy.kernel // 2
    newest = min(policy.observers, stays(policy, P))
    early = P - newest
    votes = weights[:, -policy.observers :, :early].sum(axis=1).mean(axis=0)
    pooled = [max(votes[max(0, j - reach) : j + reach + 1]) for j in range(early)]
    best = sorted(range(early), key=lambda j: (-pooled[j], j))[: stays(policy, P) - newest]
    return sorted(best) + list(range(early, P))


def by_the_paper(policy, q, k, v):
    """Outputs for rotated q [T, N, H], k and v [T, K, H], and the kept tokens of every KV head."""
    (T, N, H), K, P = q.shape, k.shape[1], policy.prompt
    out, kept = np.zeros_like(q), []
    for h in range(K):
        heads = range(h * N // K, (h + 1) * N // K)
        scores = np.stack([q[:, n] @ k[:, h].T / np.sqrt(H) for n in heads])
        scores = np.exp(np.where(np.tri(T) > 0, scores, -np.inf))
        weights = scores / scores.sum(axis=2, keepdims=True)
        kept.append(kept_by_the_paper(policy, weights[:, :P, :P]))
        gone = np.setdiff1d(np.arange(P), kept[h])
        scores[:, P:, gone] = 0.0
        weights = scores / scores.sum(axis=2, keepdims=True)
        for n, of_head in zip(heads, weights, strict=True):
            out[:, n] = of_head @ v[:, h]
    return out, kept


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(8, observers=4, kernel=1, prompt=30),
        SnapKV(12, observers=6, kernel=7, prompt=30),
        SnapKV(9, observers=1, kernel=3, prompt=39),
        SnapKV(8, observers=4, kernel=5, prompt=9),
        SnapKV(8, observers=4, kernel=5, prompt=7),  # which all stays
        SnapKV(3, ratio=2.5, observers=5, prompt=40),
        SnapKV(2, ratio=4.0, observers=12, prompt=31),  # fewer than the observers
    ],
    ids=str,
)
def whole_sequences_follow_the_rule_of_the_paper_test(policy):
    rng, (T, N, K, H) = np.random.default_rng(policy.prompt), (44, 4, 2, 8)
    q, k, v = (rng.normal(size=(2, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    q *= 2
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
    where = Where(positions, None, THETA, None)
    attend = jax.jit(lambda *qkv: policy.whole(*qkv, where, x=jnp.zeros((2, T, 1))))
    attended = attend(q, k, v)
    frequencies = rotary_frequencies(H, THETA)
    q, k = (np.asarray(rotate(jnp.asarray(x), positions, frequencies), np.float64) for x in (q, k))
    for row in range(2):
        expected, kept = by_the_paper(policy, q[row], k[row], v[row])
        np.testing.assert_allclose(attended.out[row], expected, atol=2e-5)
        assert len(kept[0]) < policy.observers + 2 or policy.prompt < 10 or kept[0] != kept[1]
        slots = np.cumsum(attended.record.appends[row], axis=0)
        t = np.arange(1, T + 1)
        P, n = policy.prompt, stays(policy, policy.prompt)
        np.testing.assert_array_equal(slots, np.where(t < P, t, t - P + n)[:, None].repeat(K, 1))


def sequences_of_a_batch_have_prompts_of_their_own_test():
    policy, (T, N, K, H) = SnapKV(8, observers=4), (24, 4, 2, 8)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, heads, H)).astype(np.float32) for heads in (N, K, K))

    @jax.jit
    def attend(policy, q, k, v):
        positions = jnp.broadcast_to(jnp.arange(T), q.shape[:2])
        return policy.whole(
            *(q, k, v, Where(positions, None, THETA, None)), x=jnp.zeros((*q.shape[:2], 1))
        )

    both = attend(policy.of_prompts(np.array([14, 20])), q, k, v)
    for row, prompt in enumerate((14, 20)):
        of_row = (x[row : row + 1] for x in (q, k, v))
        alone = attend(policy.of_prompts(prompt), *of_row)
        np.testing.assert_allclose(both.out[row], alone.out[0], atol=1e-6)
        np.testing.assert_array_equal(both.record.appends[row], alone.record.appends[0])


# ---- in a cache ---------------------------------------------------------------------------------


def slots_that_stay_move_together_and_spare_pages_go_back_test():
    """Whatever stays, and with rows that others own between them."""
    (_, config), seats, page = model(), 3, 8
    policy, rng = Dense(), np.random.default_rng(4)
    sizes = {"seats": seats, "pages": 60, "page_size": page, "max_length": 300}
    cache = paged_cache.init(config, policy, **sizes, dtype=jnp.float32)
    first, K = 4, 2  # the second layer
    cut = jax.jit(functools.partial(keep_slots, first=first))
    lengths = np.array([[0, 150], [17, 9], [8, 40]])
    cache, granted = paged_cache.reserve(cache, jnp.asarray(lengths, jnp.int32), first, most=19)
    assert granted.all()
    held = rng.normal(size=(seats, K, 160, config.head_dim)).astype(np.float32)
    slots = np.broadcast_to(np.arange(160), (seats, K, 160))
    there = slots < lengths[..., None]
    written = (jnp.asarray(x) for x in (held, -held, slots, there))
    cache = paged_cache.write(cache, *written, first)
    pages_before = paged_cache.pages_of(lengths, page)

    order = np.array([2, 0, 3, 1], np.int32)  # seat 3 is none
    kept = rng.random((4, K, 160)) < 0.5
    kept[3, :, 8:] = False  # of seat 1; but it is not cut
    which = np.array([True, True, False, False])
    after, lost = cut(cache, jnp.asarray(kept), jnp.asarray(which), seats=jnp.asarray(order))
    for row, seat in ((0, 2), (1, 0), (3, 1)):
        for h in range(K):
            stay = np.flatnonzero(there[seat, h] & (kept[row, h] | ~which[row]))
            assert after.lengths[seat, first + h] == len(stay)
            assert lost[row, h] == lengths[seat, h] - len(stay)
            table = after.page_table[seat, first + h]
            k, v = after.pages.read(table[: paged_cache.pages_of(len(stay), page)])
            np.testing.assert_array_equal(k[: len(stay)], held[seat, h, stay])
            np.testing.assert_array_equal(v[: len(stay)], -held[seat, h, stay])
    pages = paged_cache.pages_of(np.asarray(after.lengths), page)
    free = np.asarray(after.free_pages[: int(after.free_count)])
    owned = [
        int(page)
        for row, n in zip(after.page_table.reshape(-1, 38), pages.reshape(-1), strict=True)
        for page in row[:n]
    ]
    assert sorted([*owned, *free]) == list(range(60))
    most = pages_before.sum(axis=1) * np.array([1, 0, 1])
    np.testing.assert_array_equal(after.most_pages, most)
    assert not np.asarray(paged_cache.free(after, jnp.full(seats, True)).most_pages).any()


def an_engine(policy, **changes):
    sizes = {"max_sequences": 2, "pages": 10_000, "page_size": 8, "max_length": 128}
    return Engine(*model(), Ids(), policy=policy, **sizes | changes)


@pytest.mark.parametrize("chunk", [16, pytest.param(64, marks=pytest.mark.slow)])
def memory_is_that_of_the_cut_prompt_and_its_peak_is_told_test(chunk):
    (_, config), engine = model(), an_engine(SnapKV(12, observers=4), chunk=chunk)
    page_bytes, R = 2 * 8 * config.head_dim * 4, config.kv_rows
    prompts, params = [[1, *range(3, 46)], [1, 7]], SamplingParams(20, temperature=0.0)
    long, short = engine.generate(prompts, params)
    for result, prompt, stay in ((long, 44, 12), (short, 2, 2)):
        slots = stay + 19
        assert result.live_cache_bytes == R * math.ceil(slots / 8) * page_bytes
        assert result.ratio == pytest.approx((prompt + 19) / slots)
    assert short.peak_cache_bytes == short.live_cache_bytes
    # Of 4 rows in the first layer, cut when the 2 of the second have only the chunks before.
    before = math.ceil(44 / 8) if chunk == 64 else math.ceil(32 / 8)
    at_first_cut = 4 * math.ceil(44 / 8) + 2 * (0 if chunk == 64 else before)
    at_second = 4 * math.ceil(12 / 8) + 2 * math.ceil(44 / 8)
    assert long.peak_cache_bytes == max(at_first_cut, at_second) * page_bytes
    assert long.peak_cache_bytes <= R * math.ceil(44 / 8) * page_bytes


def a_snapshot_and_a_sequence_that_is_read_again_go_on_as_before_test(tmp_path):
    """Where it is read again, what it said is in a chunk with the end of its prompt."""
    policy, prompt = SnapKV(12, observers=4), [1, *range(3, 40)]
    params = SamplingParams(24, temperature=0.8, seed=3)
    engine = an_engine(policy, chunk=16)
    [expected] = engine.generate([prompt], params)
    sequence = engine.submit(prompt, params)
    while len(engine.snapshot(sequence).tokens) < 8:
        engine.step()
    engine.snapshot(sequence).save(tmp_path / "it")
    snapshot = load_snapshot(tmp_path / "it")
    for given in (snapshot, dataclasses.replace(snapshot, rows=None)):
        *_, last = engine.stream(engine.resume(given))
        assert last.result.tokens == expected.tokens


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"budget": 32}, "budget: expected more slots than the 32"),
        ({"budget": 9, "observers": 0}, "observers: expected a token or more, got 0"),
        ({"budget": 99, "kernel": 4}, "kernel: expected an odd number of tokens, got 4"),
        ({"budget": 9, "ratio": 0.5}, "ratio: expected 1 to 1,000,000"),
    ],
)
def a_cut_that_cannot_be_is_refused_test(options, complaint):
    with pytest.raises(UserError, match=complaint):
        SnapKV(**options)


def whole_sequences_without_a_prompt_are_refused_test():
    x = jnp.zeros((1, 4, 2, 8))
    where = Where(jnp.arange(4)[None], None, THETA, None)
    with pytest.raises(UserError, match="say how many tokens of each document are its prompt"):
        SnapKV(64).whole(x, x, x, where, x=jnp.zeros((1, 4, 1)))
