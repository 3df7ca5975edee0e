"""Every format into ours and on to Hugging Face's: the weights bit for bit, DMC settings kept."""

import numpy as np
import pytest

from dmc_jax.core.dmc import DMCSettings
from dmc_jax.interop.compare import compare, logits_of
from dmc_jax.interop.dmc_jax import write_dmc_jax
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source, recognise
from dmc_jax.policies.dense import Dense
from tests.interop import megatron_test, meta_test
from tests.interop.checkpoint_files import assert_same_bits, read_safetensors
from tests.interop.reference_llama import Sizes, random_weights, with_decisions


def chain(source, folder):
    """Through ours to Hugging Face's, twice; returns the two exports."""
    exports = []
    for name in ("first", "second"):
        ours, back = folder / f"{name}_ours", folder / f"{name}_hf"
        ours.mkdir()
        write_dmc_jax(source, ours, None, lambda _: None)
        back.mkdir()
        write_huggingface(open_source(ours), back, None, lambda _: None)
        exports.append(back)
        source = open_source(back)
    return exports


@pytest.mark.parametrize("shards", [1, 2])
def metas_weights_reach_hugging_face_with_every_bit_test(shards, tmp_path):
    sizes = Sizes(V=20)
    weights = random_weights(sizes)
    meta_test.write(tmp_path / "meta", meta_test.as_meta(weights, sizes, shards))
    assert recognise(tmp_path / "meta") == "meta"
    source = open_source(tmp_path / "meta")
    for export in chain(source, tmp_path):
        assert_same_bits(read_safetensors(export), weights)
        assert open_source(export).config == source.config
        assert open_source(export).policy == Dense()


@pytest.mark.parametrize("ranks, kv_heads", [(1, 4), (2, 2)])
def megatrons_dmc_model_reaches_hugging_face_and_comes_back_test(ranks, kv_heads, tmp_path):
    sizes = Sizes(K=kv_heads)
    weights = with_decisions(random_weights(sizes), sizes)
    folder = tmp_path / "megatron"
    megatron_test.write(folder, weights, sizes, ranks, vocab_size=sizes.V)
    assert recognise(folder) == "megatron"
    source = open_source(folder)
    for export in chain(source, tmp_path):
        assert_same_bits(read_safetensors(export), weights)
        back = open_source(export)
        assert (back.config, back.policy) == (source.config, source.policy)
        assert back.policy.settings == DMCSettings(
            window=4, temperature=0.25, offset=3.0, eps=2**-7
        )
    prompt = np.random.default_rng(0).integers(0, sizes.V, 20).tolist()
    [same] = compare(logits_of(source, [prompt]), logits_of(back, [prompt]))
    assert (same.largest, same.mean, same.agreement) == (0.0, 0.0, 1.0)
    np.testing.assert_array_equal(same.divergence, np.zeros(20))


def a_comparison_measures_what_it_says_test():
    a = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], np.float32))
    b = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]], np.float32)) + np.float32(1.0)
    [found] = compare([a], [b])
    np.testing.assert_allclose(found.largest, 1 + np.log(2), rtol=1e-5)
    np.testing.assert_allclose(found.mean, (1 + np.log(2) + 1 - np.log(2) + 4) / 6, rtol=1e-5)
    assert found.agreement == 0.5
    np.testing.assert_allclose(found.divergence, [0.25 * np.log(2), 0], atol=1e-6)


def a_logit_that_is_no_number_is_never_the_same_test():
    a, b = np.zeros((1, 3), np.float32), np.full((1, 3), np.nan, np.float32)
    [found] = compare([a], [b])
    assert np.isnan(found.largest) and not found.largest <= 1e9
