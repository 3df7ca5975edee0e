"""A file of gates serves the model that it was made for, at the ratios that were measured."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from dmc_jax.checkpoints import models
from dmc_jax.checkpoints.gates import (
    SHIPPED,
    Measured,
    StoredGates,
    find_gates,
    gates_for,
    load_gates,
    model_hash,
    save_gates,
)
from dmc_jax.checkpoints.metadata import Metadata
from dmc_jax.core.dmc import DMCSettings
from dmc_jax.core.gates import Gates, gate_logits
from dmc_jax.data.tokenizer import Tokenizer
from dmc_jax.errors import UserError
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.policies.delayed_dmc import DelayedDMC
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.dms import DMS
from tests.tiny_llama import build

PARAMS, CONFIG = build(kv_heads=(4, 2))
ROWS = 6
SHIPPED_NAMES = sorted(file.stem for file in SHIPPED.glob("*.safetensors")) or ["none yet"]
TABLE = tuple(Measured(*entry) for entry in ((2.0, 1.0), (0.5, 1.5), (-1.0, 3.0)))


def some_gates():
    rng = np.random.default_rng(3)
    shapes = {"mean": (2, 32), "deviation": (2, 32), "weight": (ROWS, 32), "bias": (ROWS,)}
    return Gates(
        **{name: jnp.asarray(rng.uniform(0.1, 1, shape), "f4") for name, shape in shapes.items()}
    )


def stored(**changes):
    about = {"command": "python -m somewhere", "tokens": 7}
    fields = {"base_sha256": model_hash(PARAMS, CONFIG), "table": TABLE, "about": about}
    return StoredGates(**{"policy": DMS(some_gates(), 2.0, delay=4), **fields, **changes})


@pytest.fixture
def file(tmp_path):
    save_gates(tmp_path / "gates.safetensors", stored())
    return tmp_path / "gates.safetensors"


def a_file_gives_back_what_was_stored_test(file):
    got = load_gates(file, CONFIG)
    jax.tree.map(np.testing.assert_array_equal, got.policy, stored().policy)
    assert (got.base_sha256, got.table, got.about) == (
        stored().base_sha256,
        TABLE,
        stored().about,
    )
    (file.parent / "other").touch()
    assert file.stat().st_mode == (file.parent / "other").stat().st_mode  # for whom umask says


def merging(**changes):
    rng, gates = np.random.default_rng(4), some_gates()
    more = {"importance_weight": (ROWS, 32), "importance_bias": (ROWS,), "gamma": (ROWS,)}
    more = {name: jnp.asarray(rng.normal(size=shape), "f4") for name, shape in more.items()}
    gates = dataclasses.replace(gates, **more)
    settings = DMCSettings(window=5, offset=0.0)
    return DelayedDMC(**{"gates": gates, "threshold": 2.0, "settings": settings, **changes})


@pytest.mark.parametrize(
    "policy",
    [
        merging(),
        merging(gates=some_gates(), delay=0),
        merging(margin=np.asarray(0.7)),  # as training leaves it
    ],
)
def a_file_of_gates_that_merge_gives_back_what_was_stored_test(policy, tmp_path):
    save_gates(tmp_path / "merge", stored(policy=policy))
    got = load_gates(tmp_path / "merge", CONFIG).policy
    jax.tree.map(np.testing.assert_array_equal, got, policy)
    assert (got.delay, got.settings) == (policy.delay, policy.settings)


def a_gate_is_linear_in_standardised_inputs_test():
    gates, x = some_gates(), np.random.default_rng(0).normal(size=(2, 5, 32)).astype(np.float32)
    got = gate_logits(gates.of_layer(1, 4, 2), jnp.asarray(x))
    mean, deviation = (np.asarray(y, np.float64)[1] for y in (gates.mean, gates.deviation))
    weight, bias = (np.asarray(y, np.float64)[4:] for y in (gates.weight, gates.bias))
    np.testing.assert_allclose(got, (x - mean) / deviation @ weight.T + bias, rtol=1e-4, atol=1e-4)


def a_ratio_is_looked_up_between_those_that_were_measured_test():
    assert [stored().at(ratio).threshold for ratio in (1.0, 1.5, 3.0)] == [2.0, 0.5, -1.0]
    assert stored().at(1.5 * 2**0.5).threshold == pytest.approx(-0.25)
    for ratio in (0.9, 3.1):
        with pytest.raises(UserError, match=f"measured from 1 to 3, got {ratio}"):
            stored().at(ratio)


def a_model_is_known_in_any_dtype_and_no_other_is_taken_for_it_test():
    known = model_hash(PARAMS, CONFIG)
    assert model_hash(jax.tree.map(jnp.asarray, PARAMS), CONFIG) == known
    assert model_hash(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS), CONFIG) == known
    other = jax.tree.map(np.array, PARAMS)
    other["embedding"][:] *= 1.01
    assert model_hash(other, CONFIG) != known
    assert model_hash(PARAMS, dataclasses.replace(CONFIG, rope_theta=5e5)) != known


class Ids(Tokenizer):
    vocab_size, bos_id, eos_id, pad_id = 50, 1, -1, 0

    def encode(self, text):
        raise NotImplementedError

    def decode(self, ids):
        return " ".join(map(str, ids))


def model_of(params=PARAMS, policy=None):
    return models.LoadedModel(
        path=Path("model"),
        format="huggingface",
        metadata=Metadata("", 0, CONFIG, policy or Dense(), "float32"),
        tokenizer=Path(__file__),
        tokenizer_sha256=frozenset(),
        read_params=lambda shapes: params,
        params=params,
    )


@pytest.fixture
def without_tokenizer(monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda *_: Ids())


def engine_of(model=None, **options):
    model = model or model_of()
    return Engine.from_checkpoint(
        model, kv_bytes=2**20, max_sequences=1, page_size=8, dtype="float32", **options
    )


def an_engine_drops_tokens_by_gates_test(file, without_tokenizer):
    prompt, params = [1, *range(3, 40)], SamplingParams(4, temperature=0.0)
    [dense] = engine_of().generate([prompt], params)
    kept, dropped = (
        engine_of(gates=file, threshold=threshold).generate([prompt], params)[0]
        for threshold in (1e9, -1e9)
    )
    assert (kept.tokens, kept.ratio) == (dense.tokens, 1.0)
    assert dropped.ratio == pytest.approx((len(prompt) + 3) / 4)  # the delay is all that stays
    with pytest.raises(UserError, match="measured from 1 to 3, got 9"):
        engine_of(gates=file, ratio=9.0)


@pytest.mark.slow
def an_engine_merges_tokens_by_gates_test(without_tokenizer, tmp_path):
    """Kept at a high threshold; at a low one a segment and the tail are all that stays."""
    save_gates(tmp_path / "merge", stored(policy=merging(delay=4)))
    prompt, params = [1, *range(3, 40)], SamplingParams(4, temperature=0.0)
    [dense] = engine_of().generate([prompt], params)
    kept, merged = (
        engine_of(gates=tmp_path / "merge", threshold=threshold).generate([prompt], params)[0]
        for threshold in (1e9, -1e9)
    )
    assert (kept.tokens, kept.ratio) == (dense.tokens, 1.0)
    assert merged.ratio == pytest.approx((len(prompt) + 3) / 5)
    assert merged.dense_cache_bytes == kept.dense_cache_bytes == dense.dense_cache_bytes
    # Two bytes a slot say how many tokens it has.
    page = 8 * (2 * CONFIG.head_dim * 4 + 2)
    assert merged.live_cache_bytes == ROWS * page


def gates_of_another_model_are_refused_test(file, without_tokenizer, tmp_path):
    other = jax.tree.map(lambda x: 1.01 * x, PARAMS)
    with pytest.raises(UserError, match="was made for another model"):
        engine_of(model_of(other), gates=file)
    with pytest.raises(UserError, match="models as they were pretrained"):
        engine_of(model_of(policy=DMC(DMCSettings())), gates=file)
    with pytest.raises(UserError, match=r"sizes .*'bias': \(6,\).* needs .*'bias': \(4,\)"):
        load_gates(file, build()[1])
    with pytest.raises(UserError, match="ratio: .* or a file of gates, not with dense"):
        engine_of(ratio=2.0)
    with pytest.raises(UserError, match="ratio: it is looked up in a file of gates"):
        engine_of(gates=file, ratio=2.0, threshold=0.0)


def changed(file, change):
    arrays = load_file(file)
    about = {"version": 1, "method": "dms", "delay": 4, "base_sha256": "0", "about": {}}
    about |= {"table": [{"threshold": 0.0, "ratio": 1.0}]}
    metadata = {"dmc_jax": json.dumps(about | change)}
    save_file(arrays, file, metadata)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"version": 2}, "of version 2: use a newer"),
        ({"method": "magic"}, "gates for 'magic'"),
        ({"table": []}, "is damaged"),
        ({"table": [{"speed": 1}]}, "is damaged"),
        ({"table": [{"threshold": "high", "ratio": 1.0}]}, "threshold or ratio .* no number"),
        ({"delay": 0}, "delay: expected a token or more"),
        ({"method": "dmc"}, "is damaged: 'settings'"),
        ({"method": "dmc", "settings": {"offset": 0.0}, "margin": "wide"}, "margin is no number"),
        ({"method": "dmc", "settings": {"window": -1}}, "window must be >= 1, .* got -1"),
    ],
)
def a_file_of_something_else_is_named_test(file, change, complaint):
    changed(file, change)
    with pytest.raises(UserError, match=complaint):
        load_gates(file, CONFIG)


def half_an_importance_is_named_test(tmp_path):
    save_gates(tmp_path / "merge", stored(policy=merging()))
    arrays = load_file(tmp_path / "merge")
    with safetensors.safe_open(tmp_path / "merge", "numpy") as file:
        metadata = file.metadata()
    del arrays["importance_bias"]
    save_file(arrays, tmp_path / "half", metadata)
    with pytest.raises(UserError, match=r"sizes .* needs .*'importance_bias': \(6,\)"):
        load_gates(tmp_path / "half", CONFIG)


def what_is_no_file_of_gates_is_named_test(file):
    for content in (b"", file.read_bytes()[:100], b"version https://git-lfs"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"gates.safetensors is not a file of gates"):
            load_gates(file, CONFIG)
    save_file({"x": np.zeros(2)}, file)
    with pytest.raises(UserError, match="has tensors, but no gates"):
        load_gates(file, CONFIG)
    with pytest.raises(UserError, match="absent is not a file of gates"):
        load_gates(file.with_name("absent"), CONFIG)


def gates_that_come_along_are_found_by_name_and_a_file_of_that_name_wins_test(
    file, tmp_path, monkeypatch
):
    folder = tmp_path / "shipped"
    folder.mkdir()
    for name in ("small_dms", "large_dms"):
        (folder / f"{name}.safetensors").write_bytes(file.read_bytes())
    assert find_gates("small_dms", folder) == folder / "small_dms.safetensors"
    assert find_gates(file, folder) == file
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large_dms").mkdir()  # is no file of gates
    assert find_gates("large_dms", folder) == folder / "large_dms.safetensors"
    (tmp_path / "small_dms").write_bytes(file.read_bytes())
    assert find_gates("small_dms", folder) == Path("small_dms")
    with pytest.raises(UserError, match="^huge is no file, .* are large_dms, small_dms$"):
        find_gates("huge", folder)
    with pytest.raises(UserError, match=f"come with dmc_jax, which are {', '.join(SHIPPED_NAMES)}"):
        gates_for("huge", CONFIG)
