"""The benchmark of the cache update: what it measures is what it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import cache_update
from benchmarks.cache_update import HEADS, SETTINGS, WIDTH, Case
from pallas_kernels import timing
from pallas_kernels.cache_update import reference

CASE = Case(rows=64, layers=2, steps=8)


@pytest.fixture(autouse=True)
def no_time_to_lose(monkeypatch):
    monkeypatch.setattr(cache_update, "_SAMPLES", 1)


def a_program_reads_a_token_a_step_and_merges_three_of_four_test():
    cache, tokens = cache_update.make(CASE)
    before = jax.device_get(cache)  # it is donated
    after = cache_update.program(cache, tokens, CASE, "xla")
    assert (after.position == before.position + CASE.steps).all()
    appended = CASE.steps - tokens.decisions.sum(axis=0)
    np.testing.assert_array_equal(after.lengths - before.lengths, appended)
    assert not after.failed.any()
    # Every row has a segment to join, with as much in its ring as its tokens.
    count = before.state.count
    assert count.min() >= 1
    used = np.minimum(count, SETTINGS.window)
    np.testing.assert_array_equal((before.state.weights > 0).sum(axis=-1), used)


def decisions_and_segments_are_those_of_four_tokens_a_slot_test():
    cache, tokens = cache_update.make(CASE)
    assert float(tokens.decisions.mean()) == pytest.approx(0.75, abs=0.05)
    assert float(cache.state.count.mean()) == pytest.approx(4, abs=1)


def layers_that_take_turns_have_more_ring_bytes_than_caches_test():
    for case in cache_update.cases(cache_update.ROWS, cold_bytes=timing.COLD_BYTES, steps=1):
        ring_bytes = 2 * case.rows * SETTINGS.window * WIDTH * 4
        assert case.layers == 32 or case.layers * ring_bytes >= timing.COLD_BYTES
        seats, R = case.shape
        assert seats * R == case.rows * case.layers and case.heads <= HEADS


def a_form_that_gives_another_cache_gets_no_time_test(monkeypatch):
    result = cache_update.measure(CASE, "reference")
    assert result.keys() == {"microseconds", "least_and_greatest"} and result["microseconds"] > 0

    def wrong(state, q, *token, **others):
        count, weights = state.segment.count, state.segment.weights
        segment = state.segment._replace(count=count + 1, weights=weights * jnp.nan)
        return q, state._replace(segment=segment)

    monkeypatch.setattr(reference, "cache_update", wrong)
    cache_update.program.clear_cache()
    result = cache_update.measure(CASE, "reference")
    cache_update.program.clear_cache()
    assert result.keys() == {"wrong"}
    assert "weights is off by nan" in result["wrong"] and "count is off by" in result["wrong"]


def the_faster_form_has_the_least_product_of_times_and_was_always_right_test():
    def results(**times):
        return [{"form": name, "microseconds": x} for name, xs in times.items() for x in xs]

    names = ("xla", "triton")
    assert cache_update.faster(results(xla=[4, 100], triton=[1, 200]), names) == "triton"
    assert cache_update.faster(results(xla=[4, 100], triton=[3, 140]), names) == "xla"
    one_wrong = [*results(xla=[4], triton=[1]), {"form": "triton", "wrong": "count is off by 1"}]
    assert cache_update.faster(one_wrong, names) == "xla"


def it_writes_what_it_found_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_update, "cases", lambda rows, **others: [CASE])
    file = tmp_path / "figures.json"
    assert cache_update.main(["--quick", f"--output={file}"]) == 0
    report = json.loads(file.read_text())
    assert report["faster"] in {one["form"] for one in report["results"]}
    assert report["results"][0]["rows"] == CASE.rows and report["machine"]["device"]
    assert "faster: " in capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def without_a_gpu_only_quick_runs_test(capsys):
    with pytest.raises(SystemExit, match="2"):
        cache_update.main([])
    assert "needs a GPU that JAX sees, and it sees cpu; try --quick" in capsys.readouterr().err
