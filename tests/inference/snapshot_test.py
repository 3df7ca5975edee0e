"""What is on disk of a sequence; `engine_test` has what becomes of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.inference.pages import Pages
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import CachedRows, Snapshot, load_snapshot


def snapshot_with_open_segments(dtype, counted=False):
    """Of two rows whose rings of four tokens are full, or half full."""
    rng = np.random.default_rng(0)
    there = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
    keys, values = (
        np.where(there[..., None], rng.normal(size=(2, 4, 6)), 0).astype(dtype) for _ in range(2)
    )
    weights = np.where(there, rng.uniform(0.1, 1, there.shape), 0).astype(np.float32)
    state = {".keys": keys, ".values": values, ".weights": weights}
    pages = Pages(*(rng.normal(size=(2, 2, 8, 6)).astype(dtype)))
    if dtype == np.int8:
        scales = rng.uniform(0.1, 1, (2, 2, 8)).astype(jnp.bfloat16)
        pages = dataclasses.replace(pages, k_scale=scales[0], v_scale=scales[1])
    if counted:
        pages = dataclasses.replace(pages, tokens=rng.integers(1, 12, (2, 8)).astype(np.uint16))
    state[".count"] = there.sum(axis=1).astype(np.int32)
    rows = CachedRows(pages, np.array([3, 5], np.int32), state, position=9)
    return Snapshot({}, (1, 2), (3,), SamplingParams(), rows)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8])
def a_snapshot_is_read_as_it_was_saved_test(tmp_path, dtype, counted):
    snapshot = snapshot_with_open_segments(dtype, counted)
    snapshot.save(tmp_path / "it")
    loaded = load_snapshot(tmp_path / "it")
    assert jax.tree.structure(loaded.rows.pages) == jax.tree.structure(snapshot.rows.pages)
    jax.tree.map(np.testing.assert_array_equal, loaded.rows.pages, snapshot.rows.pages)
    assert loaded.rows.state.keys() == snapshot.rows.state.keys()
    for name, array in snapshot.rows.state.items():
        assert loaded.rows.state[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.rows.state[name], array)


def pages_of_older_snapshots_are_of_the_dtype_of_the_forward_pass_test(tmp_path):
    snapshot = snapshot_with_open_segments(jnp.bfloat16)
    dataclasses.replace(snapshot, model={"dtype": "bfloat16"}).save(tmp_path / "it")
    with np.load(tmp_path / "it") as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"])) | {"version": 3}
    arrays["about"] = np.array(json.dumps(about))
    np.savez(tmp_path / "old.npz", **arrays)
    assert load_snapshot(tmp_path / "old.npz").model == {
        "dtype": "bfloat16",
        "kv_dtype": "bfloat16",
    }


def open_segments_that_were_saved_as_products_are_read_as_tokens_test(tmp_path):
    snapshot = snapshot_with_open_segments(jnp.bfloat16)
    snapshot.save(tmp_path / "it")
    with np.load(tmp_path / "it") as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    del about["version"]
    arrays["about"] = np.array(json.dumps(about))
    state = snapshot.rows.state
    for name in (".keys", ".values"):
        arrays["state" + name] = state[".weights"][..., None] * state[name].astype(np.float32)
    np.savez(tmp_path / "old.npz", **arrays)
    loaded = load_snapshot(tmp_path / "old.npz").rows.state
    for name, array in state.items():
        np.testing.assert_array_equal(loaded[name].astype(array.dtype), array)
