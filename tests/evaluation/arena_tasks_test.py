"""The arena's tasks on a model of two layers: equal slots, solved cells, no code unasked."""

import gzip
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.checkpoints.gates import Measured, StoredGates, load_gates, model_hash, save_gates
from dmc_jax.config import ModelConfig
from dmc_jax.core.gates import Gates
from dmc_jax.evaluation import arena, human_eval
from dmc_jax.evaluation.arena import Arena, about_gates
from dmc_jax.evaluation.arena_config import ArenaConfig, FunctionConfig, NeedleConfig
from dmc_jax.evaluation.arena_tables import maps
from dmc_jax.evaluation.human_eval import PROBLEMS
from dmc_jax.evaluation.plots import found_by_depth
from dmc_jax.evaluation.record import Record, open_record
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.model.llama import init_params, unstack_layers
from dmc_jax.policies.dms import DMS
from tests.evaluation.byte_tokenizer import ByteTokenizer

CONFIG = ModelConfig(
    vocab_size=259,
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    max_length=512,
    tied_embeddings=True,
)
ENTRY = {
    "task_id": "HumanEval/0",
    "prompt": 'def one():\n    """ One. """\n',
    "entry_point": "one",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
    "canonical_solution": "    return 1\n",
}
ESSAYS = {"a.txt": b"One thing is small. Two are more. " * 9}
NEEDLES = NeedleConfig(lengths=(256,), depths=(20.0, 90.0), trials=1)


def some_gates(params):
    rng = np.random.default_rng(5)
    arrays = np.zeros((2, 16)), np.ones((2, 16)), rng.normal(size=(2, 16))
    policy = DMS(Gates(*(jnp.asarray(x, "f4") for x in (*arrays, np.zeros(2)))), 9.0, delay=4)
    table = Measured(9.0, 1.0), Measured(-9.0, 3.0)
    return StoredGates(policy, model_hash(params, CONFIG), table, {"by": "a test"})


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


@pytest.fixture
def run(params, tmp_path, monkeypatch):
    """Takes fields of a config; gives the record's rows and what was said."""
    save_gates(tmp_path / "some_dms.safetensors", some_gates(params))
    gates = (load_gates(tmp_path / "some_dms.safetensors", CONFIG),)
    content = gzip.compress(f"{json.dumps(ENTRY)}\n".encode() * 3)
    files = {PROBLEMS: {"problems": content}}
    monkeypatch.setattr(arena, "package_files", lambda *file: files.get(file, ESSAYS))
    model = types.SimpleNamespace(params=params, config=CONFIG)
    unstacked, text = unstack_layers(params, CONFIG, "float32"), ByteTokenizer()

    def write(policy, kv_dtype, prompts, new_tokens, stop):
        pages = {"kv_bytes": 2**24, "kv_dtype": kv_dtype}
        engine = Engine(unstacked, CONFIG, text, policy=policy, max_sequences=8, **pages)
        params = SamplingParams(new_tokens, temperature=0.0, stop=tuple(stop))
        return engine.generate(prompts, params)

    def run(*contests, **fields):
        said = []
        record = open_record(tmp_path / "tasks.json", {"gates": about_gates(gates)}, ())
        record.report = said.append
        config = ArenaConfig(contests=contests, ratios=(2.0,), needles=NEEDLES, **fields)
        arena.run(Arena(config, model, text, None, gates, (), record, write, None))
        return json.loads((tmp_path / "tasks.json").read_text())["rows"], said

    return run


def cells_that_the_dense_model_does_not_solve_are_not_compared_test(run):
    rows, said = run("passkey")
    assert [row["method"] for row in rows] == ["dense"]
    assert rows[0]["found"] == {"20": 0.0, "90": 0.0} and rows[0]["ratio_at_end"] == 1.0
    assert "the dense model solves nothing to compare with" in said[-1]


def methods_are_compared_where_it_does_at_the_gates_slots_and_once_test(run, monkeypatch):
    shares = iter([0.2, 1.0])  # of dense, at 20 and 90 percent; then of whoever comes
    monkeypatch.setattr("dmc_jax.evaluation.needle.found", lambda *_: next(shares, 0.5))
    rows, said = run("needle", others=("StreamingLLM",))
    assert [row["method"] for row in rows] == ["dense", "some_dms", "StreamingLLM"]
    assert len(said) == 3
    ours = rows[1]
    assert ours["asked"] == 2.0 and ours["ratio_at_end"] > 1.2
    for row in rows[1:]:
        assert row["found"] == {"90": 0.5} and row["nats"].keys() == {"90"}
        assert row["end_slots"] == pytest.approx(ours["end_slots"], rel=0.02)
        assert row["cache_bytes"] < row["dense_bytes"]
        assert row["length"] == 256 and row.get("like", 2.0) == 2.0
    # A second run goes on where the first was.
    again, said = run("needle", others=("StreamingLLM",), budgets=("grows", "end"))
    assert again[:3] == rows and len(said) == 1
    assert again[3]["end_slots"] == pytest.approx(ours["end_slots"], abs=0.51)


def maps_show_what_was_found_a_panel_a_method_test():
    def row(length, found, method="dense", **about):
        case = {"contest": "needle", "length": length, "method": method, "ratio_at_end": 2.0}
        return case | {"found": found} | about

    rows = [
        row(256, {"20": 1.0, "90": 0.5}),
        row(512, {"20": 0.0, "90": 1.0}),
        row(256, {"20": 0.25}, "TOVA", budget="grows", like=2.0),
        row(256, {"20": 0.75}, "TOVA", budget="grows", like=4.0),
    ]
    panels = [p for p in found_by_depth(maps(Record(None, {}, rows), "needle")).axes if p.images]
    assert [p.get_title() for p in panels] == ["dense", "TOVA\ngrows 2x", "TOVA\ngrows 4x"]
    dense, tova, _ = (p.images[0].get_array().filled(np.nan) for p in panels)
    np.testing.assert_array_equal(dense, [[1.0, 0.0], [0.5, 1.0]])
    np.testing.assert_array_equal(tova, [[0.25, np.nan], [np.nan, np.nan]])


@pytest.mark.slow
def the_dense_model_and_gates_also_have_pages_of_int8_test(run, monkeypatch):
    monkeypatch.setattr("dmc_jax.evaluation.needle.found", lambda *_: 1.0)
    rows, _ = run("needle", others=("StreamingLLM",), kv_dtypes=("float32", "int8"))
    told = [(row["method"], row["kv_dtype"]) for row in rows]
    pairs = itertools.product(("dense", "some_dms"), ("float32", "int8"))
    assert told == [*pairs, ("StreamingLLM", "float32")]
    H = CONFIG.head_dim
    for plain, rounded in (rows[:2], rows[2:4]):
        assert rounded["cache_bytes"] == pytest.approx(plain["cache_bytes"] * (H + 4) / (4 * H))
        assert rounded["nats"] == pytest.approx(plain["nats"], abs=0.01)


def what_the_model_wrote_is_run_only_when_asked_for_test(run, monkeypatch, tmp_path):
    programs = []
    monkeypatch.setattr(human_eval, "verdict", lambda text: programs.append(text) or "passed")
    rows, _ = run("humaneval", others=(), functions=FunctionConfig(new_tokens=8))
    assert not programs and len(rows) == 2
    for row in rows:
        assert not {"pass_at_1", "passed"} & row.keys() and row["run_code"] is False
        assert len(row["new_tokens"]) == row["problems"] == 3
        assert row["mean_new_tokens"] == np.mean(row["new_tokens"])
        # That of a model that knows nothing, per byte.
        assert row["solution_nats"] == pytest.approx(np.log(259), abs=0.3)
    asked = FunctionConfig(new_tokens=8, run_code=True)
    rows, _ = run("humaneval", others=(), functions=asked)
    assert len(programs) == 6 and len(rows) == 4
    assert all(text.startswith('def one():\n    """ One. """') for text in programs)
    assert rows[2]["passed"] == [1, 1, 1] and rows[3]["pass_at_1"] == 1.0
    assert rows[2]["network"] in ("cut", "open")
