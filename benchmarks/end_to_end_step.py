"""A decoding step of the engine, timed on a cache that was filled to a given length.

`end_to_end` says what stands in for a trained model, and why.
"""

import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dmc_jax.config import ModelConfig
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.inference import paged_cache, programs
from dmc_jax.inference.paged_cache import PagedCache
from dmc_jax.inference.prefill import prefill
from dmc_jax.inference.sampling import SamplingParams, stack_params
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import Policy
from pallas_kernels.quantisation import quantise

DTYPE = "bfloat16"
POINTS, WEIGHTS = (0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6)  # Simpson's rule
# An offset of 0, since the merge logits of random weights are symmetric around minus the offset.
SETTINGS = DMCSettings(window=12, offset=0.0)
_MEASURED = Path(__file__).with_name("head_ratios.json")
_BLOCK_PAGES = 2**12  # random pages, which the pool repeats
_BISECTIONS = 10
_WARM_UP = 2
_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """What is measured at a time.

    Attributes:
        prompt: tokens.
        new: tokens.
        ratio: tokens a slot; 1 is dense.
        batch: sequences.
        memory: what the batch is the largest for; None for other batches.
    """

    prompt: int
    new: int
    ratio: int
    batch: int
    memory: str | None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all runs share."""

    config: ModelConfig
    params: Any  # arrays, or their shapes where nothing is measured
    page: int
    steps: int  # timed at a point
    rate: float  # bytes a second of copying
    kv_dtype: str = DTYPE  # of pages

    @property
    def weight_bytes(self) -> int:
        """Of all parameters that a step reads, which of the embedding are but a few rows."""
        embedding = 0 if self.config.tied_embeddings else _bytes(self.params["embedding"])
        return _bytes(self.params) - embedding


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# ---- the model --------------------------------------------------------------------------------


def random_params(config: ModelConfig) -> Any:
    """Parameters for decoding, made one by one in their dtypes; norms are one."""

    def shapes(key):
        return unstack_layers(init_params(config, key), config, jnp.dtype(DTYPE))

    leaves, tree = jax.tree.flatten(jax.eval_shape(shapes, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
        [
            jnp.ones(leaf.shape, leaf.dtype)
            if len(leaf.shape) == 1
            else _normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return 0.02 * jax.random.normal(key, shape, dtype)


def slots_per_token(config: ModelConfig, ratio: float) -> np.ndarray:
    """Of every row, [R], with mean 1 / ratio; see the top of this file."""
    if ratio == 1:
        return np.ones(config.kv_rows)
    measured = 1 / np.concatenate(json.loads(_MEASURED.read_text())["ratio_by_head"])
    rng = np.random.default_rng(0)
    slots = np.concatenate(
        [rng.permutation(np.resize(measured, heads)) for heads in config.kv_heads_by_layer]
    )
    for _ in range(50):  # none takes more than a slot a token
        slots = np.minimum(slots / (slots.mean() * ratio), 1.0)
    return slots


def policy_of(run: Run) -> Policy:
    """Of what is measured, with a threshold that is not set yet."""
    return DMC(SETTINGS, jnp.float32(0)) if run.ratio > 1 else Dense()


# ---- the cache --------------------------------------------------------------------------------


def new_cache(setup: Setup, run: Run, batch: int, key: Array) -> PagedCache:
    """Room for `batch` sequences with all their tokens, and the steps that are timed.

    The pool is full of random keys and values.
    """
    total = run.prompt + run.new + setup.steps + _BISECTIONS + _WARM_UP
    lengths = np.ceil(slots_per_token(setup.config, run.ratio) * total)
    # A page more than each row needs: rows here do not all grow at the rates that they stand for.
    pages = int(paged_cache.pages_of(lengths, setup.page).sum()) + setup.config.kv_rows
    cache = paged_cache.init(
        setup.config,
        policy_of(run),
        seats=batch,
        pages=batch * pages,
        page_size=setup.page,
        max_length=total,
        dtype=setup.kv_dtype,
        tokens=jnp.dtype(DTYPE),
    )
    shape = min(batch * pages, _BLOCK_PAGES), *cache.pages.k.shape[1:]
    blocks = {
        name: jax.random.normal(key, shape, DTYPE)
        for name, key in zip("kv", jax.random.split(key), strict=True)
    }
    if setup.kv_dtype == "int8":
        for name in "kv":
            blocks[name], blocks[f"{name}_scale"] = quantise(blocks[name], DTYPE)
    pools = {name: _repeated(block, batch * pages) for name, block in blocks.items()}
    return dataclasses.replace(cache, pages=dataclasses.replace(cache.pages, **pools))


def _repeated(block, pages):
    times = -(-pages // block.shape[0])
    return jnp.broadcast_to(block, (times, *block.shape)).reshape(-1, *block.shape[1:])[:pages]


def largest_batch(setup: Setup, run: Run, memory: int, reserve: int) -> int:
    """Sequences that fit beside the weights and the reserve; 0 where none does."""

    def size(batch):
        shapes = jax.eval_shape(lambda key: new_cache(setup, run, batch, key), jax.random.key(0))
        return paged_cache.bytes_reserved(shapes)

    weights = _bytes(setup.params)
    one = size(2) - size(1)
    one += setup.config.vocab_size * 9  # logits twice and tokens seen
    return max(0, (memory - weights - reserve - (size(1) - one)) // one)


# What is not read is kept too: only so is its memory used again.
@functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
def filled(cache: PagedCache, lengths, tokens, order) -> PagedCache:
    """The cache after so many tokens, with rows of these lengths in all seats.

    Args:
        cache: given up; its pool stays as it is.
        lengths: slots of every row, int32 [R].
        tokens: position of all sequences.
        order: of the pages, a permutation.
    """
    seats, rows, maxp = cache.page_table.shape
    pages = jnp.tile(paged_cache.pages_of(lengths, cache.pages.page_size), (seats, 1))
    ends = jnp.cumsum(pages.reshape(-1)).reshape(seats, rows)
    entry = jnp.arange(maxp)
    at = jnp.where(entry < pages[..., None], (ends - pages)[..., None] + entry, 0)
    taken = ends[-1, -1]
    return dataclasses.replace(
        cache,
        page_table=order[at],
        lengths=jnp.tile(lengths, (seats, 1)),
        # One token of ones: what is in the ring costs as much as anything else.
        state=jax.tree.map(jnp.ones_like, cache.state),
        position=jnp.full_like(cache.position, tokens),
        free_pages=jnp.roll(order, -taken),  # those of the rows come last
        free_count=order.size - taken,
        failed=jnp.zeros_like(cache.failed),
    )


# ---- one measurement --------------------------------------------------------------------------


def step_shapes(setup: Setup, run: Run) -> tuple[tuple, dict[str, Any], tuple]:
    """Shapes of what the engine's step is called with for one batch size.

    Returns:
        (arguments of `programs.read_tokens` and what it takes by name, arguments of
        `programs.choose_tokens`).
    """

    def arguments():
        cache = new_cache(setup, run, run.batch, jax.random.key(0))
        logits = jnp.zeros((run.batch, setup.config.vocab_size), jnp.float32)
        return setup.params, policy_of(run), cache, logits, logits > 0, _of_sequences(setup, run)

    params, policy, cache, logits, seen, of_sequences = jax.eval_shape(arguments)
    tokens, active, sampling, index = of_sequences
    read = (params, setup.config, cache, tokens, active), {"policy": policy, "dtype": DTYPE}
    return *read, (seen, logits, sampling, index)


def compile_step(setup: Setup, run: Run) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """The two programs of the engine's step for one batch size, compiled from shapes alone.

    So a process that only fills JAX's compilation cache finds what one that measures asks for.
    """
    arguments, options, of_choice = step_shapes(setup, run)
    read = programs.read_tokens.lower(*arguments, **options)
    return read.compile(), programs.choose_tokens.lower(*of_choice).compile()


def _of_sequences(setup: Setup, run: Run):
    """Tokens, which of them count, how to sample, and the index of what is sampled."""
    tokens = jnp.arange(run.batch, dtype=jnp.int32) % setup.config.vocab_size
    sampling = stack_params([SamplingParams(temperature=0.0)] * run.batch)
    index = jnp.zeros(run.batch, jnp.int32)
    return tokens, jnp.ones(run.batch, bool), jax.tree.map(jnp.asarray, sampling), index


class Decoder:
    """The engine's step for one batch size, compiled, and the batch that it works on."""

    def __init__(self, setup: Setup, run: Run):
        self.setup, self.run = setup, run
        B, config = run.batch, setup.config
        self.rows = slots_per_token(config, run.ratio)
        self.tokens, self.active, self.sampling, self.index = _of_sequences(setup, run)
        self.policy = policy_of(run)
        started = time.perf_counter()
        self.read, self.choose = compile_step(setup, run)
        self.compile_seconds = time.perf_counter() - started
        # Made inside a program, so that the pool of zeros in it never takes memory.
        self.cache = jax.jit(lambda key: new_cache(setup, run, B, key))(jax.random.key(2))
        self.seen = jnp.zeros((B, config.vocab_size), bool)
        pages = self.cache.free_pages.size
        self.order = jax.random.permutation(jax.random.key(1), pages).astype(jnp.int32)

    def fill(self, tokens: int) -> int:
        """Sets every sequence to so many tokens; returns the slots of one."""
        lengths = np.maximum(np.round(self.rows * tokens), 1).astype(np.int32)
        self.cache = filled(self.cache, lengths, np.int32(tokens), self.order)
        return int(lengths.sum())

    def step(self):
        """A token more for every sequence; returns what the engine reads of the cache."""
        self.cache, logits, tally = self.read(
            *(self.setup.params, self.cache, self.tokens, self.active), policy=self.policy
        )
        self.seen, chosen = self.choose(self.seen, logits, self.sampling, self.index)
        self.tokens = chosen.tokens
        return tally

    def set_threshold(self) -> float:
        """By bisection, on steps; returns the slots that a row then takes for a token."""
        low, high = -4.0, 4.0  # merges nearly all, nearly nothing
        self.fill(self.run.prompt)
        before, grown = int(self.cache.lengths.sum()), 1.0
        for _ in range(_BISECTIONS if self.run.ratio > 1 else 0):
            middle = (low + high) / 2
            self.policy = dataclasses.replace(self.policy, threshold=jnp.float32(middle))
            after = int(self.step().slots.sum())
            grown, before = (after - before) / self.cache.lengths.size, after
            low, high = (middle, high) if grown < 1 / self.run.ratio else (low, middle)
        return grown

    def seconds(self, tokens: int) -> tuple[list[float], int]:
        """Of a step after so many tokens, several times, and the slots of a sequence then.

        Raises:
            RuntimeError: the pages ran out.
        """
        taken = []
        for _ in range(_SAMPLES):
            slots = self.fill(tokens)
            for _ in range(_WARM_UP):
                self.step()
            jax.block_until_ready(self.tokens)
            started = time.perf_counter()
            for _ in range(self.setup.steps):  # nothing is read: the device does one after another
                tally = self.step()
            jax.block_until_ready((self.tokens, tally))
            taken.append((time.perf_counter() - started) / self.setup.steps)
            if bool(tally.failed.any()):
                raise RuntimeError("a sequence had no page left")
        return taken, slots


def prefill_times(
    setup: Setup, tokens: int, policy: Policy, chunk: int | None = None
) -> tuple[list[float], float]:
    """Seconds of reading one prompt as the engine does, alone, into a seat that is empty before.

    Args:
        setup: shared by all.
        tokens: of the prompt.
        policy: with its threshold: what is merged is up to the model, alike in all rows.
        chunk: of `prefill`.

    Returns:
        (seconds of each time but the first, which compiles, slots that a row has then).
    """
    # As large for all prompts and ratios: so all of a policy run the same programs.
    rows, longest = setup.config.kv_rows, setup.config.max_length
    sizes = {"page_size": setup.page, "max_length": longest}
    sizes |= {"dtype": setup.kv_dtype, "tokens": jnp.dtype(DTYPE)}
    pages = rows * paged_cache.pages_of(longest, setup.page)
    cache = paged_cache.init(setup.config, policy, seats=1, pages=pages, **sizes)
    prompt = np.random.default_rng(0).integers(0, setup.config.vocab_size, tokens)
    taken = []
    for _ in range(1 + _SAMPLES):
        cache = paged_cache.free(cache, jnp.ones(1, bool))
        jax.block_until_ready(cache)
        started = time.perf_counter()
        cache, logits = prefill(
            *(setup.params, setup.config, cache, [prompt], [0]),
            policy=policy,
            dtype=DTYPE,
            chunk=chunk,
        )
        jax.block_until_ready((cache, logits))
        taken.append(time.perf_counter() - started)
    return taken[1:], int(cache.lengths.sum()) / rows


def measure(setup: Setup, run: Run) -> dict:
    """Tokens a second of one batch, and what bounds them.

    Raises:
        RuntimeError: no memory for it.
    """
    decoder = Decoder(setup, run)
    grown = decoder.set_threshold()
    slot_bytes = decoder.cache.pages.page_bytes / setup.page
    points = []
    for point in POINTS:
        tokens = run.prompt + round(point * run.new)
        seconds, slots = decoder.seconds(tokens)
        live = run.batch * slots * slot_bytes
        points.append(
            {
                "tokens": tokens,
                "milliseconds": round(1e3 * statistics.median(seconds), 4),
                "fastest": round(1e3 * min(seconds), 4),
                "slowest": round(1e3 * max(seconds), 4),
                "live_bytes": live,
                "floor_milliseconds": round(1e3 * (setup.weight_bytes + live) / setup.rate, 4),
                "slots_per_token": round(slots / tokens / setup.config.kv_rows, 4),
            }
        )

    def mean(name):  # over the generation
        return sum(w * point[name] for w, point in zip(WEIGHTS, points, strict=True))

    memory = decoder.read.memory_analysis()
    cache_bytes, with_prompts = paged_cache.bytes_reserved(decoder.cache), {}
    if run.memory:  # the largest batch: its prompts are read too, one after the other
        decoder.cache = None  # leaves room for the prompt's
        prompt = statistics.median(prefill_times(setup, run.prompt, decoder.policy)[0])
        whole = run.batch * prompt + 1e-3 * run.new * mean("milliseconds")
        with_prompts = {
            "prefill_milliseconds": round(1e3 * prompt, 3),
            "tokens_per_second_with_prefill": round(run.batch * run.new / whole, 1),
        }
    measured = {
        "tokens_per_second": round(1e3 * run.batch / mean("milliseconds"), 1),
        "slowest_and_fastest": [
            round(1e3 * run.batch / mean(name), 1) for name in ("slowest", "fastest")
        ],
        "floor_weights": round(run.batch * setup.rate / setup.weight_bytes, 1),
        "floor_weights_and_cache": round(1e3 * run.batch / mean("floor_milliseconds"), 1),
        "copy_bytes_per_second": setup.rate,
        "points": points,
        "threshold": float(decoder.policy.threshold or 0.0),  # a dense model has none
        "slots_per_token_in_the_steps": round(grown, 4),
        "cache_bytes": cache_bytes,
        "temporary_bytes": memory.temp_size_in_bytes if memory else None,
        "compile_seconds": round(decoder.compile_seconds, 1),
    }
    return vars(run) | measured | with_prompts
