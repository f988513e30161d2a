"""Frequencies and magnitude against tables that transformers computed, and against the specification's check values."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from deltaloom.models.config import read_config
from deltaloom.models.rope_config import (
    RopeConfig,
    YarnConfig,
    correction_index,
    inverse_frequencies,
    magnitude,
    ramp_bounds,
)

TABLES = Path(__file__).parents[1] / "golden" / "rope"
CASES = json.loads((TABLES / "tables.json").read_text())
ARRAYS = load_file(TABLES / "tables.safetensors")
PLAIN_80B = RopeConfig(1e7, 64, 0.25)
YARN_80B = RopeConfig(1e7, 64, 0.25, YarnConfig(4.0, 262144))


@pytest.mark.parametrize("name", CASES)
def test_tables_of_the_real_geometry(name: str) -> None:
    rope = read_config({"model_type": "qwen3_next", **CASES[name]["config"]}).rope
    frequencies = inverse_frequencies(rope)
    assert frequencies.dtype == np.float64 and frequencies.shape == (32,)
    np.testing.assert_allclose(frequencies, ARRAYS[f"{name}.inv_freq"], rtol=5e-7)
    assert magnitude(rope) == pytest.approx(CASES[name]["attention_factor"], rel=1e-15)
    angle = ARRAYS[f"{name}.positions"].astype(np.float32)[:, None] * frequencies.astype(np.float32)
    wide = np.concatenate([angle, angle], axis=1)
    # positions reach into the hundred thousands: an angle's last float32 bit is then worth some 1e-2 radians at most
    near = ARRAYS[f"{name}.positions"] < 1000
    assert near.sum() >= 2
    np.testing.assert_allclose(np.cos(wide[near]) * magnitude(rope), ARRAYS[f"{name}.cos"][near], atol=2e-4)
    np.testing.assert_allclose(np.sin(wide[near]) * magnitude(rope), ARRAYS[f"{name}.sin"][near], atol=2e-4)


def test_check_values_of_the_specification() -> None:
    assert YARN_80B.yarn is not None
    assert correction_index(YARN_80B, YARN_80B.yarn, 32) == pytest.approx(14.24096, abs=5e-6)
    assert correction_index(YARN_80B, YARN_80B.yarn, 1) == pytest.approx(21.12165, abs=5e-6)
    assert ramp_bounds(YARN_80B, YARN_80B.yarn) == (14.0, 22.0)
    ratio = inverse_frequencies(YARN_80B) / inverse_frequencies(PLAIN_80B)
    middle = [0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375]
    np.testing.assert_allclose(ratio, [1.0] * 15 + middle + [0.25] * 10, rtol=1e-12)
    assert magnitude(YARN_80B) == 1.138629436111989
    assert magnitude(RopeConfig(1e7, 64, 0.25, YarnConfig(2.0, 262144))) == 1.0693147180559945
    assert magnitude(PLAIN_80B) == 1.0


def test_plain_frequencies_divide_by_the_rotary_size() -> None:
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(10000.0, 4, 0.25)), [1.0, 0.01], rtol=1e-15)


def test_magnitude_prefers_what_is_given() -> None:
    def of(
        attention_factor: float | None = None, mscale: float | None = None, mscale_all_dim: float | None = None
    ) -> float:
        return magnitude(
            RopeConfig(1e7, 64, 0.25, YarnConfig(4.0, 262144, 32.0, 1.0, attention_factor, mscale, mscale_all_dim))
        )

    step = 0.1 * math.log(4.0)
    assert of(attention_factor=1.5, mscale=1.0, mscale_all_dim=0.5) == 1.5
    assert of(mscale=1.0, mscale_all_dim=0.5) == pytest.approx((1 + step) / (1 + 0.5 * step))
    assert of(mscale=0.7) == of(mscale_all_dim=0.7) == of(mscale=0.7, mscale_all_dim=0.0) == pytest.approx(1 + step)
    assert magnitude(RopeConfig(1e7, 64, 0.25, YarnConfig(1.0, 262144))) == 1.0


def test_the_ramp_may_end_beyond_the_last_pair() -> None:
    """By hand for theta 1000 and 16 rotary elements: there are 8 pairs, yet bounds go up to 15."""
    rope = RopeConfig(1000.0, 16, 0.25, YarnConfig(4.0, 4096))
    assert rope.yarn is not None and ramp_bounds(rope, rope.yarn) == (3.0, 8.0)
    wide = RopeConfig(1000.0, 16, 0.25, YarnConfig(4.0, 4096 * 1000))
    assert wide.yarn is not None and ramp_bounds(wide, wide.yarn) == (11.0, 15.0)
    ratio = inverse_frequencies(rope) * 1000.0 ** (np.arange(8) / 8)
    np.testing.assert_allclose(ratio, [1, 1, 1, 1, 0.85, 0.7, 0.55, 0.4], rtol=1e-12)


def test_bounds_that_coincide_are_set_apart() -> None:
    rope = RopeConfig(10000.0, 16, 0.25, YarnConfig(4.0, 6, beta_fast=1.0, beta_slow=1.0))
    assert rope.yarn is not None
    low, high = ramp_bounds(rope, rope.yarn)
    assert low == 0.0 and high in (0.001, 1.0)
    assert np.isfinite(inverse_frequencies(rope)).all()


def test_without_truncation_bounds_stay_fractional() -> None:
    rope = RopeConfig(1e7, 64, 0.25, YarnConfig(4.0, 262144, truncate=False))
    assert rope.yarn is not None
    assert ramp_bounds(rope, rope.yarn) == pytest.approx((14.24096, 21.12165), abs=5e-6)


def test_zero_and_null_betas_and_a_null_factor_fall_back() -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 64,
        "beta_fast": 0,
        "beta_slow": None,
    }
    raw = {"model_type": "qwen3_next", "rope_theta": 1e4, "max_position_embeddings": 256, "rope_scaling": scaling}
    assert read_config(raw).rope.yarn == YarnConfig(4.0, 64)
    del scaling["original_max_position_embeddings"]
    assert read_config(raw | {"rope_scaling": scaling | {"factor": 2}}).rope.yarn == YarnConfig(2.0, 256)


def test_rope_scaling_wins_over_rope_parameters() -> None:
    raw = {
        "model_type": "qwen3_next",
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5e6},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    rope = read_config(raw).rope
    assert rope.theta == 5e6 and rope.yarn is not None
    assert read_config(raw | {"rope_scaling": {}}).rope == RopeConfig(1e4, 64, 0.25)
