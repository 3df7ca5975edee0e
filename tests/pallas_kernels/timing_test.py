"""How time is taken."""

import itertools
import types

import jax.numpy as jnp
import pytest

from pallas_kernels import timing
from pallas_kernels.timing import Timing


def every_call_gets_the_result_of_the_one_before_and_the_sets_in_turn_test(monkeypatch):
    monkeypatch.setattr(timing, "PROGRAM_SECONDS", 6e-3)
    monkeypatch.setattr(timing, "_sampled", lambda run, calls: Timing(*run(), 0.0, calls))
    sets = [jnp.float32(3), jnp.float32(5), jnp.float32(7)]
    first, (again, last, _, calls) = timing.time_chain(
        lambda x, factor, one: factor * x + one,
        jnp.float32(1),
        jnp.float32(0.5),
        sets,
        expected=1e-3,
    )
    # 6 ms of calls of 1 ms: one turn of two rounds through three sets, after the first call.
    assert calls == 1 + 6
    x = expected = 0.5 * 1 + 3
    for one in (3, 5, 7, 3, 5, 7):
        x = 0.5 * x + one
    assert (float(first), float(again), float(last)) == (expected, expected, x)


def a_call_takes_its_share_of_the_wall_time_test(monkeypatch):
    clock = itertools.accumulate((0, 8, 1, 4, 1, 6, 1, 2, 1, 10), lambda a, b: a + b)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert timing._sampled(lambda: None, 2) == Timing(3.0, 1.0, 5.0, 2)


@pytest.mark.parametrize(
    "call_bytes, buffers", [(1, 32), (100, 10), (999, 2), (1000, 1), (10**9, 1)]
)
def buffers_add_up_to_the_cold_bytes_test(call_bytes, buffers):
    assert timing.buffers_for(call_bytes, 1000) == buffers


def copying_has_a_rate_and_it_is_found_twice_test():
    rates = timing.copy_rates(2**16)
    assert rates.keys() == {"copy", "kernel"} and all(rate > 0 for rate in rates.values())
