"""What a sequence shares with others, or takes back, changes nothing of what it gets."""

import jax
import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference import programs
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.prefix_cache import PrefixCache
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.choice import POLICIES
from tests.policies.policy_test import TABLE, Ids
from tests.tiny_llama import build

PAGE, ROWS = 8, 4  # of the model
FEW = 40 * ROWS  # pages
TOLERANCE = 2e-5  # of keys and values of size 1
BRANCHES = {name: policy for name, policy in TABLE.items() if policy.branches}
QUICK = "dms, delay 5"


def every(policies):
    """All of them, but for one by `make test-all` only."""
    return pytest.mark.parametrize(
        "policy",
        [
            pytest.param(policy, id=name, marks=[] if name == QUICK else pytest.mark.slow)
            for name, policy in policies.items()
        ],
    )


every_policy = every(BRANCHES)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def build_engine(model):
    """Of equal sizes wherever possible: other ones compile anew."""
    sizes = {"max_sequences": 4, "pages": FEW, "page_size": PAGE, "chunk": 64, "max_length": 128}

    def engine(policy=BRANCHES[QUICK], **changes):
        return Engine(*model, Ids(), policy=policy, **sizes | changes)

    return engine


def some_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, 50, count).tolist()


def greedy(new=12, **changes):
    return SamplingParams(new, temperature=0.0, **changes)


def alone(engine, prompts, params):
    return [engine.generate([x], one)[0] for x, one in zip(prompts, params, strict=True)]


def said(results):
    return [result.tokens for result in results]


def what_is_in_the_cache(rows, page=PAGE):
    """Slot by slot, and what is remembered beside them."""
    held = -(-rows.lengths // page)
    begins = np.concatenate([[0], np.cumsum(held)[:-1]])
    live = [np.arange(n) for n in rows.lengths]
    at = np.concatenate([begin * page + slots for begin, slots in zip(begins, live, strict=True)])
    slots = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[at.astype(int)], rows.pages)
    return slots, dict(rows.state)


def assert_same_cache(one, other):
    np.testing.assert_array_equal(one.lengths, other.lengths)
    assert one.position == other.position
    same = (what_is_in_the_cache(rows) for rows in (one, other))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=0), *same)


def pages_left_once_nothing_is_kept(engine, shared=0):
    engine._scheduler._spare(np.inf)
    free = engine.free_pages
    assert np.asarray(engine._scheduler._batch.cache.references).sum() == shared
    return free


def run_until(engine, sequence, tokens):
    has = 0
    while has < tokens:
        has += sum(len(event.tokens) for event in engine.step() if event.sequence == sequence)
    return has


def all_tokens_read(monkeypatch):
    """How many were in the passes so far, in a list of one number."""
    total, read = [0], programs.read_prompts

    def counted(params, config, batch, parts, *, chunk, **options):
        total[0] += sum(request.part_end(begin, chunk) - begin for request, begin in parts)
        return read(params, config, batch, parts, chunk=chunk, **options)

    monkeypatch.setattr(programs, "read_prompts", counted)
    return total


# ---- prompts that begin alike -----------------------------------------------------------------


@every_policy
def a_prompt_that_begins_like_another_gets_what_it_would_get_alone_test(build_engine, policy):
    """Text and cache."""
    first = [1, *some_tokens(69)]
    engine = build_engine(policy, prefix_cache=True)
    free, fresh = engine.free_pages, build_engine(policy)
    [told] = engine.generate([first], greedy())
    read = [*first, *told.tokens[:-1]]
    prompts = {
        64: first,  # a chunk's end
        len(read): [*read, *some_tokens(9, seed=1)],  # a sequence's
        40: [*first[:40], *some_tokens(9, seed=2)],  # where two went different ways
    }
    for common, prompt in prompts.items():
        [expected] = fresh.generate([prompt], greedy())
        for _ in range(2):
            [result] = engine.generate([prompt], greedy())
            assert (result.tokens, result.ratio) == (expected.tokens, expected.ratio)
            assert result.live_cache_bytes == expected.live_cache_bytes
        assert (expected.cached_tokens, result.cached_tokens) == (0, common)
        sequences = [one.submit(prompt, greedy(30)) for one in (engine, fresh)]
        both = list(zip((engine, fresh), sequences, strict=True))
        for one, sequence in both:
            run_until(one, sequence, 7)
        assert_same_cache(*(one.snapshot(sequence).rows for one, sequence in both))
        for one, sequence in both:
            one.cancel(sequence)
            one.step()
    assert engine.free_pages < free
    assert pages_left_once_nothing_is_kept(engine) == free


def a_beginning_in_common_is_read_once_where_prompts_come_together_test(build_engine, monkeypatch):
    system = [1, *some_tokens(50)]
    prompts = [[*system, *some_tokens(4 + i, seed=i)] for i in range(3)]
    prompts += [[*prompts[0][:53], *some_tokens(5, seed=9)]]  # goes on alike for 2 tokens more
    params = [greedy()] * len(prompts)
    expected = alone(build_engine(), prompts, params)
    total = all_tokens_read(monkeypatch)
    results = build_engine(prefix_cache=True).generate(prompts, params)
    assert said(results) == said(expected)
    assert total[0] == len(system) + sum(len(prompt) - len(system) for prompt in prompts)
    assert [result.cached_tokens for result in results] == [0] + 3 * [len(system)]


def what_is_kept_gives_way_to_who_runs_and_nothing_leaks_test(build_engine, monkeypatch):
    """Sequences wait, give their pages back and are cancelled."""
    rng, evict, evicted = np.random.default_rng(0), PrefixCache.evict, []
    beginnings = [[1, *some_tokens(n, seed=n)] for n in (35, 50)]
    prompts = [[*beginnings[i % 2], *some_tokens(1 + i % 7, seed=i)] for i in range(16)]
    params = [SamplingParams(1 + 4 * i, temperature=0.7 * (i % 2), seed=i) for i in range(16)]
    expected = alone(build_engine(), prompts, params)
    monkeypatch.setattr(PrefixCache, "evict", lambda *args: (evicted.append(1), evict(*args))[1])
    engine = build_engine(rollback=40)
    ids = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    results = {}
    while len(results) < len(ids):
        for event in engine.step():
            if event.finish_reason:
                results[event.sequence] = event.result
        if engine.unfinished and rng.random() < 0.1:
            engine.cancel(int(rng.choice(engine.unfinished)))
    reasons = [results[one].finish_reason for one in ids]
    assert set(reasons) == {"length", "cancelled"} and len(evicted) > 10
    assert sum(results[one].cached_tokens > 0 for one in ids) > 5
    for one, alike in zip(ids, expected, strict=True):
        assert results[one].tokens == alike.tokens[: results[one].new_tokens]
        if results[one].finish_reason == "length":
            assert results[one].tokens == alike.tokens
    assert pages_left_once_nothing_is_kept(engine) == FEW


def pages_in_common_are_there_once_test(build_engine):
    """So there is room for four sequences where three would fill the pool."""
    system, nothing_dropped = [1, *some_tokens(95)], {"threshold": 1e3}
    engine = build_engine(prefix_cache=True)
    engine.generate([[*system, 9]], greedy(1, **nothing_dropped))
    for last in range(4):
        engine.submit([*system, 3 + last], greedy(9, **nothing_dropped))
    events = [event for _ in range(3) for event in engine.step()]
    assert {event.sequence for event in events} == set(engine.running)
    assert len(engine.running) == 4
    pages = engine._scheduler.tally().pages
    assert sum(pages) == 4 * 13 * ROWS > FEW
    left = pages_left_once_nothing_is_kept(engine, shared=3 * 12 * ROWS)
    assert left == FEW - (12 + 4) * ROWS


def sequences_of_another_threshold_share_nothing_test(build_engine):
    engine, prompt = build_engine(prefix_cache=True), [1, *some_tokens(70)]
    params = [greedy(), greedy(threshold=-1.0), greedy(threshold=0.2)]  # which is the engine's
    results = [engine.generate([prompt], one)[0] for one in params]
    assert [result.cached_tokens for result in results] == [0, 0, 64]
    assert said(results) == said(alone(build_engine(), [prompt] * 3, params))


@pytest.mark.slow
def who_goes_on_by_another_threshold_than_it_was_read_by_is_not_kept_test(build_engine):
    engine, prompt = build_engine(prefix_cache=True), [1, *some_tokens(70)]
    sequence = engine.submit(prompt, greedy(threshold=0.9))
    run_until(engine, sequence, 2)
    for _ in engine.stream(engine.fork(sequence, greedy(20, threshold=-0.5))):
        pass
    [result] = engine.generate([prompt], greedy(threshold=-0.5))
    assert result.cached_tokens == 0


def an_interrupted_engine_knows_nothing_any_more_and_goes_on_test(build_engine, monkeypatch):
    engine, prompt = build_engine(prefix_cache=True), [1, *some_tokens(70)]
    free = engine.free_pages
    [expected] = engine.generate([prompt], greedy())
    sequence = engine.submit(prompt, greedy())

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(programs, "next_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert engine.free_pages == free
    assert result_of(engine, sequence).tokens == expected.tokens


@pytest.mark.parametrize("options", [{"prefix_cache": True}, {"rollback": 8}])
def a_policy_whose_caches_do_not_branch_is_refused_test(build_engine, options):
    refused = {policy.name: policy for policy in TABLE.values() if not policy.branches}
    assert set(refused) == {"tova", "h2o", "window", "snapkv"}
    assert set(refused) | {policy.name for policy in BRANCHES.values()} == set(POLICIES)
    for name, policy in refused.items():
        with pytest.raises(UserError, match=f"prefix_cache, rollback: policy {name} writes over"):
            build_engine(policy, **options)


# ---- a way back -------------------------------------------------------------------------------


def result_of(engine, sequence):
    [end] = [event.result for event in engine.stream(sequence) if event.finish_reason]
    return end


@every_policy
def a_sequence_that_goes_back_is_one_that_never_went_further_test(
    build_engine, policy, monkeypatch
):
    """In what it says from there, as before or in another way, and in what it holds."""
    prompt, params = [1, *some_tokens(40)], SamplingParams(60, seed=3)
    engine, fresh = build_engine(policy, rollback=40), build_engine(policy)
    free = engine.free_pages
    [expected] = fresh.generate([prompt], params)
    total = all_tokens_read(monkeypatch)
    # After a state was kept, before, right there, and in the prompt.
    for keeps in (len(prompt) + 33, len(prompt) + 16, 64, 65, len(prompt) - 4):
        sequence = engine.submit(prompt, params)
        run_until(engine, sequence, 45 if keeps > 60 else 30)
        known, read = [*prompt, *expected.tokens][:keeps], total[0]
        engine.truncate(sequence, keeps, greedy(max(0, keeps - len(prompt)) + 20))
        other = fresh.submit(known, greedy(20))
        both = (engine, sequence), (fresh, other)
        for one, number in both:
            run_until(one, number, 4)
        again = total[0] - read - keeps  # without those of the fresh one
        assert again <= (32 if keeps > len(prompt) else 64)
        assert_same_cache(*(one.snapshot(number).rows for one, number in both))
        assert result_of(engine, sequence).tokens[-20:] == result_of(fresh, other).tokens
    assert pages_left_once_nothing_is_kept(engine) == free


def whoever_goes_back_says_the_same_again_and_harms_nobody_test(build_engine):
    prompt, params = [1, *some_tokens(40)], SamplingParams(40, seed=5)
    engine = build_engine(rollback=40)
    [expected] = engine.generate([prompt], params)
    ids = [engine.submit(prompt, params) for _ in range(5)]  # one of which waits
    run_until(engine, ids[0], 20)
    for sequence in ids:
        engine.truncate(sequence, len(prompt))
    engine.step()
    engine.truncate(ids[0], len(prompt) + 1)
    fork = engine.fork(ids[0])
    results = {}
    while engine.unfinished:
        results |= {event.sequence: event.result for event in engine.step()}
    assert {results[one].tokens for one in (*ids, fork)} == {expected.tokens}


def a_way_back_that_there_is_not_is_refused_test(build_engine):
    engine, prompt = build_engine(rollback=8), [1, *some_tokens(20)]
    sequence = engine.submit(prompt, greedy(30))
    has = len(prompt) + run_until(engine, sequence, 12)
    for tokens, complaint in (
        (has - 9, "9 tokens are to be taken back, this engine's rollback is 8"),
        (has + 1, f"has {has} tokens, cannot keep {has + 1}"),
        (0, "cannot keep 0"),
    ):
        with pytest.raises(UserError, match=complaint):
            engine.truncate(sequence, tokens)
    with pytest.raises(UserError, match="cannot be resumed: its SamplingParams"):
        engine.truncate(sequence, has - 2, greedy(3))
    with pytest.raises(UserError, match="no sequence 7 to truncate"):
        engine.truncate(7, 1)
    with pytest.raises(UserError, match="rollback: expected tokens, or 0 for none, got -1"):
        build_engine(rollback=-1)
    plain = build_engine()
    sequence = plain.submit(prompt, greedy(30))
    with pytest.raises(UserError, match="this engine's rollback is 0"):
        plain.truncate(sequence, 1)


def a_sequence_that_goes_on_keeps_only_what_its_way_back_needs_test(build_engine):
    engine = build_engine(rollback=20)
    engine.submit([1, *some_tokens(4)], greedy(120))
    kept = []
    for _ in range(118):
        engine.step()
        kept.append(len(engine._scheduler._prefixes))
    assert max(kept) == 2 and kept[-1] == 2  # the states at 64 and 96 of 123 tokens
