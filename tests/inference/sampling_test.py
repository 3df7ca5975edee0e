"""Tokens are drawn by the definitions, alone as in company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference import sampling
from dmc_jax.inference.sampling import SamplingParams, sample, stack_params, token_keys

V = 40
DRAWS = 400

# Different numbers in one batch: no limit, each alone, all together, greedy.
PARAMS = (
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.5, top_k=5, seed=2),
    SamplingParams(temperature=1.5, top_p=0.7, seed=3),
    SamplingParams(temperature=1.0, min_p=0.2, seed=4),
    SamplingParams(temperature=1.0, repetition_penalty=3.0, seed=2**32 - 1),
    SamplingParams(
        temperature=1.2, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.5, seed=6
    ),
    SamplingParams(temperature=0.0, repetition_penalty=2.0, seed=7),
    SamplingParams(temperature=1.0, top_k=1000, top_p=1e-6, seed=8),
)
B = len(PARAMS)


def probabilities(logits, params, seen):
    """Of every token, one after the other as the definitions say."""
    logits = np.array(logits, np.float64)
    for token in np.flatnonzero(seen):
        r = params.repetition_penalty
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    if params.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    weights = np.exp(logits / params.temperature - np.max(logits / params.temperature))
    likely = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    kept = likely[: params.top_k] if params.top_k else likely
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if params.top_p < 1 and mass >= params.top_p and nucleus:
            break
        nucleus.append(token)
        mass += weights[token] / total
    kept = [token for token in nucleus if weights[token] >= params.min_p * weights[likely[0]]]
    result = np.zeros(len(logits))
    result[kept] = weights[kept]
    return result / result.sum()


def some_logits(seed=0, batch=B):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 2, (batch, V)).astype(np.float32), rng.random((batch, V)) < 0.3


@jax.jit
def draw(logits, params, index, seen):
    return sample(logits, params, token_keys(params.seed, index), seen)


def draws_follow_the_definitions_test():
    logits, seen = some_logits()
    arrays = stack_params(PARAMS)
    drawn = jax.jit(jax.vmap(lambda n: draw(logits, arrays, n + np.zeros(B, np.int32), seen)))(
        np.arange(DRAWS, dtype=np.int32)
    )
    for row, params in enumerate(PARAMS):
        expected = probabilities(logits[row], params, seen[row])
        counts = np.bincount(np.asarray(drawn)[:, row], minlength=V)
        assert counts[expected == 0].sum() == 0, params
        error = np.abs(counts / DRAWS - expected)
        assert (error <= 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-6).all(), params


def what_is_kept_is_what_the_definitions_keep_test():
    arrays = stack_params(PARAMS)
    for seed in range(20):
        logits, _ = some_logits(seed)
        nothing = np.zeros(V, bool)
        scaled = logits / np.array([params.temperature or 1.0 for params in PARAMS])[:, None]
        kept = np.asarray(sampling._kept(jnp.float32(scaled), arrays))
        for row, params in enumerate(PARAMS):
            if params.temperature:
                expected = probabilities(scaled[row] * params.temperature, params, nothing) > 0
                np.testing.assert_array_equal(kept[row], expected, err_msg=str(params))


def equal_logits_are_ranked_by_id_test():
    """So that top-k keeps k tokens whatever ties."""
    kept = sampling._kept(jnp.zeros((1, 6)), stack_params([SamplingParams(top_k=2)]))
    assert kept[0].tolist() == [True, True, False, False, False, False]
    greedy = stack_params([SamplingParams(temperature=0.0)])
    assert (
        draw(np.zeros((1, V), np.float32), greedy, np.zeros(1, np.int32), np.zeros((1, V), bool))[0]
        == 0
    )


def who_shares_the_batch_does_not_matter_test():
    logits, seen = some_logits()
    index = np.arange(B, dtype=np.int32) * 7
    together = draw(logits, stack_params(PARAMS), index, seen)
    order = np.random.default_rng(1).permutation(B)
    shuffled = draw(
        logits[order], stack_params([PARAMS[row] for row in order]), index[order], seen[order]
    )
    np.testing.assert_array_equal(np.asarray(together)[order], shuffled)
    for row, params in enumerate(PARAMS):
        one = slice(row, row + 1)
        alone = draw(logits[one], stack_params([params]), index[one], seen[one])
        assert alone[0] == together[row]


def seed_and_index_make_the_draw_test():
    def drawn(seed, index):
        logits = np.zeros((1, V), np.float32)
        arrays = stack_params([SamplingParams(temperature=1.0, seed=seed)])
        return int(draw(logits, arrays, np.array([index], np.int32), np.zeros((1, V), bool))[0])

    first = [drawn(3, index) for index in range(12)]
    assert first == [drawn(3, index) for index in range(12)]
    assert len(set(first)) > 4
    assert first != [drawn(4, index) for index in range(12)]


def only_what_no_sequence_asked_for_before_compiles_again_test():
    logits, seen = some_logits()
    index = np.zeros(B, np.int32)

    def compiled(params):
        before = draw._cache_size()
        draw(logits, stack_params(params), index, seen)
        return draw._cache_size() - before

    compiled(PARAMS)
    assert compiled([SamplingParams(top_k=3, seed=9)] * B) == 0
    compiled([SamplingParams(temperature=1.0)] * B)
    assert compiled([SamplingParams(temperature=0.3, repetition_penalty=2.0)] * B) == 0
    compiled([SamplingParams(temperature=0.0)] * B)
    # A limit without a temperature above 0 is none.
    assert compiled([SamplingParams(temperature=0.0, top_k=3)] * B) == 0


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1 or more, got 0"),
        ({"temperature": -0.1}, "temperature: expected 0"),
        ({"temperature": float("nan")}, "temperature: expected 0"),
        ({"temperature": float("inf")}, "temperature: expected 0"),
        ({"top_k": -1}, "top_k: expected 0"),
        ({"top_p": 0.0}, "top_p: expected a probability above 0"),
        ({"top_p": 1.1}, "top_p: expected"),
        ({"min_p": 1.5}, "min_p: expected"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected more than 0"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"seed": 2**32}, "seed: expected 0 to"),
        ({"stop": "end"}, 'stop: expected a list of texts, .* got "end"'),
        ({"stop": ("a", "")}, r'stop: expected a list of texts, none empty, .* got \["a", ""\]'),
        ({"stop": [3]}, "stop: expected a list of texts"),
        ({"stop_token_ids": 3}, "stop_token_ids: expected a list of token ids, got 3"),
        ({"stop_token_ids": ["</s>"]}, r'a list of token ids, got \["</s>"\]'),
        ({"stop_token_ids": [True]}, r"a list of token ids, got \[true\]"),
        ({"stop_token_ids": [2.0]}, r"a list of token ids, got \[2.0\]"),
        ({"max_new_tokens": 2.5}, "max_new_tokens: expected a whole number, got 2.5"),
        ({"max_new_tokens": True}, "max_new_tokens: expected a whole number, got true"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens: expected a whole number, got NaN"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"seed": "1"}, 'seed: expected a whole number, got "1"'),
        ({"top_k": None}, "top_k: expected a whole number, got null"),
        ({"temperature": "0.5"}, 'temperature: expected a number, got "0.5"'),
        ({"top_p": False}, "top_p: expected a number, got false"),
        ({"min_p": [0.1]}, r"min_p: expected a number, got \[0.1\]"),
        ({"stop": "x" * 10_000}, "x{70,80}"),
    ],
)
@pytest.mark.usefixtures("annotations_aside")
def bad_numbers_are_refused_test(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        SamplingParams(**changes)


def lists_of_json_and_numbers_of_numpy_are_as_good_test():
    params = SamplingParams(stop=["a"], stop_token_ids=[3], temperature=1, seed=np.int64(4))
    assert params == SamplingParams(stop=("a",), stop_token_ids=(3,), temperature=1.0, seed=4)
    assert hash(params)


@pytest.mark.parametrize(
    "asked, complaint",
    [
        ({"ratio": 0.5}, "ratio: expected tokens per slot, 1 or more, got 0.5"),
        ({"ratio": float("nan")}, "ratio: .* got NaN"),
        ({"ratio": "2"}, 'ratio: .* got "2"'),
        ({"threshold": float("nan")}, "threshold: expected a logit, .* got NaN"),
        ({"threshold": True}, "threshold: .* got true"),
        ({"ratio": 2.0, "threshold": 0.0}, "ratio: a threshold is looked up for it"),
    ],
)
@pytest.mark.usefixtures("annotations_aside")
def how_much_to_compress_is_one_number_test(asked, complaint):
    with pytest.raises(UserError, match=complaint):
        SamplingParams(**asked)
