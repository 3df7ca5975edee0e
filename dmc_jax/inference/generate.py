"""Text from a model, one token at a time, over a `SlotCache`."""

import dataclasses
import functools
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.errors import UserError
from dmc_jax.inference import slots
from dmc_jax.inference.slots import SlotCache
from dmc_jax.model.llama import Llama

# Arrays are rounded up to powers of two from here, so that few lengths ever compile.
_SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a model wrote, and what that took."""

    tokens: tuple[int, ...]  # new ones, without EOS
    ratio: float  # tokens per slot over all rows, those of the prompt included
    cache_bytes: int  # of keys and values in slots in use, at the end
    dense_cache_bytes: int  # that a dense model would have used for the same tokens
    seconds: float  # from the first new token to the last, so without prompt and compilation
    tokens_per_second: float  # over those seconds; 0 where there were fewer than two tokens


def generate(
    params: Any, config: ModelConfig, prompt_ids: Sequence[int], **options: Any
) -> Generation:
    """Continue a prompt; all of it at once, where `stream` gives each token as it comes.

    Args:
        params: of the model.
        config: its sizes.
        prompt_ids: token ids, BOS included.
        options: as in `stream`.

    Raises:
        UserError: as in `stream`.
    """
    tokens = stream(params, config, prompt_ids, **options)
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            return end.value


def stream(
    params: Any,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    *,
    settings: DMCSettings | None,
    max_new_tokens: int,
    temperature: float,
    threshold: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    eos_id: int | None = None,
    dtype: str = "float32",
) -> Generator[int, None, Generation]:
    """Continue a prompt, token by token.

    Args:
        params: of the model.
        config: its sizes.
        prompt_ids: token ids, BOS included.
        settings: DMC settings; None: a dense model.
        max_new_tokens: tokens to write at most. With the prompt they must fit into
            `config.max_length`, beyond which the model knows no positions.
        temperature: of sampling; 0 takes the most likely token.
        threshold: of hard decisions.
        top_k: sample from this many most likely tokens; 0: from all.
        seed: of sampling; the same seed gives the same text.
        eos_id: token that ends the text, itself not part of it; None: none does.
        dtype: of the forward pass and the cache.

    Returns:
        An iterator over the new ids, whose return value is the `Generation`.

    Raises:
        UserError: an empty or too long prompt, an id that the model does not have, or an option
            out of range. Raised at once, not with the first token.
    """
    _check(config, prompt_ids, max_new_tokens, temperature, top_k)
    cache = slots.init(
        config, settings, 1, _bucket(len(prompt_ids) + max_new_tokens), jnp.dtype(dtype)
    )
    step = functools.partial(
        _next_token,
        params,
        config,
        settings,
        dtype,
        min(top_k, config.vocab_size),
        threshold=threshold,
        temperature=temperature,
        key=jax.random.key(seed),
    )
    *before, last = prompt_ids
    prompt = jnp.zeros(_bucket(len(before)), jnp.int32)
    prompt = prompt.at[: len(before)].set(jnp.array(before, jnp.int32))
    cache = _read_prompt(params, config, settings, dtype, cache, prompt, len(before), threshold)
    # The prompt's last token is the first step of decoding: it compiles what all others use.
    return _tokens(config, step, cache, last, max_new_tokens, eos_id)


def decode_step(
    params: Any,
    config: ModelConfig,
    cache: SlotCache,
    tokens: Int[Array, " B"],
    *,
    settings: DMCSettings | None,
    threshold: float | Array = 0.0,
    dtype: str = "float32",
) -> tuple[SlotCache, Float[Array, "B V"]]:
    """Read one token of every sequence.

    Args:
        params: of the model.
        config: its sizes.
        cache: holds the tokens before, with room for one more.
        tokens: ids in [0, V).
        settings: those that the cache was made with.
        threshold: of hard decisions.
        dtype: of the forward pass.

    Returns:
        (the cache with the tokens, logits of the tokens after them).
    """
    attend = slots.cached(config, settings, threshold=threshold)
    model = Llama(config, dtype=jnp.dtype(dtype))
    output = model.apply({"params": params}, tokens[:, None], attend=attend, state=cache)
    cache = dataclasses.replace(output.state, position=output.state.position + 1)
    return cache, output.logits[:, 0]


@functools.partial(
    jax.jit, static_argnames=("config", "settings", "dtype"), donate_argnames="cache"
)
def _read_prompt(params, config, settings, dtype, cache, prompt, count, threshold):
    """The cache after the first `count` tokens of the padded prompt [T]."""

    def read(i, cache):
        step = functools.partial(decode_step, settings=settings, threshold=threshold, dtype=dtype)
        return step(params, config, cache, prompt[i][None])[0]

    return jax.lax.fori_loop(0, count, read, cache)


@functools.partial(
    jax.jit, static_argnames=("config", "settings", "dtype", "top_k"), donate_argnames="cache"
)
def _next_token(
    params, config, settings, dtype, top_k, cache, token, *, threshold, temperature, key
):
    """Read a token and choose the one after it."""
    cache, logits = decode_step(
        params, config, cache, token[None], settings=settings, threshold=threshold, dtype=dtype
    )
    key = jax.random.fold_in(key, cache.position[0])
    return cache, _choose(logits[0], temperature, top_k, key)


def _choose(
    logits: Float[Array, " V"], temperature: Float[Array, ""], top_k: int, key: Array
) -> Int[Array, ""]:
    """The most likely id at temperature 0, a sample from the `top_k` (0: all) most likely else."""
    ids = jnp.arange(logits.shape[0])
    if top_k:
        logits, ids = jax.lax.top_k(logits, top_k)
    # Divided by 1 where greedy: the sample is drawn in any case, and must not become NaN.
    sampled = jax.random.categorical(key, logits / jnp.where(temperature > 0, temperature, 1.0))
    return ids[jnp.where(temperature > 0, sampled, jnp.argmax(logits))].astype(jnp.int32)


def _tokens(config, step, cache, token, max_new_tokens, eos_id):
    tokens, times = [], []
    for _ in range(max_new_tokens):
        cache, chosen = step(cache, jnp.int32(token))
        token = int(chosen)
        times.append(time.perf_counter())
        if token == eos_id:
            break
        tokens.append(token)
        yield token
    seconds = times[-1] - times[0]
    read, used = int(cache.position[0]), int(cache.lengths.sum())
    slot_bytes = 2 * config.head_dim * cache.keys.dtype.itemsize
    return Generation(
        tokens=tuple(tokens),
        ratio=read * config.kv_rows / used,
        cache_bytes=used * slot_bytes,
        dense_cache_bytes=read * config.kv_rows * slot_bytes,
        seconds=seconds,
        tokens_per_second=(len(times) - 1) / seconds if seconds else 0.0,
    )


def _bucket(length: int) -> int:
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()) if length else _SMALLEST_BUCKET


def _check(config, prompt_ids, max_new_tokens, temperature, top_k) -> None:
    if not prompt_ids:
        raise UserError("the prompt has no token: begin it with the tokenizer's BOS")
    strange = [token for token in prompt_ids if not 0 <= token < config.vocab_size]
    if strange:
        raise UserError(
            f"the prompt has token {strange[0]}, but the model's ids are 0 to "
            f"{config.vocab_size - 1}: use the tokenizer that the model was trained with"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}")
    if not temperature >= 0:
        raise UserError(f"temperature: expected 0 (most likely token) or more, got {temperature}")
    if top_k < 0:
        raise UserError(f"top_k: expected 0 (no limit) or more, got {top_k}")
    if len(prompt_ids) + max_new_tokens > config.max_length:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones exceed the "
            f"{config.max_length} that the model was made for: shorten the prompt or lower "
            "max_new_tokens"
        )
