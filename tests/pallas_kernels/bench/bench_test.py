"""The kernel benchmark: its inputs, its check, how it counts calls, what it keeps when cut."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target, timing, tuning
from pallas_kernels.bench import __main__ as bench
from pallas_kernels.bench.cases import MB, Case, make_padded, make_pages
from pallas_kernels.bench.contenders import TOLERANCE, Wrong, check, make_contender, measure
from pallas_kernels.decode_attention import api
from pallas_kernels.decode_attention.settings import CANDIDATES, Settings, settings_for

SMALL = Case("uneven", MB // 8, 16, 32, 4)


@pytest.fixture(scope="module")
def pages():
    return make_pages(SMALL, cold_bytes=MB // 4)


# ---- inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", bench.WIDTHS)
@pytest.mark.parametrize("size", bench.SIZES)
def uneven_rows_have_the_bytes_of_even_ones_and_one_is_ten_times_their_mean_test(size, width):
    even, uneven = (
        Case(kind, size, 64, width, 1).row_lengths().astype(np.int64) for kind in ("even", "uneven")
    )
    assert even.min() == even.max() and uneven.min() >= 1
    assert uneven.max() == 10 * even[0]
    assert uneven.sum() == pytest.approx(even.sum(), rel=0.01)
    assert even.sum() * 2 * width * 2 == pytest.approx(size, rel=0.02)


def sets_share_no_page_and_only_dead_slots_hold_nan_test(pages):
    lengths = np.asarray(pages.lengths)
    used = [
        page
        for table in map(np.asarray, pages.tables)
        for row, length in zip(table, lengths, strict=True)
        for page in row[: -(-length // SMALL.page)]
    ]
    assert len(pages.tables) == 2 and len(set(used)) == len(used)
    live = np.isfinite(np.asarray(pages.k_pages, np.float32)).all(axis=-1)
    assert live.sum() == 2 * lengths.sum()
    assert np.isnan(np.asarray(pages.v_pages, np.float32)[~live]).all()


def padded_rows_hold_what_the_pages_hold_and_zeros_behind_test(pages):
    lengths = np.asarray(pages.lengths)
    ((k, v), *_) = make_padded(pages, cold_bytes=1)
    assert k.shape == (lengths.size, lengths.max(), SMALL.width)
    table = np.asarray(pages.tables[0])
    for padded, pool in ((k, pages.k_pages), (v, pages.v_pages)):
        padded, pool = np.asarray(padded, np.float32), np.asarray(pool, np.float32)
        for row in (0, int(lengths.argmax()), int(lengths.argmin())):
            slots = np.arange(lengths[row])
            expected = pool[table[row, slots // 16], slots % 16]
            np.testing.assert_array_equal(padded[row, : lengths[row]], expected)
            assert (padded[row, lengths[row] :] == 0).all()


# ---- check ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xla", "xla+plan", "reference", "dense_xla"])
def contenders_are_right_and_get_a_time_test(pages, name, monkeypatch):
    monkeypatch.setattr(timing, "PROGRAM_SECONDS", 1e-4)
    contender = make_contender(name, SMALL, pages, 1)
    result = measure(contender, SMALL, pages, rate=1e9)
    assert result["relative_error"] < TOLERANCE
    assert result["useful_bytes"] == int(pages.lengths.sum()) * 2 * 32 * 2
    seconds = 1e-6 * result["microseconds"]
    assert result["of_copy"] == pytest.approx(result["useful_bytes"] / seconds / 1e9, rel=1e-2)


@pytest.mark.parametrize(
    "harm",
    [
        lambda out, row: out.at[row].multiply(1.05),
        lambda out, row: out.at[row, 1].set(0.0),
        lambda out, row: out.at[row, 0, 0].set(jnp.nan),
    ],
)
@pytest.mark.parametrize("end", [0, -1])  # the shortest and the longest row
def a_wrong_row_gets_no_time_test(pages, harm, end):
    row = np.argsort(pages.lengths)[end]
    contender = make_contender("xla", SMALL, pages, 1)
    wrong = contender._replace(call=lambda *inputs: harm(contender.call(*inputs), row))
    first = wrong.call(pages.q, wrong.shared, wrong.sets[0])
    with pytest.raises(Wrong, match="relative error"):
        check(first, SMALL, pages)


@pytest.mark.parametrize("implementation", ["triton"])
def a_contender_is_built_with_the_settings_it_is_given_and_is_right_test(
    pages, implementation, monkeypatch
):
    settings = Settings(block_bytes=1024, warps=1, stages=2, programs_per_core=3)
    module, built = api.IMPLEMENTATIONS.load(implementation), []

    def launch(kernel, *inputs, launch=module.launch, **how):
        built.append((how["num_warps"], how["num_stages"], how.get("BLOCK"), how["grid"]))
        return launch(kernel, *inputs, **how)

    monkeypatch.setattr(module, "launch", launch)
    contender = make_contender(implementation, SMALL, pages, settings=settings)
    out = contender.call(pages.q, contender.shared, contender.sets[0])
    block, programs = settings.block(32, 2), 3 * target.current().cores
    plan, attend, *_ = built
    assert plan[2:] == (block, (1,))
    assert attend == (1, 2, block, (programs,))
    assert block != settings_for("any").block(32, 2)
    check(out, SMALL, pages)


# ---- the run ----------------------------------------------------------------------------------


def on_a_gpu_every_case_of_the_grid_is_planned_once_test():
    planned = bench.plan_cases(("triton", "xla"))
    cases = [case for case, _ in planned]
    assert len(set(cases)) == len(cases)
    grid = itertools.product(("even", "uneven"), bench.SIZES, (16, 64, 256), (64, 128), (1, 4, 8))
    assert set(cases) >= {Case(*one) for one in grid}
    assert all(names[0] == "triton" for _, names in planned)
    assert {"triton+plan", "dense_xla", "dense_cudnn", "xla"} <= set(planned[0][1])


def a_cut_run_keeps_what_it_has_and_says_what_it_left_out_test(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    figures = {"of_copy": 0.5, "microseconds": 1.0, "useful_bytes_per_second": 5e8}
    monkeypatch.setattr(bench, "measure", lambda *_: figures)
    file, report = tmp_path / "a" / "kernels.json", {"copy_bytes_per_second": 1e9}
    cases = [(SMALL, ("xla", "dense_xla"))] * 5
    assert bench.run(cases, report, file, until=4, cold_bytes=1)
    written = json.loads(file.read_text())
    assert [one["contender"] for one in written["results"]] == ["xla", "dense_xla"] * 2
    assert report["left_out"] == 3
    assert list(file.parent.iterdir()) == [file]


def a_contender_that_fails_is_named_with_its_reason_and_the_others_go_on_test(
    tmp_path, monkeypatch, capsys
):
    def measure(contender, case, pages, rate):
        if not isinstance(contender.shared, tuple):
            raise NotImplementedError("no such library\nhere")
        raise Wrong("relative error 1")

    monkeypatch.setattr(bench, "measure", measure)
    report = {"copy_bytes_per_second": 1e9}
    cases = [(SMALL, ("xla", "dense_cudnn"))]
    assert not bench.run(cases, report, tmp_path / "x.json", until=np.inf, cold_bytes=1)
    assert [one.get("wrong") for one in report["results"]] == ["relative error 1", None]
    assert report["results"][1]["failed"] == "NotImplementedError: no such library here"
    assert "wrong: relative error 1" in capsys.readouterr().out


def figures_at_every_size_are_drawn_and_without_any_nothing_is_test(tmp_path):
    report = {"machine": {"device": "cpu"}, "results": [vars(SMALL) | {"contender": "xla"}]}
    file = tmp_path / "kernels.png"
    bench.plot(report, file)
    assert not file.exists()
    for size, kind in itertools.product((8 * MB, 64 * MB), ("even", "uneven", "empty")):
        case = Case(kind, size, 64, 128, 1)
        of_copy = 0.0 if kind == "empty" else 0.5
        report["results"].append(vars(case) | {"contender": "xla", "of_copy": of_copy})
    bench.plot(report, file)
    assert file.read_bytes().startswith(b"\x89PNG")


def goals_are_the_least_bandwidth_and_uneven_over_even_test():
    def result(kind, size, page, of_copy, microseconds=1.0):
        return {
            **{"contender": "triton", "lengths": kind, "live_bytes": size * MB, "page": page},
            **{"width": 128, "queries": 1, "of_copy": of_copy, "microseconds": microseconds},
            "useful_bytes_per_second": 1e12 * of_copy,
        }

    results = [
        result("even", 256, 64, 0.9),
        result("uneven", 256, 64, 0.81),
        result("even", 1024, 64, 0.95),
        result("even", 64, 64, 0.1),
        result("even", 256, 16, 0.7),
        result("even", 8, 64, 0.2, microseconds=11.5),
        result("empty", 8, 64, 0.0, microseconds=3.5),
        {"contender": "triton", "width": 128, "queries": 1, "failed": "no"},
    ]
    assert bench.goals(results) == {
        "triton": {
            "least_of_copy_page_64_from_256_MB": 0.81,
            "least_of_copy_page_16_from_256_MB": 0.7,
            "microseconds_8_MB_even": 11.5,
            "microseconds_empty": 3.5,
            "uneven_over_even_rate_256_MB": 0.9,
        }
    }


def tuning_builds_with_every_candidate_and_keeps_the_fastest_that_is_right_test(
    tmp_path, monkeypatch
):
    kept = dataclasses.asdict(CANDIDATES[0])
    default = {"decode_attention": kept}
    (tmp_path / "default.json").write_text(json.dumps(default))
    monkeypatch.setattr(tuning, "_FOLDER", tmp_path)
    tuning._read.cache_clear()
    monkeypatch.setattr(bench, "make_contender", lambda *_, settings: settings)
    seen = []

    def measure(settings, case, pages, rate):
        seen.append(settings)
        if settings == CANDIDATES[2]:
            raise Wrong("relative error 1")
        return {"microseconds": 9.0 - CANDIDATES.index(settings), "of_copy": 0.5}

    monkeypatch.setattr(bench, "measure", measure)
    file, tried = bench.tune(
        1e9,
        until=np.inf,
        cases=(SMALL,),
        candidates=CANDIDATES[:4],
    )
    assert seen == list(CANDIDATES[:4])
    assert [row["microseconds"] for row in tried] == [9.0, 8.0, 6.0]  # the wrong one has no time
    assert tried[0].items() >= (vars(CANDIDATES[0]) | vars(SMALL)).items()
    kept = json.loads(file.read_text())
    assert Settings(**kept["decode_attention"]) == CANDIDATES[3]
    assert kept.keys() == {"source", "decode_attention"}
    assert settings_for(jax.devices()[0].device_kind) == CANDIDATES[3]
    tuning._read.cache_clear()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="about what happens without one")
@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "the benchmark needs a GPU that JAX sees, and it sees cpu"),
        (["--quick", "--tune"], "--tune needs a GPU"),
        (
            ["--quick", "--implementations=xla,tritium"],
            "'tritium' of decode_attention; there is reference, xla",
        ),
        (
            ["--quick", "--implementations=triton"],
            "'triton' of decode_attention cannot run here: it needs an NVIDIA GPU",
        ),
    ],
)
def what_cannot_be_run_is_said_in_one_line_test(arguments, what, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(arguments)
    assert exit.value.code == 2
    assert what in capsys.readouterr().err.splitlines()[-1]


def a_quick_run_writes_machine_copy_rate_and_results_test(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "PROGRAM_SECONDS", 1e-4)
    monkeypatch.setattr(bench, "quick_cases", lambda names: [(SMALL, names)])
    file = tmp_path / "kernels.json"
    assert bench.main(["--quick", "--implementations=xla", f"--output={file}"]) == 0
    report = json.loads(file.read_text())
    assert report["machine"]["packages"]["jax"] == jax.__version__
    assert report["machine"]["command"].endswith(f"--implementations=xla --output={file}")
    assert report["copy_bytes_per_second"] == max(report["copies_bytes_per_second"].values())
    (result,) = report["results"]
    assert {key: result[key] for key in vars(SMALL)} == vars(SMALL)
    assert f"wrote {file}" in capsys.readouterr().out
