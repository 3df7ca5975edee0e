"""A known answer is as likely as the cache makes it, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.gates import Gates
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.inference import paged_cache
from dmc_jax.inference.decoding import decode_step
from dmc_jax.inference.prefill import prefill
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dms import DMS
from dmc_jax.policies.snapkv import SnapKV
from dmc_jax.policies.tova import TOVA
from tests.tiny_llama import build

PARAMS, CONFIG = build()
PARAMS = jax.tree.map(jnp.asarray, PARAMS)
PROMPTS = [[1, *range(3, 40)], [1, 7, 9, 7, 9, 7], [1, *range(45, 5, -2)]]
ANSWERS = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]


def some_gates():
    rng = np.random.default_rng(3)
    shapes = {"mean": (2, 32), "deviation": (2, 32), "weight": (4, 32), "bias": (4,)}
    return Gates(
        **{name: jnp.asarray(rng.uniform(0.1, 1, shape), "f4") for name, shape in shapes.items()}
    )


POLICIES = {
    "dms": DMS(some_gates(), 0.0, delay=4),
    "tova": TOVA(5, ratio=3.0),
    "snapkv": SnapKV(5, ratio=3.0, observers=4),
}


read_token = jax.jit(decode_step, static_argnames="config")


def by_the_cache(prompt, answer, policy):
    sizes = {"seats": 1, "pages": 64, "page_size": 8, "max_length": 64}
    cache = paged_cache.init(CONFIG, policy, dtype=jnp.float32, **sizes)
    cache, logits = prefill(PARAMS, CONFIG, cache, [prompt], [0], policy=policy)
    nats, first = [], []
    for token in answer:
        nats.append(-jax.nn.log_softmax(logits[0])[token])
        first.append(int(jnp.argmax(logits[0])) == token)
        cache, logits = read_token(
            *(PARAMS, CONFIG, cache, jnp.array([token]), jnp.array([True])), policy=policy
        )
    return np.array(nats), np.array(first)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def an_answer_is_as_likely_as_the_cache_makes_it_test(policy):
    scored = score_answers(PARAMS, CONFIG, PROMPTS, ANSWERS, policy)
    nats, first = by_the_cache(PROMPTS[0], ANSWERS[0], policy)
    np.testing.assert_allclose(scored[0].nats, nats, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(scored[0].first, first)


@pytest.mark.parametrize("name", ["dms", "snapkv"])
def neither_neighbours_nor_padding_change_an_answer_test(name):
    alone = score_answers(PARAMS, CONFIG, PROMPTS, ANSWERS, POLICIES[name])
    both = score_answers(PARAMS, CONFIG, PROMPTS, ANSWERS, POLICIES[name], batch=2)
    for one, other in zip(alone, both, strict=True):
        np.testing.assert_allclose(one.nats, other.nats, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(one.first, other.first)


def what_the_model_would_say_comes_first_test():
    prompt, said = PROMPTS[0], []
    for _ in range(3):  # the likeliest token of 50, again and again
        tried = score_answers(
            PARAMS, CONFIG, [[*prompt, *said]] * 50, [[n] for n in range(50)], Dense()
        )
        [best] = [n for n, each in enumerate(tried) if each.first[0]]
        assert np.exp([-each.nats[0] for each in tried]).sum() == pytest.approx(1.0, abs=1e-4)
        said.append(best)
    [whole] = score_answers(PARAMS, CONFIG, [prompt], [said], Dense())
    assert whole.first.all()


def answers_that_differ_in_their_last_token_are_read_once_and_measured_as_if_alone_test():
    pairs = [(PROMPTS[0], [5, 6, n]) for n in (7, 8, 9)] + list(zip(PROMPTS, ANSWERS, strict=True))
    counts = []
    together = score_answers(
        *(PARAMS, CONFIG, *zip(*pairs, strict=True), POLICIES["dms"]), report=counts.append
    )
    assert counts == [4, 1, 1]  # the longest first; one pair is there twice
    for pair, scored in zip(pairs, together, strict=True):
        [alone] = score_answers(PARAMS, CONFIG, *([x] for x in pair), POLICIES["dms"])
        np.testing.assert_allclose(scored.nats, alone.nats, rtol=1e-6)
        np.testing.assert_array_equal(scored.first, alone.first)
    assert len({scored.nats[2] for scored in together[:3]}) == 3


@pytest.mark.parametrize("policy", [DMS(some_gates(), -25.0, delay=4), TOVA(5, ratio=3.0)])
def slots_are_those_that_the_cache_holds_test(policy):
    sizes = {"seats": 1, "pages": 64, "page_size": 8, "max_length": 64}
    cache = paged_cache.init(CONFIG, policy, dtype=jnp.float32, **sizes)
    read = [*PROMPTS[0], *ANSWERS[0][:-1]]
    cache, _ = prefill(PARAMS, CONFIG, cache, [read], [0], policy=policy)
    [scored] = score_answers(PARAMS, CONFIG, PROMPTS[:1], ANSWERS[:1], policy)
    assert scored.slots == pytest.approx(float(cache.lengths.mean()), abs=1e-4)
    assert scored.slots < len(read)
