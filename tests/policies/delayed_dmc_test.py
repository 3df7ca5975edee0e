"""Merging by gates in a cache: what a chunk leaves behind, and sequences that go on elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.gates import Gates
from dmc_jax.core.rope import rotary_frequencies
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import load_snapshot
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.policy import Tokens, Where
from tests.policies.policy_test import Ids, model, some_gates


@pytest.mark.parametrize(
    "delay", [3, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0, 1, 20))]
)
def of_all_that_a_chunk_writes_each_slot_has_one_in_the_end_test(delay):
    """Of two writes to one slot, which one stays would be up to the machine."""
    policy = DelayedDMC(some_gates(gamma=True), -0.5, delay, DMCSettings(5, offset=0.0))
    policy = policy.of_layer(0, 0, 4)
    rng, (B, T, K, H) = np.random.default_rng(delay), (2, 16, 4, 16)
    state = policy.start((B, K), H, jnp.float32, 3 * T)
    lengths, read = jnp.zeros((B, K), jnp.int32), np.zeros(B, np.int32)
    held = {}  # tokens of every slot
    for counts in ([16, 3], [16, 0], [5, 16]):
        q, k, v = (jnp.asarray(rng.normal(size=(B, T, K, H)), jnp.float32) for _ in range(3))
        tokens = Tokens(
            *(q, k, v, jnp.asarray(read[:, None] + np.arange(T), jnp.int32)),
            frequencies=rotary_frequencies(H, 100.0),
            x=jnp.asarray(rng.normal(size=(B, T, 32)), jnp.float32),
        )
        state, edits = policy.chunk(state, tokens, lengths, jnp.asarray(counts, jnp.int32))
        n = len(edits.writes())
        flat = jax.tree.map(np.asarray, edits.side_by_side())
        writer, lengths = np.tile(np.arange(T), n), np.array(lengths)
        for b, head in np.ndindex(B, K):
            real = (flat.slot[b, head] >= 0) & (writer < counts[b])
            stays = real & (flat.until[b, head] >= counts[b])
            slots = flat.slot[b, head][stays]
            assert len(set(slots)) == len(slots)
            lengths[b, head] = max([lengths[b, head], *(flat.slot[b, head][real] + 1)])
            held |= {
                (b, head, slot): flat.tokens[b, head][stays][i] for i, slot in enumerate(slots)
            }
        lengths, read = jnp.asarray(lengths), read + counts
    # Without gaps, and no more tokens in all slots than came: the window forgets some.
    counted = []
    for b, head in np.ndindex(B, K):
        counted.append([held[b, head, slot] for slot in range(lengths[b, head])])
        assert min(delay, read[b]) <= len(counted[-1]) <= sum(counted[-1]) <= read[b]
    assert min(map(min, counted)) == 1 and 2 < max(map(max, counted)) <= 5


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [True, False])
def a_forked_or_restored_sequence_goes_on_as_the_first_does_test(gamma, tmp_path):
    policy = DelayedDMC(some_gates(importance=True, gamma=gamma), -0.5, delay=5)

    def make():
        sizes = {"max_sequences": 3, "pages": 200, "page_size": 8, "max_length": 80}
        return Engine(*model(), Ids(), policy=policy, **sizes)

    engine, prompt = make(), [1, *range(3, 25)]
    params = SamplingParams(24, temperature=0.8, seed=3)
    expected = engine.generate([prompt], params)[0].tokens
    sequence = engine.submit(prompt, params)
    while sum(len(event.tokens) for event in engine.step()) == 0:
        pass
    for _ in range(6):
        engine.step()
    engine.snapshot(sequence).save(tmp_path / "it")
    fork, elsewhere = engine.fork(sequence), make()
    restored = elsewhere.resume(load_snapshot(tmp_path / "it"))
    for at, wanted in ((engine, {sequence, fork}), (elsewhere, {restored})):
        results = {}
        while wanted - set(results):
            ended = [event for event in at.step() if event.finish_reason]
            results |= {event.sequence: event.result.tokens for event in ended}
        assert all(tokens == expected for tokens in results.values())


def a_token_far_above_the_threshold_is_dropped_where_others_merge_test():
    """What it says is lost `delay` tokens later; one with a lower logit is averaged in."""
    rng, (B, T, K, H), delay = np.random.default_rng(0), (1, 12, 1, 8), 2
    x = np.zeros((B, T, 1), np.float32)
    x[0, 4], x[0, 5] = 1.0, 3.0  # the others open slots
    gates = Gates(
        *(jnp.full(s, c) for s, c in (((1,), 0.0), ((1,), 1.0), ((1, 1), 1.0), ((1,), 0.0)))
    )
    policy = DelayedDMC(gates, 0.5, delay, DMCSettings(offset=0.0), margin=1.0)
    where = Where(jnp.arange(T)[None], None, 100.0, None)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, K, H)), jnp.float32) for _ in range(3))

    def moved_by(token, **changes):
        changed = dataclasses.replace(policy, **changes)
        outs = [
            changed.whole(q, k, values, where, x=jnp.asarray(x)).out
            for values in (v, v.at[0, token].add(1.0))
        ]
        return np.abs(np.asarray(outs[1] - outs[0]))[0].max((1, 2))

    merged, dropped, also_merged = moved_by(4), moved_by(5), moved_by(5, margin=None)
    assert (dropped[5 : 5 + delay] > 1e-2).all() and (dropped[5 + delay :] < 1e-3).all()
    assert (merged[4:] > 1e-3).all() and (also_merged[5:] > 1e-3).all()
