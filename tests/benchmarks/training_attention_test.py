"""The benchmark of training attention: what is wrong gets no time, what is slower is not kept."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import training_attention as bench
from dmc_jax.core.attention import causal_attention
from pallas_kernels import timing, tuning
from pallas_kernels.causal_attention import settings as blocks_module

SMALL = bench.Case(length=24, heads=2, kv_heads=1, width=16, batch=2)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "PROGRAM_SECONDS", 1e-4)


def a_product_counts_the_visible_pairs_test():
    pairs = int(np.tril(np.ones((24, 24))).sum())
    assert SMALL.pair_flop == 2 * SMALL.width * pairs * SMALL.batch * SMALL.heads


def what_is_right_is_timed_and_what_is_wrong_is_not_test():
    result = bench.measure("xla", causal_attention, SMALL, 1e9)
    assert result["relative_error"] <= bench.TOLERANCE
    for what, products in (("forward", 2), ("forward_and_backward", 7)):
        found = result[what]
        taken = 1e-3 * found["milliseconds"]
        assert found["flop_per_second"] == pytest.approx(products * SMALL.pair_flop / taken, 0.01)

    def without_a_channel(q, k, v, bias, *, scale):
        return causal_attention(q, k.at[..., 0].set(0), v, bias, scale=scale)

    result = bench.measure("xla", without_a_channel, SMALL, 1e9)
    assert "relative error" in result["wrong"] and "forward" not in result


def gradients_of_the_bias_count_test():
    """Right outputs with a wrong gradient are wrong."""

    @jax.custom_vjp
    def spoilt(bias):
        return bias

    spoilt.defvjp(lambda bias: (bias, None), lambda _, d: (2 * d,))

    def attend(q, k, v, bias, *, scale):
        return causal_attention(q, k, v, spoilt(bias), scale=scale)

    assert bench.largest_error(attend, SMALL, biased=True) > 0.5
    assert bench.largest_error(attend, SMALL, biased=False) <= bench.TOLERANCE


def a_quick_run_writes_machine_rate_and_results_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", (SMALL,))
    file = tmp_path / "attention.json"
    assert bench.main(["--quick", f"--output={file}"]) == 0
    report = json.loads(file.read_text())
    assert report["matrix_flop_per_second"] > 0
    assert report["machine"]["command"].endswith(f"--quick --output={file}")
    assert report["results"][0]["contender"] == "xla"
    assert f"wrote {file}" in capsys.readouterr().out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about what happens without one")
@pytest.mark.parametrize(
    "arguments, what", [([], "the benchmark needs a GPU"), (["--tune"], "--tune needs a GPU")]
)
def what_cannot_be_run_is_said_in_one_line_test(arguments, what, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2
    assert what in capsys.readouterr().err.splitlines()[-1]


def tuning_keeps_the_fastest_blocks_that_are_right_test(tmp_path, monkeypatch):
    used = blocks_module.settings_for("no such device")
    (tmp_path / "default.json").write_text(
        json.dumps({"causal_attention": dataclasses.asdict(used)})
    )
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    tuning._read.cache_clear()
    monkeypatch.setattr(bench, "_kernels", lambda: lambda *_, settings: settings)
    wrong, quick = blocks_module.CANDIDATES["forward"][-2:]

    def largest_error(attend, case, *, biased):
        return float(attend.keywords["settings"].forward == wrong)

    def seconds(attend, case, rate, *, backward):
        forward = attend.keywords["settings"].forward
        taken = 1e-3 if forward in (wrong, quick) else 2e-3
        return timing.Timing(taken, taken, taken, 1)

    monkeypatch.setattr(bench, "largest_error", largest_error)
    monkeypatch.setattr(bench, "seconds", seconds)
    file = bench.tune(SMALL, 1e9, float("inf"))
    kept = json.loads(file.read_text())
    assert blocks_module.from_json(kept["causal_attention"]) == dataclasses.replace(
        used, forward=quick
    )
    assert kept["source"]["causal_attention"].startswith("benchmarks.training_attention --tune")
    tuning._read.cache_clear()


def superseded_keys_are_in_what_is_timed_test():
    (_, _, _, bias), _ = bench.make_inputs(dataclasses.replace(SMALL, length=500))
    assert 0.7 < float((bias < -1).mean()) < 0.8
    assert jnp.isfinite(bias).all()
