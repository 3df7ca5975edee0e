"""TOVA, H2O and StreamingLLM against the rules of their papers in plain NumPy, and their memory."""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.rope import rotary_frequencies, rotate
from dmc_jax.inference import scheduler
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.h2o import H2O
from dmc_jax.policies.policy import Where
from dmc_jax.policies.tova import TOVA
from dmc_jax.policies.window import Window
from tests.policies.policy_test import Ids, model
from tests.tiny_llama import build

THETA = 100.0


def allowed(policy, tokens):
    """Slots after so many tokens."""
    if policy.ratio is None:
        return policy.budget
    return max(policy.budget, math.floor(tokens / fractions.Fraction(str(policy.ratio))))


# ---- which of the tokens a KV head keeps makes room for token t, from the paper -----------------


def leaves_tova(policy, t, kept, weights, given):
    """The one with the least attention of the newest query, averaged over heads (section 3.2)."""
    return kept[int(np.argmin(np.mean([w for of_head in weights for w in of_head], axis=0)))]


def leaves_h2o(policy, t, kept, weights, given):
    """The one with the least attention in sum, the newest tokens set aside (sections 4.1, 5.3)."""
    newest = max(1, math.floor(allowed(policy, t + 1) * policy.recent))  # t among them
    return min(kept[: len(kept) - (newest - 1)], key=given.get)


def leaves_window(policy, t, kept, weights, given):
    """The oldest but for the first few (section 3.2)."""
    return kept[policy.sinks]


LEAVES = {TOVA: leaves_tova, H2O: leaves_h2o, Window: leaves_window}


def by_the_paper(policy, q, k, v):
    """Outputs for rotated q [T, N, H], k and v [T, K, H], and what each head kept at each token."""
    (T, N, H), K = q.shape, k.shape[1]
    kept, given, history = [[] for _ in range(K)], [{} for _ in range(K)], []
    out, weights = np.zeros_like(q), None
    for t in range(T):
        before = weights
        weights = []
        for h in range(K):
            if len(kept[h]) == allowed(policy, t + 1):
                kept[h].remove(LEAVES[type(policy)](policy, t, kept[h], before, given[h]))
            kept[h].append(t)
            given[h][t] = 0.0
            scores = np.exp(q[t].reshape(K, N // K, H)[h] @ k[kept[h], h].T / np.sqrt(H))  # [G, S]
            weights.append(scores / scores.sum(axis=1, keepdims=True))
            out[t].reshape(K, N // K, H)[h] = weights[h] @ v[kept[h], h]
            for token, weight in zip(kept[h], weights[h].sum(axis=0), strict=True):
                given[h][token] += weight
        history.append([list(of_head) for of_head in kept])
    return out, history


POLICIES = [
    *(TOVA(budget) for budget in (1, 2, 5, 12, 40)),
    *(H2O(budget) for budget in (1, 5, 12)),
    *(Window(budget, sinks=sinks) for budget, sinks in ((1, 0), (5, 4), (12, 4), (40, 4))),
    TOVA(3, ratio=2.5),
    *(H2O(5, recent=recent) for recent in (0.2, 0.7, 1.0)),
    H2O(4, ratio=2.5),
    H2O(1, ratio=1.3, recent=0.34),
    Window(6, ratio=2.5),
    Window(1, ratio=1.3, sinks=0),
]


def some_tokens(seed, T=24, N=4, K=2, H=8):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(2, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    return 2 * q, k, v


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def whole_sequences_follow_the_rule_of_the_paper_test(policy):
    q, k, v = some_tokens(seed=policy.budget)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    attend = jax.jit(lambda q, k, v: policy.whole(q, k, v, where, x=jnp.zeros((*q.shape[:2], 1))))
    where = Where(positions, None, THETA, None)
    attended = attend(q, k, v)
    frequencies = rotary_frequencies(q.shape[-1], THETA)
    q, k = (np.asarray(rotate(jnp.asarray(x), positions, frequencies), np.float64) for x in (q, k))
    for row in range(2):
        expected, history = by_the_paper(policy, q[row], k[row], v[row])
        np.testing.assert_allclose(attended.out[row], expected, atol=1e-5)
        slots = np.array([[len(kept) for kept in heads] for heads in history])
        np.testing.assert_array_equal(
            attended.record.appends[row], np.diff(slots, axis=0, prepend=0)
        )
        newest_went = [t for t in range(1, len(history)) if t - 1 not in history[t][0]]
        assert policy != TOVA(5) or newest_went, "the rule for the newest token was not tried"
        differ = [t for t, (one, other) in enumerate(history) if one != other]
        assert policy != H2O(12) or differ, "no two heads kept different tokens"


# ---- how much that is ---------------------------------------------------------------------------


def a_budget_grows_with_the_text_but_never_falls_below_its_least_test():
    policy = TOVA(3, ratio=2.5)
    after = [int(policy.slots_after(jnp.asarray(t))) for t in range(16)]
    assert after == [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6]
    assert [policy.most_slots(t) for t in range(16)] == after
    fixed = [int(TOVA(3).slots_after(jnp.asarray(t))) for t in (2, 3, 100)]
    assert fixed == [TOVA(3).most_slots(t) for t in (2, 3, 100)] == [2, 3, 3]


@pytest.mark.parametrize("ratio", [1, 1.1, 1.883, 3, 3.7, 64.5, 999_999.0])
def a_ratio_is_that_of_whole_numbers_in_every_program_test(ratio):
    policy, tokens = H2O(1, ratio=ratio), np.array([*range(1000), 1_000_000, 2_000_000])
    exact = [max(1, math.floor(t / fractions.Fraction(str(ratio)))) if t else 0 for t in tokens]
    after = jax.jit(policy.slots_after)(jnp.asarray(tokens))
    np.testing.assert_array_equal(after, exact)
    assert [policy.most_slots(int(t)) for t in tokens] == exact


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [TOVA(11), H2O(16), Window(11), H2O(8, ratio=4.0), Window(8, ratio=2.5)], ids=str
)
def no_row_ever_takes_more_bytes_than_its_budget_test(policy):
    params, config = model()
    engine = Engine(
        *(params, config, Ids()),
        policy=policy,
        max_sequences=2,
        pages=10_000,
        page_size=8,
        max_length=128,
    )
    page_bytes = 2 * 8 * config.head_dim * 4
    # More pages than all rows may fill are not even allocated.
    assert engine.free_pages == 2 * config.kv_rows * math.ceil(allowed(policy, 128) / 8)
    results = engine.generate([[1, *range(3, 40)], [1, 7]], SamplingParams(60, temperature=0.0))
    for result in results:
        assert result.new_tokens == 60 and result.finish_reason == "length"
        read = result.prompt_tokens + result.new_tokens - 1
        slots = allowed(policy, read)
        assert result.live_cache_bytes == config.kv_rows * math.ceil(slots / 8) * page_bytes
        assert result.ratio == pytest.approx(read / slots)


@pytest.mark.parametrize(
    "policy", [H2O(4, ratio=2.0), pytest.param(Window(6, ratio=2.0), marks=pytest.mark.slow)]
)
def what_rows_remember_of_every_slot_goes_along_where_there_is_room_for_more_test(
    policy, monkeypatch
):
    """Cut or filled up, in an engine whose sequences become longer, and in another engine."""

    def engine(room):
        monkeypatch.setattr(scheduler, "_ROOM", room)
        options = {"max_sequences": 1, "pages": 99, "page_size": 8, "max_length": 64}
        return Engine(*build(layers=1), Ids(), policy=policy, **options)

    def begun(engine, new_tokens):
        """A snapshot after some tokens of a sequence that goes on."""
        sequence = engine.submit(prompt, SamplingParams(new_tokens, temperature=0.0))
        while len(engine.snapshot(sequence).tokens) < 6:
            engine.step()
        return engine.snapshot(sequence)

    def rest(engine, snapshot):
        *_, last = engine.stream(engine.resume(snapshot, params))
        return last.result.tokens

    prompt, params = [1, *range(3, 14)], SamplingParams(24, temperature=0.0)
    roomy, narrow = engine(64), engine(32)
    [expected] = roomy.generate([prompt], params)
    of_few = begun(narrow, 12)
    assert rest(roomy, of_few) == expected.tokens  # filled up
    assert rest(narrow, of_few) == expected.tokens  # became wider; the first sequence runs on
    assert rest(engine(32), begun(roomy, 24)) == expected.tokens  # cut, and widened
