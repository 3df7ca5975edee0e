"""Drafts change how fast a sequence says something, and never what, nor what its rows hold."""

import jax
import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference import layers, paged_cache, scheduler, trial
from dmc_jax.inference.drafts import look_up
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.model.llama import unstack_layers
from dmc_jax.policies.choice import POLICIES
from tests.inference.branching_test import (
    QUICK,
    assert_same_cache,
    every,
    run_until,
    said,
    some_tokens,
)
from tests.policies.policy_test import TABLE, Ids
from tests.tiny_llama import build

ROWS = 4
TRIES = {name: policy for name, policy in TABLE.items() if policy.chunked}
DRAFT = 5


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def build_engine(model):
    """Of equal sizes wherever possible: other ones compile anew."""
    sizes = {"max_sequences": 2, "pages": 200, "page_size": 8, "chunk": 64, "max_length": 128}

    def engine(policy=TRIES[QUICK], **changes):
        return Engine(*model, Ids(), policy=policy, **sizes | changes)

    return engine


def prompts_that_repeat(count):
    return [[1, *2 * some_tokens(5 + 4 * i, seed=i)] for i in range(count)]


def greedy(new=40, **changes):
    return SamplingParams(new, temperature=0.0, **changes)


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([5, 6, 7, 8, 5, 6, 7], [8, 5, 6, 7]),
        ([5, 6, 7, 8, 9, 5, 6, 7, 4, 3, 2, 1, 5, 6, 7], [4, 3, 2, 1]),  # the latest place
        ([5, 6, 7, 8, 4, 6, 7, 9, 5, 6, 7], [8, 4, 6, 7]),  # three tokens before two
        ([5, 6, 7, 8, 4, 6, 7], [8, 4, 6, 7]),
        ([6, 6, 6], [6]),
        ([5, 6, 7, 8, 9], []),
        ([5, 5], []),
        ([], []),
    ],
)
def a_draft_is_what_followed_the_newest_tokens_before_test(tokens, draft):
    assert look_up(tokens, 4) == draft
    assert look_up(tokens, 1) == draft[:1]
    assert look_up(tokens, 0) == []


@every(TRIES)
def a_sequence_says_and_holds_what_it_would_without_drafts_test(build_engine, policy, monkeypatch):
    """Its likeliest tokens, and drawn ones, whether drafts are right, wrong or both."""
    plain, engine = build_engine(policy), build_engine(policy, prompt_lookup=DRAFT)
    prompts, rng = prompts_that_repeat(2), np.random.default_rng(0)
    drawn = {"temperature": 0.3, "seed": 3, "repetition_penalty": 1.1, "logprobs": 2}
    params = [greedy(38, logprobs=0, repetition_penalty=1.2), SamplingParams(40, **drawn)]
    expected = plain.generate(prompts, params)

    def some_right(tokens, most):
        [said] = (
            [*prompt, *result.tokens]
            for prompt, result in zip(prompts, expected, strict=True)
            if tuple(prompt) == tokens[: len(prompt)]
        )
        draft = said[len(tokens) :][: rng.integers(0, most + 1)]
        wrong = rng.integers(0, 2 * DRAFT)
        return [49 - token if n == wrong else token for n, token in enumerate(draft)]

    monkeypatch.setattr(scheduler, "look_up", some_right)
    results = engine.generate(prompts, params)
    assert said(results) == said(expected)
    for one, other in zip(results, expected, strict=True):
        assert (one.ratio, one.live_cache_bytes) == (other.ratio, other.live_cache_bytes)
        assert 10 < one.accepted_tokens < one.drafted_tokens and not other.drafted_tokens
    for one, other in zip(results[1].logprobs, expected[1].logprobs, strict=True):
        likely = ([p for _, p in each.likely] for each in (one, other))
        np.testing.assert_allclose(*likely, atol=1e-5)
        np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)

    sequence = engine.submit(prompts[0], params[0])
    has = run_until(engine, sequence, 25)
    other = plain.submit(prompts[0], params[0])
    run_until(plain, other, has)
    assert_same_cache(*(a.snapshot(b).rows for a, b in ((engine, sequence), (plain, other))))


def a_draft_saves_steps_test(build_engine):
    """Of a sequence that says one thing over and over."""
    engine, prompt = build_engine(prompt_lookup=DRAFT), prompts_that_repeat(1)[0]
    [result] = engine.generate([prompt], greedy(80))
    sequence, steps = engine.submit(prompt, greedy(80)), 0
    while engine.unfinished:
        engine.step()
        steps += 1
    assert sequence == 1 and result.accepted_tokens > 20
    assert steps == 80 - 1 - result.accepted_tokens


@pytest.mark.parametrize("kind", ["token", "text", "length"])
def what_ends_a_sequence_within_a_draft_ends_it_there_test(build_engine, kind, monkeypatch):
    prompt = prompts_that_repeat(1)[0]
    plain, engine = (build_engine(prompt_lookup=n) for n in (0, DRAFT))
    tokens = plain.generate([prompt], greedy(60))[0].tokens
    known = [*prompt, *tokens]
    monkeypatch.setattr(scheduler, "look_up", lambda said, most: known[len(said) :][:most])
    accepted = 0
    for new in range(30, 36):  # most of them within a draft
        ends = {
            "token": greedy(60, stop_token_ids=(tokens[new],)),
            "text": greedy(60, stop=(Ids().decode(tokens[new - 1 : new + 1]),)),
            "length": greedy(new),
        }
        [expected], [result] = (one.generate([prompt], ends[kind]) for one in (plain, engine))
        for field in ("tokens", "text", "finish_reason", "ratio"):
            assert getattr(result, field) == getattr(expected, field)
        accepted += result.accepted_tokens
    assert accepted > 0


@pytest.mark.slow
def others_go_on_from_all_that_a_sequence_has_and_from_no_more_test(build_engine, monkeypatch):
    prompt = prompts_that_repeat(1)[0]
    plain, engine = (build_engine(prefix_cache=True, prompt_lookup=n) for n in (0, DRAFT))
    tokens = plain.generate([prompt], greedy(60))[0].tokens
    known = [*prompt, *tokens]
    monkeypatch.setattr(scheduler, "look_up", lambda said, most: known[len(said) :][:most])
    for new in range(30, 36):  # one of them within a draft
        ends = greedy(60, stop_token_ids=(tokens[new],))
        [expected], [result] = (one.generate([prompt], ends) for one in (plain, engine))
        longer = [[*prompt, *result.tokens, 7, 8]]
        [expected], [result] = (one.generate(longer, greedy(9)) for one in (plain, engine))
        assert (result.tokens, result.cached_tokens) == (expected.tokens, expected.cached_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", [QUICK, "dense", "dmc, window 12"])
def pages_of_fewer_bits_make_no_difference_to_drafts_or_prefixes_test(build_engine, name, kv_dtype):
    plain, drafting, sharing = (
        build_engine(TRIES[name], kv_dtype=kv_dtype, **how)
        for how in ({}, {"prompt_lookup": DRAFT}, {"prefix_cache": True})
    )
    first = [1, *some_tokens(69)]
    for prompt in (first, [*first[:40], *some_tokens(9, seed=2)], first):
        [expected], [drafted], [shared] = (
            engine.generate([prompt], greedy()) for engine in (plain, drafting, sharing)
        )
        assert drafted.tokens == shared.tokens == expected.tokens
        assert drafted.ratio == shared.ratio == expected.ratio
        assert drafted.accepted_tokens > 0
    assert shared.cached_tokens >= 40


@pytest.mark.slow
def where_there_are_few_pages_there_are_no_drafts_test(build_engine, monkeypatch):
    """Sequences wait, give their pages back and say what they would alone."""
    params = [greedy(30 + 3 * i) for i in range(4)]
    prompts = prompts_that_repeat(4)
    alone = build_engine()
    expected = [alone.generate([x], one)[0] for x, one in zip(prompts, params, strict=True)]
    tried, sent_away = [], []
    try_drafts, requeue = scheduler.try_drafts, scheduler.Scheduler._requeue
    monkeypatch.setattr(
        scheduler, "try_drafts", lambda *args, **how: (tried.append(1), try_drafts(*args, **how))[1]
    )
    monkeypatch.setattr(
        scheduler.Scheduler, "_requeue", lambda *args: (sent_away.append(1), requeue(*args))[1]
    )
    engine = build_engine(pages=9 * ROWS, prompt_lookup=DRAFT)
    results = engine.generate(prompts, params)
    assert said(results) == said(expected)
    assert tried and sent_away
    assert engine.free_pages == 9 * ROWS


@pytest.mark.slow
def a_way_back_stays_short_test(build_engine):
    """States are kept at every 32 tokens, which no draft passes by."""
    prompt, params = prompts_that_repeat(1)[0], greedy(80)
    engine = build_engine(rollback=40, prompt_lookup=DRAFT)
    [expected] = build_engine().generate([prompt], params)
    sequence = engine.submit(prompt, params)
    has = run_until(engine, sequence, 70)
    kept = {len(prefix.tokens) for prefix in engine._scheduler._prefixes._kept.values()}
    assert 64 in kept
    engine.truncate(sequence, len(prompt) + has - 10)
    [end] = [event.result for event in engine.stream(sequence) if event.finish_reason]
    assert end.tokens == expected.tokens


def a_policy_that_reads_token_by_token_and_no_length_are_refused_test(build_engine):
    refused = {policy.name: policy for policy in TABLE.values() if not policy.chunked}
    assert set(refused) == {"tova", "h2o"}
    assert set(refused) | {policy.name for policy in TRIES.values()} == set(POLICIES)
    for name, policy in refused.items():
        with pytest.raises(UserError, match=f"prompt_lookup: policy {name} reads a token at a"):
            build_engine(policy, prompt_lookup=3)
    with pytest.raises(UserError, match="prompt_lookup: expected tokens of a draft, or 0"):
        build_engine(prompt_lookup=-1)


@pytest.mark.parametrize("name", [QUICK, pytest.param("dmc, window 12", marks=pytest.mark.slow)])
def a_trial_copies_no_pages_test(model, name):
    """Neither the pass, which reads them, nor the cache as it reads what counts."""
    (params, config), policy = model, TRIES[name]
    sizes = {"seats": 3, "pages": 40_000, "page_size": 8, "max_length": 128, "dtype": "float32"}
    cache = jax.eval_shape(lambda: paged_cache.init(config, policy, **sizes))
    few = np.arange(2)
    inputs = {"policy": policy, "counts": few, "seats": few}
    shapes = (config.layers, 2, 6, 8 * 16 + 32), (2, 6, config.width)
    tried, x = (jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)
    how = {"config": config, "kv_heads": config.kv_heads}
    programs = [
        layers._run_layer.lower(
            *(unstack_layers(params, config, "float32")["layer_0"], None, np.int32(0)),
            *(x, (cache, tried), inputs),
            **how,
            make_attend=trial._attend_tried,
        ),
        trial._take_layer.lower(cache, tried, np.int32(0), few, few, policy, **how),
    ]
    for program in programs:
        taken = program.compile().memory_analysis().temp_size_in_bytes
        assert taken < 0.1 * cache.pages.nbytes
