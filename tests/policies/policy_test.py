"""Every policy: whole sequences, one token at a time and any chunks are one thing, alone or not."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmc_jax.core.attention import causal_attention
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.gates import Gates
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference import decoding, layers, paged_cache
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.prefill import attend_chunk
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.model.causal_attention import over_int8
from dmc_jax.model.llama import Llama, unstack_layers
from dmc_jax.policies.choice import BUDGETED, POLICIES, Trained, from_json, policy_for, to_json
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.dms import DMS
from dmc_jax.policies.h2o import H2O
from dmc_jax.policies.policy import attend_whole
from dmc_jax.policies.snapkv import SnapKV
from dmc_jax.policies.stride import Stride
from dmc_jax.policies.tova import TOVA
from dmc_jax.policies.window import Window
from tests.inference import chunks
from tests.tiny_llama import build


def some_gates(layers=2, rows=6, width=32, seed=3, *, importance=False, gamma=False):
    rng = np.random.default_rng(seed)
    mean, deviation = rng.normal(size=(layers, width)), rng.uniform(0.5, 2.0, (layers, width))
    weight = 0.3 * rng.normal(size=(rows, width))
    arrays = (mean, deviation, weight, rng.normal(size=rows))
    arrays += (weight[::-1], rng.normal(size=rows)) if importance else (None, None)
    arrays += (rng.normal(size=rows) if gamma else None,)
    return Gates(*(x if x is None else jnp.asarray(x, jnp.float32) for x in arrays))


TABLE = {
    "dense": Dense(),
    "dense without the channel": Dense(0.0),
    "dmc, window 12": DMC(DMCSettings(window=12, offset=0.0), -1.0),
    "dmc, window 3": DMC(DMCSettings(window=3, offset=0.0)),
    "dmc, unlimited": DMC(DMCSettings(window=None, offset=0.0), -0.5),
    "dms, delay 1": DMS(some_gates(), delay=1),
    "dms, delay 5": DMS(some_gates(), 0.2, delay=5),
    "dms, delay 16": DMS(some_gates(), -0.5, delay=16),
    "dmc by gates, at once": DelayedDMC(some_gates(importance=True), delay=0),
    "dmc by gates, delay 1": DelayedDMC(some_gates(), -0.3, 1, DMCSettings(3, offset=0.0)),
    "dmc by gates, delay 5": DelayedDMC(some_gates(importance=True, gamma=True), -0.5, delay=5),
    "dmc by gates, delay 5, no gamma": DelayedDMC(some_gates(importance=True), -0.5, delay=5),
    "dmc by gates, delay 5, drops": DelayedDMC(
        some_gates(gamma=True), -0.5, 5, DMCSettings(3, offset=0.0), margin=0.7
    ),
    "dmc by gates, at once, gamma": DelayedDMC(some_gates(gamma=True), delay=0),
    "dmc by gates, delay 16, unlimited": DelayedDMC(
        some_gates(importance=True), -0.5, settings=DMCSettings(None, offset=0.0)
    ),
    "stride, 2.5 tokens": Stride(2.5),
    "stride, 3 tokens, delay 5": Stride(3, delay=5),
    "stride, a token": Stride(1.0),
    "tova, 11 slots": TOVA(11),
    "tova, 8 slots, without the channel": TOVA(8, channel_scale=0.0),
    "tova, 5 slots, 2.5 tokens for one": TOVA(5, ratio=2.5),
    "h2o, 11 slots, without the channel": H2O(11, channel_scale=0.0),
    "h2o, 3 slots, 2 tokens for one": H2O(3, ratio=2.0, recent=0.3),
    "snapkv, 9 slots of 22": SnapKV(9, observers=4, kernel=3, prompt=22),
    "snapkv, 2.5 tokens for one, without the channel": SnapKV(
        3, ratio=2.5, observers=5, prompt=13, channel_scale=0.0
    ),
    "snapkv, 4 tokens for one, fewer slots than observers": SnapKV(2, ratio=4.0, prompt=37),
    "window, 11 slots, without the channel": Window(11, channel_scale=0.0),
    "window, 3 slots": Window(3, sinks=1),
    "window, 40 slots": Window(40),
    "window, 6 slots, 3 tokens for one": Window(6, ratio=3.0, sinks=2),
    "window, 1 slot, 1.2 tokens for one": Window(1, ratio=1.2, sinks=0),
}
T, CHUNK, PAGE = 40, 16, 8
TOLERANCE = 2e-5  # float32 logits of size 1

# Of each kind of method one in `make test`; in the engine, which takes longest, those by gates.
IN_ENGINE = ("dmc, window 3", "dms, delay 5", "dmc by gates, delay 5", "snapkv, 9 slots of 22")
QUICK = (
    *IN_ENGINE,
    "dense",
    "tova, 8 slots, without the channel",
)


def policies(quick):
    return pytest.mark.parametrize(
        "policy",
        [
            pytest.param(policy, id=name, marks=[] if name in quick else pytest.mark.slow)
            for name, policy in TABLE.items()
        ],
    )


every_policy = policies(QUICK)


def every_method_is_in_the_table_test():
    assert {policy.name for policy in TABLE.values()} == set(POLICIES)


@functools.cache
def model():
    return build(kv_heads=(4, 2))


def some_tokens(seed=1, batch=2, length=T):
    return np.random.default_rng(seed).integers(0, 50, (batch, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "attention"))
def whole(params, config, policy, tokens, positions, segment_ids=None, attention=causal_attention):
    attend = attend_whole(policy, config, positions, segment_ids, attention=attention)
    return Llama(config).apply({"params": params}, tokens, attend=attend)


def positions_of(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def empty_cache(config, policy, dtype):
    """Three seats, in pages of NaN, and of slots without tokens."""
    cache = paged_cache.init(
        *(config, policy), seats=3, pages=90, page_size=PAGE, max_length=T, dtype=dtype
    )
    poison = jax.tree.map(
        lambda x: x * (jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0), cache.pages
    )
    return dataclasses.replace(cache, pages=poison)


@functools.partial(jax.jit, static_argnames="config")
def read_chunk(params, config, policy, cache, tokens, counts, seats):
    return chunks.read_chunk(params, config, cache, tokens, counts, seats, policy=policy)


@functools.partial(jax.jit, static_argnames="config")
def read_rest(params, config, policy, cache, tokens, at):
    """One token at a time from where each sequence is; logits [B, T, V]."""

    def step(cache, now):
        t, column = now
        column, active = jnp.append(column, 0), jnp.append(t >= at, False)
        return decoding.decode_step(params, config, cache, column, active, policy=policy)

    cache, logits = jax.lax.scan(step, cache, (jnp.arange(T), tokens.T))
    return cache, logits.swapaxes(0, 1)[:2]


def read_chunks_then_rest(policy, tokens, splits, dtype="float32"):
    """Read both sequences; `splits` has (tokens of the first, of the second) of every chunk.

    What is left of a prompt that is cut at its end is read in chunks too: of no more than that.
    """
    params, config = model()
    cache, logits = empty_cache(config, policy, dtype), np.zeros((2, T, 50), np.float32)
    at, seats = np.zeros(2, np.int32), np.array([1, 0], np.int32)
    left = np.maximum(0, (policy.prompt or 0) - np.sum([(0, 0), *splits], axis=0))
    splits = [*splits, *(np.clip(left - i, 0, CHUNK) for i in range(0, left.max(), CHUNK))]
    for counts in splits:
        counts, chunk = np.array(counts, np.int32), np.full((2, CHUNK), 49, np.int32)
        for row in range(2):
            chunk[row, : counts[row]] = tokens[row, at[row] : at[row] + counts[row]]
        cache, new = read_chunk(params, config, policy, cache, chunk, counts, seats)
        for row in range(2):
            logits[row, at[row] : at[row] + counts[row]] = new[row, : counts[row]]
        at += counts
    cache, rest = read_rest(params, config, policy, cache, tokens[seats], at[seats])
    rest = np.asarray(rest)[seats]
    for row in range(2):
        logits[row, at[row] :] = rest[row, at[row] :]
    return cache, logits


def slots_of(output):
    """Of every row of both sequences at their ends, [B, R]."""
    taken = [np.asarray(record.appends).sum(axis=2) for record in output.records]  # [L, B, K]
    return np.concatenate([layer for stack in taken for layer in stack], axis=1)


@every_policy
def whole_sequences_are_any_chunks_and_then_one_token_at_a_time_test(policy):
    params, config = model()
    tokens = some_tokens()
    expected = whole(params, config, policy, tokens, positions_of(tokens))

    def check(splits):
        cache, logits = read_chunks_then_rest(policy, tokens, splits)
        np.testing.assert_allclose(logits, expected.logits, atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(cache.lengths[:2][::-1], slots_of(expected))
        np.testing.assert_array_equal(cache.position, [T, T, 0])
        assert not cache.failed.any()

    check([])
    check([(1, 16), (0, 3), (13, 0), (16, 16)])

    chunk = st.tuples(st.integers(0, CHUNK), st.integers(0, CHUNK))
    fitting = st.lists(chunk, max_size=4).filter(
        lambda x: max(map(sum, zip(*x, strict=True)), default=0) <= T
    )

    @settings(max_examples=4, deadline=None)
    @given(fitting)
    def any_chunks(splits):
        check(splits)

    any_chunks()


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(policy, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, policy in TABLE.items()
        if policy.branches
    ],
)
def a_slot_that_is_not_open_stays_as_it_is_test(policy):
    """So sequences may share it."""
    params, config = model()
    tokens, seats = some_tokens(), np.array([0, 1], np.int32)
    first, second = np.array([16, 11], np.int32), np.array([9, 16], np.int32)
    cache = empty_cache(config, policy, "float32")
    cache = read_chunk(params, config, policy, cache, tokens[:, :CHUNK], first, seats)[0]
    following = np.stack([row[at : at + CHUNK] for row, at in zip(tokens, first, strict=True)])
    later = read_chunk(params, config, policy, cache, following, second, seats)[0]
    after, _ = read_rest(params, config, policy, later, tokens, first + second)

    slots, closed, changed = np.arange(T), 0, 0
    for before in (cache, later):
        is_open = (policy.open_slots(before.state, before.lengths)[..., None] == slots).any(axis=2)
        held = [np.asarray(one.pages.read(one.page_table)[0])[:, :, :T] for one in (before, after)]
        same = (held[0] == held[1]).all(axis=-1)[:2]  # [2, R, T]
        there = (slots < before.lengths[..., None])[:2]
        assert same[there & ~is_open[:2]].all()
        closed += (there & ~is_open[:2]).sum()
        changed += (there & is_open[:2] & ~same).sum()
    assert closed
    if policy.name != "dense" and getattr(policy, "ratio", 2) > 1:
        assert changed


@policies(("dmc, window 3", "dmc by gates, delay 5", "tova, 8 slots, without the channel"))
def pages_of_int8_mean_the_same_in_any_chunks_and_one_token_at_a_time_test(policy):
    params, config = model()
    tokens = some_tokens()
    exact_cache, exact = read_chunks_then_rest(policy, tokens, [])
    cache, logits = read_chunks_then_rest(policy, tokens, [], "int8")
    others = [read_chunks_then_rest(policy, tokens, [(1, 16), (0, 3), (13, 0), (16, 16)], "int8")]
    if policy.name not in BUDGETED:
        attention = over_int8(causal_attention)
        evaluated = whole(params, config, policy, tokens, positions_of(tokens), attention=attention)
        others.append((cache, evaluated.logits))
    # Where a last bit decides to which side a number is rounded, and so a number in 127 of the
    # largest: seldom, and far less than what all the rounding changes.
    rounding = np.sqrt(np.mean((logits - exact) ** 2))
    assert 1e-3 < rounding < 0.1
    for other_cache, other in others:
        np.testing.assert_array_equal(other_cache.lengths, cache.lengths)
        assert np.sqrt(np.mean((np.asarray(other) - logits) ** 2)) < 0.1 * rounding
    assert cache.pages.nbytes < 0.4 * exact_cache.pages.nbytes


@pytest.mark.parametrize(
    "name, dtype",
    [
        *((name, "float32") for name in (*IN_ENGINE, "dense", "window, 40 slots")),
        *((name, "int8") for name in ("dense", "dmc, window 3", "dmc by gates, delay 5")),
    ],
)
def a_chunk_is_read_without_a_copy_of_the_pages_test(name, dtype):
    """They are most of the memory: a program that holds them twice would not fit."""
    (params, config), policy = model(), TABLE[name]
    many = {"seats": 3, "pages": 40_000, "page_size": 8, "max_length": T, "dtype": dtype}
    cache = jax.eval_shape(lambda: paged_cache.init(config, policy, **many))
    weights = unstack_layers(params, config, "float32")["layer_0"]
    inputs = {"policy": policy, "counts": np.full(2, 16), "seats": np.arange(2)}
    x = jax.ShapeDtypeStruct((2, 16, config.width), jnp.float32)
    how = {"config": config, "kv_heads": config.kv_heads_by_layer[0], "make_attend": attend_chunk}
    program = layers._run_layer.lower(weights, None, np.int32(0), x, cache, inputs, **how)
    assert program.compile().memory_analysis().temp_size_in_bytes < 0.1 * cache.pages.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ENGINE[:3])
def every_seat_of_a_cache_has_a_threshold_of_its_own_test(name):
    params, config = model()
    policy, tokens = TABLE[name], some_tokens()
    seats = dataclasses.replace(policy, threshold=np.array([-1.0, 0.8, 9.0], np.float32))
    cache, logits = read_chunks_then_rest(seats, tokens, [(1, 16), (0, 3), (13, 0)])
    for row, threshold in enumerate((0.8, -1.0)):  # the first sequence is in the second seat
        one = dataclasses.replace(policy, threshold=threshold)
        alone = whole(params, config, one, tokens, positions_of(tokens))
        np.testing.assert_allclose(logits[row], alone.logits[row], atol=TOLERANCE, rtol=0)
        np.testing.assert_array_equal(cache.lengths[1 - row], slots_of(alone)[row])
    assert cache.lengths[0].sum() < cache.lengths[1].sum()


@every_policy
def documents_of_a_packed_window_are_as_if_each_were_alone_test(policy):
    params, config = model()
    tokens, lengths = some_tokens(), (13, 27)
    segment_ids = np.repeat([1, 2], lengths)[None].repeat(2, axis=0)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, axis=0)
    packed = whole(params, config, policy, tokens, positions, segment_ids)
    alone = [np.pad(x, [(0, 0), (0, T - x.shape[1])]) for x in np.split(tokens, [13], axis=1)]
    for part, document in zip(
        np.split(np.asarray(packed.logits), [13], axis=1), alone, strict=True
    ):
        expected = whole(params, config, policy, document, positions_of(document)).logits
        np.testing.assert_allclose(part, expected[:, : part.shape[1]], atol=TOLERANCE, rtol=0)


class Ids(Tokenizer):
    """A tokenizer for prompts that are ids; no token ends a sequence."""

    vocab_size, bos_id, eos_id, pad_id = 50, 1, -1, 0

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return " ".join(map(str, ids))


@policies(IN_ENGINE[1:3])
def what_a_sequence_gets_in_the_engine_does_not_depend_on_who_is_there_test(policy):
    """With pages for a few: sequences wait, and give theirs back to go on later."""
    engine = Engine(
        *model(), Ids(), policy=policy, max_sequences=3, pages=40, page_size=PAGE, max_length=60
    )
    free = engine.free_pages
    prompts = [[1, *row[: 3 + 4 * i]] for i, row in enumerate(some_tokens(7, 5).tolist())]
    params = [SamplingParams(24, temperature=0.5 * (i % 2), seed=i) for i in range(5)]
    together = [result.tokens for result in engine.generate(prompts, params)]
    alone = [
        engine.generate([prompt], one)[0].tokens
        for prompt, one in zip(prompts, params, strict=True)
    ]
    assert together == alone and len(set(together)) == 5
    assert engine.free_pages == free


@every_policy
def a_policy_is_a_pytree_whose_numbers_compile_nothing_anew_test(policy):
    counted = jax.jit(lambda policy: [x + 1 for x in jax.tree.leaves(policy)])
    for number in (0.0, 0.5, -3.0):
        counted(jax.tree.map(lambda _, number=number: number, policy))
    assert counted._cache_size() == 1


def thresholds_of_many_values_are_one_program_test():
    params, config = model()
    tokens, policy = some_tokens(), TABLE["dmc, window 3"]
    whole.clear_cache()
    slots = [
        slots_of(whole(params, config, DMC(policy.settings, x), tokens, positions_of(tokens))).sum()
        for x in (-3.0, -1.0, 0.0, 1.0, 3.0)
    ]
    assert slots == sorted(slots) and len(set(slots)) == 5
    assert whole._cache_size() == 1


@pytest.mark.parametrize(
    "trained, options, complaint",
    [
        (
            DMC(DMCSettings()),
            {"name": "none"},
            "policy: expected dense or dmc or .* or window or snapkv, got .none",
        ),
        (Dense(), {"name": "dmc"}, "dmc needs a model that was trained for it"),
        (DMC(DMCSettings()), {"window": -1}, "window: expected tokens, or 0 for no limit, got -1"),
        *[
            (Dense(), {"name": name}, "budget: .* with tova, h2o, window or snapkv, or a ratio")
            for name in ("tova", "h2o", "window", "snapkv")
        ],
        (
            DMC(DMCSettings()),
            {"budget": 9},
            "budget: .* with tova, h2o, window or snapkv, not with dmc",
        ),
        (Dense(), {"ratio": 2.0}, "ratio: .* snapkv, stride or a file of gates, not with dense"),
        (Dense(), {"name": "stride"}, "ratio: give the tokens of a slot with stride"),
        (Dense(), {"name": "stride", "ratio": 0.9}, "ratio: expected 1 to 1,000,000 tokens"),
        (Dense(), {"name": "stride", "ratio": 2, "budget": 9}, "budget: .* not with stride"),
        (DMC(DMCSettings()), {"name": "stride", "ratio": 2}, "stride: .* pretrained"),
        (Dense(), {"name": "snapkv", "budget": 32}, "more slots than the 32 of a prompt's last"),
        (Dense(), {"name": "snapkv", "ratio": 2, "prompt": 0}, "prompt: expected a token or more"),
        (Dense(), {"name": "tova", "budget": 9, "prompt": 5}, "prompt: .* matters to snapkv"),
        (Dense(), {"name": "tova", "budget": 0}, "budget: expected a slot or more"),
        (Dense(), {"name": "window", "budget": 4}, "more slots than the 4 of the first tokens"),
        (Dense(), {"name": "h2o", "ratio": 0.5}, "ratio: expected 1 to 1,000,000 tokens"),
        (Dense(), {"name": "h2o", "ratio": float("nan")}, "ratio: expected 1 to 1,000,000 tokens"),
        (Dense(), {"gates": DMS(some_gates()), "budget": 9}, "budget: .* not with dms"),
        (Dense(), {"name": "dms"}, "gates: give their file with dms"),
        (
            Dense(),
            {"name": "tova", "budget": 9, "gates": DMS(some_gates())},
            "with no other policy",
        ),
        (DMC(DMCSettings()), {"gates": DMS(some_gates())}, "models as they were pretrained"),
        (DMC(DMCSettings()), {"gates": DelayedDMC(some_gates())}, "models as they were pretrained"),
        (Dense(), {"name": "dms", "gates": DelayedDMC(some_gates())}, "gates: these are for dmc"),
        (Dense(), {"gates": DMS(some_gates()), "window": 3}, "window: .* dms does not"),
        (Dense(), {"threshold": 1.0}, "threshold: .* dense has none"),
        (Dense(), {"gates": DMS(some_gates()), "threshold": float("nan")}, "expected a logit"),
        (DMC(DMCSettings()), {"name": "dense", "window": 3}, "window: .* policy dense does not"),
    ],
)
def a_policy_that_cannot_be_is_refused_test(trained, options, complaint):
    with pytest.raises(UserError, match=complaint):
        policy_for(trained, **options)


def a_model_runs_with_what_it_was_trained_for_unless_told_otherwise_test():
    settings = DMCSettings(window=7)
    trained = DMC(settings, 0.5)
    assert policy_for(Dense()) == Dense()
    assert policy_for(trained) == trained
    assert policy_for(trained, name="dense") == Dense(0.0)
    assert policy_for(trained, name="tova", budget=9) == TOVA(9, channel_scale=0.0)
    assert policy_for(trained, name="h2o", ratio=4) == H2O(16, ratio=4, channel_scale=0.0)
    assert policy_for(Dense(), name="window", budget=9, ratio=2.5) == Window(9, ratio=2.5)
    assert policy_for(Dense(), name="stride", ratio=2) == Stride(2.0)
    assert policy_for(trained, name="snapkv", budget=64) == SnapKV(64, channel_scale=0.0)
    cut = policy_for(Dense(), name="snapkv", ratio=4, prompt=500)
    assert cut == SnapKV(16, ratio=4, prompt=500)
    gates = DMS(some_gates(), 0.3)
    assert policy_for(Dense(), gates=gates, ratio=2.0) is gates  # which were looked up for it
    assert policy_for(Dense(), gates=gates, threshold=2.0).threshold == 2.0
    merging = DelayedDMC(some_gates(gamma=True), 0.3)
    assert policy_for(Dense(), gates=merging) is merging
    changed = policy_for(Dense(), gates=merging, threshold=2.0, window=0)
    assert (changed.threshold, changed.settings.window, changed.delay) == (2.0, None, 16)
    assert policy_for(trained, window=0) == DMC(dataclasses.replace(settings, window=None), 0.5)


@pytest.mark.parametrize(
    "delay, settings, complaint",
    [
        (-1, DMCSettings(offset=0.0), "delay: expected tokens, or 0 to merge at once, got -1"),
        (16, DMCSettings(), "offset: gates have a bias in its place, got 5.0"),
    ],
)
def merging_by_gates_that_cannot_be_is_refused_test(delay, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        DelayedDMC(some_gates(), delay=delay, settings=settings)


@every_policy
def a_policy_is_what_json_says_of_it_test(policy):
    values = json.loads(json.dumps(to_json(policy)))
    assert values["name"] == policy.name
    if isinstance(policy, Trained):
        assert from_json(values) == policy


def json_of_a_fixed_budget_is_as_in_snapshots_from_before_there_were_others_test():
    assert to_json(TOVA(9)) == {"name": "tova", "budget": 9, "channel_scale": None}


def gates_that_merge_learn_all_that_they_read_test():
    """Training form: relaxed decisions, counted by their probabilities, and their gradients."""
    params, config = model()
    policy = DelayedDMC(some_gates(importance=True, gamma=True), 0.3, delay=3)
    tokens, key = jnp.asarray(some_tokens(length=24)), jax.random.key(0)
    weight = jax.random.normal(jax.random.key(1), (2, 24, 50))

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(policy):
        attend = attend_whole(policy, config, jnp.asarray(positions_of(tokens)), noise_key=key)
        output = Llama(config).apply({"params": params}, tokens, attend=attend)
        counted = sum(record.decisions.sum() for record in output.records)
        return jnp.sum(weight * output.logits) + counted, output.records

    (_, records), gradient = loss(policy)
    decisions = np.concatenate([np.asarray(x.decisions).ravel() for x in records])
    assert ((decisions > 0) & (decisions < 1)).all()
    assert all(set(np.unique(x.appends)) == {0.0, 1.0} for x in records)
    for name, x in vars(gradient.gates).items():
        assert np.isfinite(x).all() and np.abs(x).max() > 1e-3, name
    assert abs(gradient.threshold) > 1e-3
    # The logits and the threshold move together.
    np.testing.assert_allclose(gradient.threshold, -gradient.gates.bias.sum(), rtol=1e-3)
