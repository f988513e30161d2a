"""Where results are rounded: the two norms differ in bfloat16 exactly as the specification says."""

import ml_dtypes
import numpy as np

from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, f8_e4m3, f32
from deltaloom.ops.delta_gates import DeltaGates
from deltaloom.ops.elementwise import OnePlus
from deltaloom.ops.norm import GatedRMSNorm, L2Norm, RMSNorm
from deltaloom.ops.quantized import Dequantize

BF16 = ml_dtypes.bfloat16
RNG = np.random.default_rng(0)


def normalised(x: np.ndarray) -> np.ndarray:
    f = x.astype(np.float32)
    return f / np.sqrt((f * f).mean(-1, keepdims=True) + np.float32(1e-6))


def test_zero_centred_norm_rounds_once() -> None:
    x, stored = RNG.standard_normal((50, 64)).astype(BF16), (0.1 * RNG.standard_normal(64)).astype(BF16)
    lifted = OnePlus().reference(stored)
    assert lifted.dtype == np.float32 and (lifted == 1 + stored.astype(np.float32)).all()
    once = RMSNorm(eps=1e-6, zero_centred=True).reference(x, lifted)
    assert (once == (normalised(x) * lifted).astype(BF16)).all()
    twice = RMSNorm(eps=1e-6).reference(x, lifted.astype(BF16))
    assert (twice == lifted.astype(BF16) * normalised(x).astype(BF16)).all()
    assert (once != twice).any()


def test_gated_norm_scales_in_the_model_dtype_and_gates_in_float32() -> None:
    x, gate, weight = (RNG.standard_normal(shape).astype(BF16) for shape in ((50, 64), (50, 64), (64,)))
    scaled = (weight * normalised(x).astype(BF16)).astype(np.float32)
    wide_gate = gate.astype(np.float32)
    wanted = (scaled * (wide_gate / (1 + np.exp(-wide_gate)))).astype(BF16)
    assert (GatedRMSNorm(eps=1e-6).reference(x, gate, weight) == wanted).all()


def test_l2_norm_sums_and_stays_wide() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0]], BF16)
    y = L2Norm().reference(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_beta_is_rounded_to_the_model_dtype_and_the_decay_is_not() -> None:
    b, a = (RNG.standard_normal((1, 20, 4)).astype(BF16) for _ in range(2))
    a_log, dt_bias = (RNG.standard_normal(4).astype(BF16) for _ in range(2))
    beta, log_decay = DeltaGates().reference(b, a, a_log, dt_bias)
    assert beta.dtype == log_decay.dtype == np.float32
    assert (beta == beta.astype(BF16).astype(np.float32)).all()
    assert (log_decay != log_decay.astype(BF16).astype(np.float32)).any()
    f = a.astype(np.float64) + dt_bias.astype(np.float64)
    np.testing.assert_allclose(log_decay, -np.exp(a_log.astype(np.float64)) * np.log1p(np.exp(f)), rtol=1e-5)


def test_block_scales_cover_a_last_block_that_is_cut() -> None:
    data = np.ones((3, 5), ml_dtypes.float8_e4m3fn)
    weight = QuantizedArray(data, np.array([[1, 2, 3], [4, 5, 6]], np.float32), QuantType(f8_e4m3, (2, 2), f32), data.shape)
    wanted = [[1, 1, 2, 2, 3], [1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert Dequantize("float32").reference(weight).tolist() == wanted
