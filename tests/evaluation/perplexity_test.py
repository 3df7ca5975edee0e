"""Measured figures against cases counted by hand."""

import dataclasses
import functools
import io
import math

import jax
import numpy as np
import pytest
import sentencepiece

from dmc_jax.config import MeshConfig
from dmc_jax.core.dmc import DECISION_CHANNEL, DMCSettings
from dmc_jax.data.loader import windows
from dmc_jax.data.prepare import prepare
from dmc_jax.errors import UserError
from dmc_jax.evaluation import perplexity
from dmc_jax.evaluation.perplexity import calibrate_threshold, evaluate
from dmc_jax.model.llama import Llama, init_params
from dmc_jax.model.sharding import make_mesh, shardings
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.dmc import DMC
from dmc_jax.policies.policy import attend_whole

SETTINGS = DMCSettings(window=4, offset=2.0)
SIZES = {"length": 32, "batch": 4}


@pytest.fixture(scope="module")
def spread_params(model_config):
    """Random weights whose merge logits spread by several units around -2."""
    rng = np.random.default_rng(0)

    def weights(path, shape):
        values = rng.normal(0, 0.2, shape.shape).astype(np.float32)
        if path[-1].key == "scale":
            return np.ones_like(values)
        if path[-1].key == "kernel" and path[-2].key == "k":
            values[..., DECISION_CHANNEL] *= 6
        return values

    shapes = jax.eval_shape(lambda: init_params(model_config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(weights, shapes)


def a_model_without_preference_loses_log_v_and_counts_every_byte_test(
    data, model_config, spread_params
):
    uniform = {**spread_params, "embedding": 0 * spread_params["embedding"]}
    measured = evaluate(uniform, model_config, data, "validation", policy=Dense(), **SIZES)
    facts = data.manifest["splits"]["validation"]
    # Of every document all tokens are predicted but its BOS; together they are its text and EOS.
    predicted = facts["tokens"] - facts["documents"]
    assert measured.tokens == predicted
    assert measured.windows == -(-(facts["tokens"] - 1) // 32)
    assert measured.loss == pytest.approx(math.log(320), rel=1e-5)
    assert measured.perplexity == pytest.approx(320, rel=1e-4)
    assert measured.bits_per_byte == pytest.approx(
        predicted * math.log2(320) / facts["bytes"], rel=1e-5
    )
    assert measured.ratio == 1.0
    assert measured.ratio_by_head == ((1.0, 1.0), (1.0,))
    assert measured.cache_bytes(model_config, 10) == 10 * 3 * 8 * 2 * 2


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)], ids=lambda m: "x".join(map(str, m)))
def figures_depend_neither_on_the_batch_nor_on_the_devices_test(
    data, model_config, spread_params, sizes
):
    measure = functools.partial(
        evaluate, config=model_config, data=data, split="validation", policy=DMC(SETTINGS, -2.0)
    )
    expected = measure(spread_params, **SIZES)
    assert expected.ratio > 1.5
    mesh = make_mesh(MeshConfig(*sizes))
    spread_out = jax.device_put(spread_params, shardings(spread_params, mesh))
    for batch in (1, 10):  # neither fills the devices evenly
        figures = measure(spread_out, length=32, batch=batch, mesh=mesh)
        assert (figures.tokens, figures.windows) == (expected.tokens, expected.windows)
        figures, wanted = (jax.tree.leaves(dataclasses.asdict(e)) for e in (figures, expected))
        np.testing.assert_allclose(figures, wanted, rtol=1e-5)


def a_loss_beyond_709_nats_has_infinite_perplexity_test(data, model_config, spread_params):
    lost = {**spread_params, "embedding": 1e5 * spread_params["embedding"]}
    measured = evaluate(lost, model_config, data, "validation", policy=Dense(), **SIZES)
    assert 709 < measured.loss < math.inf and measured.perplexity == math.inf


def bits_per_byte_count_the_bytes_of_the_text_that_was_prepared_test(
    tmp_path, model_config, spread_params
):
    """With a tokenizer that folds case, drops indentation and knows no byte for what is strange."""
    texts, rng = tmp_path / "texts", np.random.default_rng(0)
    texts.mkdir()
    for number in range(40):
        words = rng.choice(
            ["The", "CACHE", "ＭＥＲＧＥＳ", "    a", "token", "日"], rng.integers(20, 90)
        )
        (texts / f"{number:02}.txt").write_text(" ".join(words) + "\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cache merges a token " * 9] * 20),
        model_writer=model,
        vocab_size=30,
        model_type="bpe",
        normalization_rule_name="nmt_nfkc_cf",
        minloglevel=2,
    )
    (tmp_path / "tokenizer").write_bytes(model.getvalue())
    quiet = {"report": lambda _: None}
    data = prepare(tmp_path / "data", source=texts, tokenizer=tmp_path / "tokenizer", **quiet)
    config = dataclasses.replace(model_config, vocab_size=30)
    params = {**spread_params, "embedding": 0 * spread_params["embedding"][:30]}
    facts = data.manifest["splits"]["train"]
    # Everything is as likely; of every document all tokens are predicted but its BOS.
    expected = (facts["tokens"] - facts["documents"]) * math.log2(30) / facts["bytes"]
    sizes = {"policy": Dense(), **SIZES}
    assert facts["bytes"] == sum(len(file.read_bytes()) for file in texts.iterdir()) - sum(
        data.manifest["splits"][split]["bytes"] for split in ("validation", "test")
    )
    whole = evaluate(params, config, data, "train", **sizes).bits_per_byte
    assert whole == pytest.approx(expected, rel=1e-5)
    some = evaluate(params, config, data, "train", limit=3, **sizes).bits_per_byte
    assert some == pytest.approx(expected, rel=0.2)


def ratios_are_tokens_over_slots_counted_one_by_one_test(data, model_config, spread_params):
    policy = DMC(SETTINGS, -2.0)
    options = {"policy": policy, **SIZES}
    measured = evaluate(spread_params, model_config, data, "validation", **options)

    @jax.jit
    def merges(params, window):
        where = window["positions"][None], window["segment_ids"][None]
        attend = attend_whole(policy, model_config, *where)
        output = Llama(model_config).apply(
            {"params": params}, window["tokens"][None], attend=attend
        )
        return [1 - record.appends for record in output.records]

    tokens, slots = 0, [[0, 0], [0]]
    for window in windows(data, "validation", 32, pad_last=True):
        merged = jax.device_get(
            merges(spread_params, window)
        )  # one stack per layer: their KV heads differ
        for t in range(32):
            if window["segment_ids"][t] == 0:
                continue
            tokens += 1
            for layer, heads in enumerate(slots):
                for head in range(len(heads)):
                    heads[head] += 1 - int(merged[layer][0, 0, t, head])
    assert 1.5 < measured.ratio < 4
    assert measured.ratio == pytest.approx(3 * tokens / sum(map(sum, slots)))
    assert measured.ratio_by_layer == pytest.approx(
        [len(heads) * tokens / sum(heads) for heads in slots]
    )
    for ratios, heads in zip(measured.ratio_by_head, slots, strict=True):
        assert ratios == pytest.approx([tokens / n for n in heads])


def a_calibrated_threshold_gives_the_wanted_ratio_test(data, model_config, spread_params):
    compiled = perplexity._evaluate_batch._cache_size()
    threshold = calibrate_threshold(
        spread_params, model_config, data, policy=DMC(SETTINGS), ratio=1.5, windows=12, **SIZES
    )
    assert -2 < threshold < 2
    ratio = {
        t: evaluate(
            spread_params,
            model_config,
            data,
            "train",
            policy=DMC(SETTINGS, t),
            limit=12,
            **SIZES,
        ).ratio
        for t in (threshold, threshold + 0.01)
    }
    # A threshold is a number: sixteen of them are one program.
    assert perplexity._evaluate_batch._cache_size() <= compiled + 1
    # Equal words merge alike in the first layer, so the ratio moves in small jumps.
    assert ratio[threshold + 0.01] < 1.5 <= ratio[threshold] < 1.6


def a_ratio_out_of_reach_is_said_and_leaves_even_odds_test(
    data, model_config, spread_params, caplog
):
    with caplog.at_level("WARNING", logger="absl"):
        threshold = calibrate_threshold(
            spread_params, model_config, data, policy=DMC(SETTINGS), ratio=50.0, windows=4, **SIZES
        )
    assert threshold == 0.0
    assert "no threshold reaches a ratio of 50" in caplog.text


def rows_without_ids_are_allowed_and_ids_without_rows_are_refused_test(
    data, model_config, spread_params
):
    larger = dataclasses.replace(model_config, vocab_size=400)
    params = init_params(larger, jax.random.key(0))
    measured = evaluate(params, larger, data, "validation", policy=Dense(), **SIZES)
    assert measured.loss == pytest.approx(np.log(400), rel=0.1)
    smaller = dataclasses.replace(model_config, vocab_size=300)
    with pytest.raises(UserError, match="320 ids, the model has 300"):
        evaluate(spread_params, smaller, data, "validation", policy=Dense(), **SIZES)
