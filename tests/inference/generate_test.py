"""Generation is a function of its arguments, and says what it cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.inference import generate as generate_module
from dmc_jax.inference.generate import generate, stream
from dmc_jax.model import modes
from dmc_jax.model.llama import Llama

SETTINGS = DMCSettings(offset=0.0)
PROMPT = [1, 17, 4, 4, 30, 22]


def write(tiny_model, **changes):
    options = {"settings": SETTINGS, "max_new_tokens": 20, "temperature": 0.0} | changes
    return generate(*tiny_model, options.pop("prompt", PROMPT), **options)


@pytest.fixture(scope="module")
def greedy(tiny_model):
    return write(tiny_model)


def greedy_tokens_are_the_most_likely_ones_of_the_whole_sequence_test(tiny_model, greedy):
    params, config = tiny_model
    tokens = jnp.array([[*PROMPT, *greedy.tokens]])
    positions = jnp.arange(tokens.shape[1])[None]
    attend = modes.compressed(config, SETTINGS, positions)
    output = jax.jit(lambda p: Llama(config).apply({"params": p}, tokens, attend=attend))(params)
    chosen = np.argmax(output.logits[0, len(PROMPT) - 1 : -1], axis=-1)
    assert greedy.tokens == tuple(chosen)
    # The last token was written but never read.
    merged = sum(float(record.merged[:, :, :-1].sum()) for record in output.records)
    all_tokens = (tokens.shape[1] - 1) * config.kv_rows
    assert greedy.ratio == pytest.approx(all_tokens / (all_tokens - merged))
    assert greedy.ratio > 1.3
    assert greedy.dense_cache_bytes == 2 * 4 * config.head_dim * all_tokens
    assert greedy.cache_bytes == pytest.approx(greedy.dense_cache_bytes / greedy.ratio)


def greedy_generation_repeats_whatever_the_seed_test(tiny_model, greedy):
    assert write(tiny_model, seed=3).tokens == greedy.tokens


def sampling_follows_the_seed_test(tiny_model):
    first, again, other = (write(tiny_model, temperature=1.0, seed=s).tokens for s in (0, 0, 1))
    assert first == again
    assert first != other


def sampling_from_one_token_is_greedy_test(tiny_model, greedy):
    assert write(tiny_model, temperature=1.0, top_k=1).tokens == greedy.tokens


def sampling_draws_only_from_the_top_k_and_in_proportion_test():
    logits = jnp.log(jnp.array([0.1, 0.5, 0.1, 0.3]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: generate_module._choose(logits, 1.0, 2, key))
    shares = np.bincount(draw(keys), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0, 5 / 8, 0, 3 / 8], atol=0.03)


def text_ends_before_eos_test(tiny_model, greedy):
    eos = greedy.tokens[-1]
    end = greedy.tokens.index(eos)
    assert write(tiny_model, eos_id=eos).tokens == greedy.tokens[:end]


def streaming_gives_every_token_as_it_comes_test(tiny_model, greedy):
    tokens = stream(*tiny_model, PROMPT, settings=SETTINGS, max_new_tokens=20, temperature=0.0)
    assert next(tokens) == greedy.tokens[0]
    assert tuple(tokens) == greedy.tokens[1:]


def other_lengths_in_the_same_bucket_do_not_compile_again_test(tiny_model, greedy):
    before = (
        generate_module._next_token._cache_size(),
        generate_module._read_prompt._cache_size(),
    )
    longer = write(tiny_model, prompt=[*PROMPT, 5, 9], max_new_tokens=30, temperature=0.5, seed=9)
    assert len(longer.tokens) == 30
    assert longer.tokens_per_second == pytest.approx(29 / longer.seconds)
    after = (
        generate_module._next_token._cache_size(),
        generate_module._read_prompt._cache_size(),
    )
    assert after == before


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"prompt": []}, "no token"),
        ({"prompt": [1, 50]}, "token 50.*0 to 49"),
        ({"prompt": [1] * 120}, "120 tokens and 20 new ones exceed the 128"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected 1"),
        ({"temperature": -1.0}, "temperature: expected 0"),
        ({"temperature": float("nan")}, "temperature: expected 0"),
        ({"top_k": -1}, "top_k: expected 0"),
    ],
)
def bad_requests_are_refused_at_once_test(tiny_model, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        write(tiny_model, **changes)
