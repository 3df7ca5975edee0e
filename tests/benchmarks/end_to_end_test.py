"""The end-to-end benchmark on a model of two layers: what it measures is what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import end_to_end, end_to_end_step
from benchmarks.end_to_end_step import Decoder, Run, Setup
from dmc_jax.inference import paged_cache
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.model.presets import PRESETS

CONFIG = dataclasses.replace(
    PRESETS["tiny"], vocab_size=64, width=32, layers=2, mlp_width=48, head_dim=16, max_length=64
)
RUN = Run(prompt=40, new=24, ratio=4, batch=3, memory="some")


@pytest.fixture(scope="module")
def setup():
    return Setup(CONFIG, end_to_end_step.random_params(CONFIG), page=8, steps=2, rate=1e9)


@pytest.fixture(scope="module")
def decoder(setup):
    return Decoder(setup, RUN)


def parameters_are_those_of_decoding_in_shape_and_dtype_test(setup):
    real = jax.eval_shape(
        lambda key: unstack_layers(init_params(CONFIG, key), CONFIG, jnp.dtype("bfloat16")),
        jax.random.key(0),
    )
    assert jax.tree.structure(setup.params) == jax.tree.structure(real)
    for mine, theirs in zip(jax.tree.leaves(setup.params), jax.tree.leaves(real), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def rows_take_the_slots_of_the_ratio_and_differ_as_measured_heads_do_test(ratio):
    slots = end_to_end_step.slots_per_token(PRESETS["7b"], ratio)
    assert slots.shape == (32 * 32,)
    assert slots.mean() == pytest.approx(1 / ratio, rel=1e-6)
    assert slots.min() > 0 and slots.max() <= 1
    if ratio >= 4:  # the demo's heads: 1.3x to 18x
        assert slots.max() / slots.min() > 10


def a_filled_cache_owns_each_page_once_and_has_the_lengths_that_were_set_test(decoder):
    total = decoder.fill(57)
    cache = jax.device_get(decoder.cache)
    lengths = np.maximum(np.round(57 * decoder.rows), 1)
    assert (cache.lengths == lengths).all() and total == lengths.sum()
    assert (cache.position == 57).all()
    owned = [
        page
        for table, length in zip(
            cache.page_table.reshape(-1, cache.page_table.shape[-1]),
            cache.lengths.reshape(-1),
            strict=True,
        )
        for page in table[: -(-length // 8)]
    ]
    free = cache.free_pages[: cache.free_count].tolist()
    assert sorted([*owned, *free]) == list(range(cache.pages.count))
    assert np.isfinite(np.asarray(cache.pages.k, np.float32)).all()


def steps_read_a_token_and_grow_the_rows_as_the_ratio_says_test(decoder):
    decoder.set_threshold()
    decoder.fill(RUN.prompt)
    before = int(decoder.cache.lengths.sum())
    for _ in range(8):
        tally = decoder.step()
    grown = (int(tally.slots.sum()) - before) / decoder.cache.lengths.size / 8
    assert (np.asarray(tally.position) == RUN.prompt + 8).all() and not tally.failed.any()
    # 24 rows with one threshold for all, 8 steps: a quarter of 192 decisions, give or take.
    assert 0.1 < grown < 0.45


def every_result_is_written_and_a_second_run_measures_only_what_is_left_test(
    setup, tmp_path, monkeypatch
):
    measured = []

    def measure(setup, run):
        measured.append(run)
        if run.ratio == 8:
            raise RuntimeError("out of memory\nsomewhere")
        point = {"milliseconds": 1.0}
        floors = {"floor_weights": 9.0, "floor_weights_and_cache": 8.0}
        speed = {"tokens_per_second": 10.0 * run.batch, "points": [point] * 3}
        return vars(run) | floors | speed

    monkeypatch.setattr(end_to_end, "measure", measure)
    runs = [Run(8, 8, ratio, ratio, "some") for ratio in (1, 4, 8)]
    file = tmp_path / "device" / "end_to_end.json"
    report = {"model": "tiny", "machine": {"device": "cpu"}}
    end_to_end.run_all(setup, runs[:2], report, file, until=np.inf)
    written = json.loads(file.read_text())
    assert measured == runs[:2] and written == report and written["left_out"] == 0
    assert file.with_suffix(".png").stat().st_size > 0
    end_to_end.run_all(setup, runs, written, file, until=np.inf)
    assert measured == runs
    assert written["results"][2]["failed"] == "RuntimeError: out of memory somewhere"
    (against,) = written["against_dense"]
    assert (against["ratio"], against["batch_over_dense"]) == (4, 4.0)
    assert against["tokens_per_second_over_dense"] == 4.0


def without_time_nothing_is_begun_that_may_not_end_test(setup, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "measure", lambda *_: pytest.fail("it was measured"))
    report = {"model": "tiny", "machine": {"device": "cpu"}}
    file = tmp_path / "end_to_end.json"
    end_to_end.run_all(setup, [RUN], report, file, until=-np.inf)
    assert report["left_out"] == 1


@pytest.mark.parametrize(
    "gigabytes, names", [(76.5, ["device"]), (80.7, ["80 GB"]), (136, ["80 GB", "device"])]
)
def batches_fill_the_memory_of_the_paper_and_a_larger_device_test(gigabytes, names):
    memories = end_to_end.memories_of(int(gigabytes * 1e9))
    assert list(memories) == names
    assert max(memories.values()) <= gigabytes * 1e9


@pytest.mark.parametrize("ratio", [1, 4])
def the_largest_batch_fits_and_one_more_does_not_test(setup, ratio):
    memory, reserve = setup.weight_bytes + 3_000_000, 100_000
    run = dataclasses.replace(RUN, ratio=ratio)
    batch = end_to_end_step.largest_batch(setup, run, memory, reserve)

    def needed(batch):
        shapes = jax.eval_shape(
            lambda key: end_to_end_step.new_cache(setup, run, batch, key), jax.random.key(0)
        )
        logits = batch * CONFIG.vocab_size * 9
        return setup.weight_bytes + reserve + paged_cache.bytes_reserved(shapes) + logits

    assert batch > 1
    assert needed(batch) <= memory < needed(batch + 1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about what happens without one")
def a_cpu_is_refused_in_one_line_unless_it_is_quick_test(capsys):
    with pytest.raises(SystemExit):
        end_to_end.main([])
    error = capsys.readouterr().err
    assert "needs a GPU that JAX sees, and it sees cpu" in error and "Traceback" not in error


@pytest.mark.slow
def a_quick_run_on_a_cpu_measures_all_ratios_test(tmp_path):
    file = tmp_path / "quick.json"
    end_to_end.main(["--quick", "--model=tiny", f"--output={file}"])
    report = json.loads(file.read_text())
    assert [one["ratio"] for one in report["results"]] == [
        1,
        4,
        8,
        4,
        8,
    ]  # the last two: dense's batch
    for one in report["results"]:
        assert one["tokens_per_second"] > 0
        assert one["slots_per_token_in_the_steps"] == pytest.approx(1 / one["ratio"], abs=0.1)
        lives = [point["live_bytes"] for point in one["points"]]
        assert lives == sorted(lives)


def more_dense_sequences_fit_in_int8_and_their_steps_are_measured_test(setup):
    dense = dataclasses.replace(RUN, ratio=1, memory=None)
    narrow = dataclasses.replace(setup, kv_dtype="int8")
    memory = setup.weight_bytes + 10**6
    fit = [end_to_end_step.largest_batch(one, dense, memory, 0) for one in (setup, narrow)]
    assert fit[1] > 1.4 * fit[0]  # 16 numbers are 18 bytes in place of 32
    found = end_to_end_step.measure(narrow, dense)
    tokens = [point["tokens"] for point in found["points"]]
    live = [dense.batch * CONFIG.kv_rows * n * 2 * (16 + 2) for n in tokens]
    assert [point["live_bytes"] for point in found["points"]] == live
    assert found["threshold"] == 0 and found["tokens_per_second"] > 0
