"""Checkpoints come back bit for bit, and no failure ever passes for one."""

import dataclasses
import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dmc_jax.checkpoints import digests, states
from dmc_jax.checkpoints.metadata import Metadata, load_metadata, write_metadata
from dmc_jax.checkpoints.run_directory import CheckpointRef, latest
from dmc_jax.errors import UserError
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense

ROOT = Path(__file__).parents[2]


class TrainState(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array
    old_key: jax.Array


def make_state(seed=0, width=8):
    w = jax.random.normal(jax.random.key(seed), (width, 4))
    params = {"layers": {"w": w, "b": jnp.linspace(0, 1, 4, dtype=jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95))
    opt_state = optimizer.init(params)
    _, opt_state = optimizer.update(jax.tree.map(jnp.sin, params), opt_state, params)
    step = jnp.int32(17)
    return TrainState(step, params, opt_state, jax.random.key(3), jax.random.PRNGKey(4))


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: tree),
    )


def words(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_bit_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert words(a) == words(b), path


def about(step=1, **more):
    return Metadata("retrofit", step, PRESETS["tiny"], Dense(), "float32", **more)


def save(run, stage="retrofit", steps=(1,), keep=3, state=None, data_state=None, **more):
    state = make_state() if state is None else state
    with states.open_for_saving(run, stage, keep) as saver:
        for step in steps:
            at = {"at": step} if data_state is None else data_state
            saver.save(step, state, at, about(step, **more))
    return latest(run)


def a_saved_state_comes_back_bit_for_bit_test(tmp_path):
    state = make_state()
    ref = save(tmp_path, state=state)
    assert_bit_equal(states.load_state(ref, abstract(state)), state)


def the_state_may_be_donated_as_soon_as_save_returns_test(tmp_path):
    state = {"params": jnp.arange(1 << 20, dtype=jnp.float32)}
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with states.open_for_saving(tmp_path, "retrofit", 1) as saver:
        saver.save(1, state, {}, about())
        jax.block_until_ready(step(state))
    restored = states.load_state(latest(tmp_path), abstract(expected))
    np.testing.assert_array_equal(restored["params"], expected["params"])


@pytest.mark.parametrize("shape, spec", [((4, 2), P("x", "y")), ((1, 8), P("y")), ((2, 4), P())])
def a_state_saved_on_one_mesh_restores_on_another_test(tmp_path, shape, spec):
    saved_on = NamedSharding(Mesh(np.array(jax.devices()).reshape(8, 1), ("x", "y")), P("x"))
    state = {"params": jax.device_put(jnp.arange(64.0).reshape(16, 4), saved_on)}
    ref = save(tmp_path, state=state)
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(shape), ("x", "y")), spec)
    restored = states.load_state(ref, abstract(state, sharding))
    assert restored["params"].sharding == sharding
    np.testing.assert_array_equal(restored["params"], state["params"])


def a_mesh_that_does_not_divide_the_array_is_not_called_damage_test(tmp_path):
    state = {"params": jnp.zeros(6)}
    ref = save(tmp_path, state=state)
    eight = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), P("x"))
    with pytest.raises(ValueError, match="divi"):
        states.load_state(ref, abstract(state, eight))


def restoring_casts_to_the_dtype_asked_for_test(tmp_path):
    ref = save(tmp_path, state={"params": jnp.full(3, 1 / 3)})
    asked = {"params": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    restored = states.load_state(ref, asked)
    assert restored["params"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(restored["params"], jnp.full(3, 1 / 3, jnp.bfloat16))


def parameters_load_without_the_optimizer_state_test(tmp_path):
    state = make_state()
    ref = save(tmp_path, state=state)
    assert_bit_equal(states.load_params(ref, abstract(state.params)), state.params)


def parameters_load_where_the_rest_of_the_state_is_of_another_shape_test(tmp_path):
    state = make_state()
    ref = save(tmp_path, state={"params": state.params, "other": jnp.zeros(99)})
    assert_bit_equal(states.load_params(ref, abstract(state.params)), state.params)


@pytest.mark.parametrize("data_state", [b"\x00\xffgrain", {"last_seen": {"0": 12}, "epoch": None}])
def the_data_state_comes_back_as_it_was_given_test(tmp_path, data_state):
    assert states.load_data_state(save(tmp_path, data_state=data_state)) == data_state


def metadata_can_be_rewritten_after_the_save_test(tmp_path):
    ref = save(tmp_path, stage="finetune", validation={"ratio": 4.0})
    found = load_metadata(ref)
    assert found == about(validation={"ratio": 4.0})
    write_metadata(ref, dataclasses.replace(found, data="elsewhere"))
    assert load_metadata(ref) == about(validation={"ratio": 4.0}, data="elsewhere")
    assert_bit_equal(states.load_state(ref, abstract(make_state())), make_state())


def a_failed_rewrite_leaves_the_former_metadata_test(tmp_path, monkeypatch):
    ref = save(tmp_path)
    files = sorted((ref.path / "metadata").iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device .* former metadata is intact"):
        write_metadata(ref, about(data="elsewhere"))
    assert load_metadata(ref) == about()
    assert sorted((ref.path / "metadata").iterdir()) == files


def metadata_that_is_not_json_is_refused_before_anything_is_written_test(tmp_path):
    with (
        states.open_for_saving(tmp_path, "retrofit", 1) as saver,
        pytest.raises(TypeError, match="not JSON serializable"),
    ):
        saver.save(1, make_state(), {}, about(validation={"ratio": np.float32(4)}))
    assert latest(tmp_path) is None


@pytest.mark.parametrize("keep, left", [(1, ["4"]), (2, ["3", "4"]), (9, ["1", "2", "3", "4"])])
def the_newest_k_steps_of_each_stage_stay_test(tmp_path, keep, left):
    save(tmp_path, "zero_out", steps=(1,), keep=1)
    save(tmp_path, "retrofit", steps=(1, 2, 3, 4), keep=keep)
    assert sorted(entry.name for entry in (tmp_path / "retrofit").iterdir()) == left
    assert sorted(entry.name for entry in (tmp_path / "zero_out").iterdir()) == ["1"]


def latest_is_the_furthest_stage_and_its_newest_step_test(tmp_path):
    assert latest(tmp_path / "nowhere") is None
    save(tmp_path, "pretrain", steps=(900,))
    assert (latest(tmp_path).stage, latest(tmp_path).step) == (
        "pretrain",
        900,
    )
    save(tmp_path, "retrofit", steps=(9, 10))
    save(tmp_path, "zero_out", steps=(250,))
    newest = CheckpointRef(tmp_path / "retrofit" / "10", "retrofit", 10)
    assert latest(tmp_path) == newest
    assert latest(str(tmp_path / "retrofit")) == newest
    assert latest(tmp_path / "zero_out").step == 250
    assert latest(tmp_path / "retrofit" / "9").step == 9


def a_run_directory_may_itself_be_named_like_a_stage_test(tmp_path):
    save(tmp_path / "retrofit", "finetune", steps=(5,))
    assert latest(tmp_path / "retrofit").stage == "finetune"


def a_partial_directory_is_never_the_latest_test(tmp_path):
    save(tmp_path, steps=(5,))
    stage = tmp_path / "retrofit"
    (stage / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (stage / "7" / "state").mkdir(parents=True)
    (stage / "7" / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "finetune").mkdir()
    assert latest(tmp_path).step == 5
    assert latest(stage / "7") is None


def opening_a_stage_clears_what_an_interrupted_save_left_test(tmp_path):
    save(tmp_path, steps=(5,))
    (tmp_path / "retrofit" / "6.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    save(tmp_path, steps=(6,))
    assert sorted(entry.name for entry in (tmp_path / "retrofit").iterdir()) == ["5", "6"]


def another_shape_is_reported_leaf_by_leaf_test(tmp_path):
    ref = save(tmp_path, state=make_state(width=8))
    asked = abstract(make_state(width=16))
    assert states.describe_mismatch(ref, abstract(make_state(width=8))) == []
    with pytest.raises(UserError) as caught:
        states.load_state(ref, asked)
    message = str(caught.value)
    assert "checkpoint of another shape" in message
    assert "params.layers.w: (8, 4) in the checkpoint, expected (16, 4)" in message
    assert "layers.b" not in message
    with pytest.raises(UserError, match=r"params.layers.w: \(8, 4\)"):
        states.load_params(ref, asked.params)


def missing_and_left_over_leaves_are_reported_and_long_lists_cut_test(tmp_path):
    ref = save(tmp_path, state={"params": {f"a{i}": jnp.zeros(2) for i in range(9)}})
    with pytest.raises(UserError) as caught:
        states.load_state(ref, abstract({"params": {"b": jnp.zeros(2)}}))
    message = str(caught.value)
    assert "params.a0: (2,) in the checkpoint, not expected" in message
    assert "and 5 more" in message
    assert "params.b: not in the checkpoint, expected (2,)" in states.describe_mismatch(
        ref, abstract({"params": {"b": jnp.zeros(2)}})
    )


def an_existing_step_is_never_overwritten_test(tmp_path):
    save(tmp_path, steps=(5,), state={"params": jnp.zeros(2)})
    for step in (4, 5):
        with (
            pytest.raises(UserError, match="step 5 is there"),
            states.open_for_saving(tmp_path, "retrofit", 2) as saver,
        ):
            saver.save(step, {"params": jnp.ones(2)}, {}, about())
    with states.open_for_saving(tmp_path, "retrofit", 2, resumed_step=5) as saver:
        assert saver.save(5, {"params": jnp.ones(2)}, {}, about()) is False
        assert saver.save(6, {"params": jnp.ones(2)}, {}, about()) is True
    ref = latest(tmp_path / "retrofit" / "5")
    assert not np.any(states.load_params(ref, jax.ShapeDtypeStruct((2,), jnp.float32)))


@pytest.mark.parametrize(
    "stage, keep, message", [("Retrofit", 1, "zero_out"), ("retrofit", 0, "keep")]
)
def a_wrong_stage_or_keep_is_refused_test(tmp_path, stage, keep, message):
    with pytest.raises(UserError, match=message):
        states.open_for_saving(tmp_path, stage, keep)


def a_run_directory_that_is_a_file_is_one_clear_error_test(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints in .*Not a directory"):
        states.open_for_saving(tmp_path / "run", "retrofit", 1)


@pytest.mark.parametrize("item", ["state", "data", "metadata"])
def a_flipped_byte_is_told_and_nothing_is_read_test(tmp_path, item):
    state = {"params": jax.random.normal(jax.random.key(0), (1000,))}
    read = {
        "state": lambda ref: states.load_state(ref, abstract(state)),
        "data": states.load_data_state,
        "metadata": load_metadata,
    }
    ref = save(tmp_path, state=state)
    for load in read.values():
        load(ref)
    rng = np.random.default_rng(0)
    files = [file for file in (ref.path / item).rglob("*") if file.is_file()]
    for file in files:
        whole = file.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        with pytest.raises(UserError, match=f"{file.name} is not as it was written.*damaged"):
            read[item](ref)
        file.write_bytes(whole)
    read[item](ref)
    files[0].unlink()
    with pytest.raises(UserError, match=f"{files[0].name} is missing.*damaged"):
        read[item](ref)


def metadata_may_be_written_anew_test(tmp_path):
    ref = save(tmp_path)
    write_metadata(ref, dataclasses.replace(load_metadata(ref), step=3))
    assert load_metadata(ref).step == 3 and digests.damage(ref.path) is None
    (ref.path / "digests.json").unlink()  # by a version that wrote none
    write_metadata(ref, dataclasses.replace(load_metadata(ref), step=4))
    assert load_metadata(ref).step == 4


@pytest.mark.parametrize("content", ["{", "[3]", ""])
def damaged_digests_are_one_clear_error_test(tmp_path, content):
    ref = save(tmp_path)
    (ref.path / "digests.json").write_text(content)
    for use in (load_metadata, states.load_data_state):
        with pytest.raises(UserError, match="digests.json is damaged"):
            use(ref)
    with pytest.raises(UserError, match="digests.json is damaged"):
        write_metadata(ref, about(1))


def a_damaged_checkpoint_is_one_clear_error_test(tmp_path):
    state = {"params": jax.random.normal(jax.random.key(0), (1000,))}
    ref = save(tmp_path, state=state)
    for file in (ref.path / "state").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match="cannot read checkpoint .*damaged"):
        states.load_state(ref, abstract(state))
    (ref.path / "metadata" / "metadata").write_text("{")
    with pytest.raises(UserError, match="cannot read .*metadata.*damaged"):
        load_metadata(ref)


def orbax_can_be_told_to_keep_its_progress_to_itself_test(tmp_path, monkeypatch):
    seen = []
    logger = logging.getLogger("absl")
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handlers", [handler])
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)
    try:
        save(tmp_path / "loud")
        assert len(seen) > 5
        seen.clear()
        states.quiet_orbax()
        save(tmp_path / "quiet")
        absl.logging.info("of the run itself")
    finally:
        absl.logging.set_verbosity(level)
    assert seen == ["of the run itself"]


ABOUT = """
from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.model.presets import PRESETS
from dmc_jax.policies.dense import Dense

def about(step):
    return Metadata("retrofit", step, PRESETS["tiny"], Dense(), "float32")
"""

# A limit on a file's size stands for a full disk: the write fails in Orbax's thread, with an errno.
WRITE_TO_A_FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp
from dmc_jax.checkpoints import digests, states
from dmc_jax.checkpoints.run_directory import latest

state = {"params": jax.random.normal(jax.random.key(0), (1 << 18,))}
saver = states.open_for_saving(sys.argv[1], "retrofit", 1)
saver.save(1, state, {}, about(1))
saver.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
saver.save(2, state, {}, about(2))
try:
    saver.wait()
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
found = latest(sys.argv[1])
print("newest", found.step)
loaded = states.load_state(found, state)
print("equal", bool((loaded["params"] == state["params"]).all()))
saver.save(2, state, {}, about(2))
saver.close()
print("then", latest(sys.argv[1]).step)
"""


def run_python(code, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def a_full_disk_is_one_clear_error_and_the_previous_checkpoint_stays_test(tmp_path):
    process = run_python(ABOUT + WRITE_TO_A_FULL_DISK, tmp_path)
    output, _ = process.communicate(timeout=120)
    lines = output.splitlines()
    assert len(lines) == 4, output
    expected = f"could not write checkpoint {tmp_path}/retrofit/2: {os.strerror(errno.EFBIG)} ("
    assert lines[0].startswith(expected)
    assert "step 1 is intact" in lines[0]
    assert lines[1:] == ["newest 1", "equal True", "then 2"]
    assert process.returncode == 0


SAVE_FOR_EVER = """
import sys
import jax.numpy as jnp
from dmc_jax.checkpoints import digests, states
from dmc_jax.checkpoints.run_directory import latest

with states.open_for_saving(sys.argv[1], "retrofit", 2) as saver:
    for step in range(1, 10_000):
        saver.save(step, {"params": jnp.full((64, 1 << 14), step)}, {}, about(step))
        print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02])
def a_kill_in_mid_save_leaves_a_whole_checkpoint_test(tmp_path, delay):
    process = run_python(ABOUT + SAVE_FOR_EVER, tmp_path)
    while process.stdout.readline() != "4\n":
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = latest(tmp_path)
    assert found.step >= 3  # saving 4 began, so saving 3 had ended
    assert load_metadata(found) == about(found.step)
    params = states.load_params(found, jax.ShapeDtypeStruct((64, 1 << 14), jnp.int32))
    assert bool((params == found.step).all())
    save(tmp_path, steps=(found.step + 1,), state={"params": jnp.zeros(2)})
    assert latest(tmp_path).step == found.step + 1
