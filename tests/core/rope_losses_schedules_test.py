"""Rotary embedding, losses and schedules against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest

from dmc_jax.core.losses import compression_loss
from dmc_jax.core.rope import Llama3Scaling, rotary_frequencies, rotate
from dmc_jax.core.schedules import compression_target, learning_rate


def rotation_is_a_complex_product_test():
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 5, 100, 4095]])
    frequencies = rotary_frequencies(6, 10_000.0)
    expected = (x[..., :3] + 1j * x[..., 3:]) * np.exp(
        1j * positions[:, :, None, None] * 10_000.0 ** (-np.arange(3) / 3)
    )
    actual = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies)
    # float32 angles: 4095 radians have an error of 2e-4
    np.testing.assert_allclose(actual[..., :3], expected.real, atol=1e-3)
    np.testing.assert_allclose(actual[..., 3:], expected.imag, atol=1e-3)


def llama3_scaling_keeps_fast_and_divides_slow_frequencies_test():
    plain = np.asarray(rotary_frequencies(128, 500_000.0))
    scaled = np.asarray(rotary_frequencies(128, 500_000.0, Llama3Scaling()))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 2048], plain[wavelength < 2048], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any()
    smooth = (8192 / wavelength[between] - 1) / 3  # the published interpolation
    expected = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(scaled[between], expected, rtol=1e-5)


def odd_head_width_is_refused_test():
    with pytest.raises(ValueError, match="even head width, got 7"):
        rotary_frequencies(7, 10_000.0)


def hinge_is_per_sample_or_per_layer_test():
    means = jnp.array([[0.9, 0.1], [0.7, 0.5]])  # [layers, samples]
    np.testing.assert_allclose(compression_loss(means, 0.75), (0 + 0.45) / 2, rtol=1e-6)
    per_layer = compression_loss(means, 0.75, per_layer=True)
    np.testing.assert_allclose(per_layer, (0.25 + 0.15) / 2, rtol=1e-6)


def target_rises_linearly_in_the_ratio_and_stays_test():
    ratios = [float(compression_target(s, 10, 5.0)[0]) for s in (0, 5, 10, 99)]
    np.testing.assert_allclose(ratios, [1, 3, 5, 5])
    np.testing.assert_allclose(compression_target(5, 10, 5.0)[1], 1 - 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("shape, middle", [("constant", 1.0), ("cosine", 0.55), ("linear", 0.55)])
def learning_rate_warms_up_and_ends_where_asked_test(shape, middle):
    def rate(step):
        return float(learning_rate(step, steps=110, peak=1.0, final=0.1, warmup=10, shape=shape))

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(middle)
    assert rate(110) == pytest.approx(1.0 if shape == "constant" else 0.1)


def unknown_learning_rate_shape_is_refused_test():
    with pytest.raises(ValueError, match="triangular"):
        learning_rate(0, steps=1, peak=1.0, final=0.0, warmup=0, shape="triangular")
