"""Rotation as complex multiplication, and YaRN's tables of the 80B geometry."""

import numpy as np
import pytest

from deltaloom.ops.rope import Rope, RotaryEmbedding

HALF = 32
THETA = 1e7
PLAIN = THETA ** (-np.arange(HALF) / HALF)


def test_pairs_turn_like_complex_numbers() -> None:
    rng = np.random.default_rng(0)
    x, angles = rng.standard_normal((2, 3, 2, 10)), rng.uniform(0, 6, (2, 3, 4))
    y = Rope().reference(x, np.cos(angles), np.sin(angles))
    turned = (x[..., :4] + 1j * x[..., 4:8]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(y[..., :4], turned.real, atol=1e-14)
    np.testing.assert_allclose(y[..., 4:8], turned.imag, atol=1e-14)
    np.testing.assert_array_equal(y[..., 8:], x[..., 8:])


def test_scores_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 1, 1, 1, 8))
    embed = RotaryEmbedding(tuple(PLAIN[:4]), "float64")

    def score(query_position: int, key_position: int) -> float:
        turned = [Rope().reference(x, *embed.reference(np.array([[p]]))) for x, p in ((q, query_position), (k, key_position))]
        return float(np.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_yarn_is_frequencies_and_a_magnitude() -> None:
    """The ratios of the specification, section 7.2: factor 4 from 262144 positions, ramp from 14 to 22."""
    ratios = np.where(np.arange(HALF) <= 14, 1.0, np.clip(1.0 - 0.09375 * (np.arange(HALF) - 14), 0.25, 1.0))
    magnitude = 1.138629436111989
    yarn = RotaryEmbedding(tuple(PLAIN * ratios), "float64", magnitude)
    cos, sin = yarn.reference(np.array([[0, 1000, 262144]]))
    np.testing.assert_allclose(cos**2 + sin**2, magnitude**2)
    np.testing.assert_array_equal(cos[0, 0], np.full(HALF, magnitude))
    plain, _ = RotaryEmbedding(tuple(PLAIN), "float64").reference(np.array([[0, 1000, 262144]]))
    np.testing.assert_array_equal(cos[..., :15], plain[..., :15] * magnitude)
    assert (np.abs(cos[0, 1, 15:20] - plain[0, 1, 15:20] * magnitude) > 1e-7).all()


def test_angles_are_rounded_to_float32() -> None:
    """A million positions times a frequency needs more than 24 bits; the definition rounds, as transformers does."""
    frequency, position = 0.7, 1_000_003
    cos, _ = RotaryEmbedding((frequency,), "float64").reference(np.array([[position]]))
    rounded = float(np.float32(np.float32(position) * np.float32(frequency)))
    assert rounded != position * frequency
    assert cos[0, 0, 0] == np.cos(rounded)
