"""Quantised products on NumPy: many tiles, threads, all codes, and no whole weight in float32."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from deltaloom.backends.numpy import quantized, threads
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import DType, QuantType, bf16, f8_e4m3, f32, i4, i8
from deltaloom.ops.linear import Linear
from deltaloom.ops.moe import MoEExperts
from deltaloom.ops.quantized import Dequantize, Quantize

FORMS = [
    QuantType(i8, (1, None), f32),
    QuantType(i8, (1, 24), bf16),
    QuantType(i4, (1, 32), bf16),
    QuantType(f8_e4m3, (48, 40), f32),
    bf16,
]
RNG = np.random.default_rng(0)


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[int]:
    before = threads.pool()
    yield threads.use_threads(request.param).n
    threads.use_threads(before.n)


def quantised(form: QuantType | DType, *shape: int) -> Any:
    weight = RNG.standard_normal(shape).astype(np.float32)
    return weight.astype(bf16.numpy) if form == bf16 else Quantize(str(form)).reference(weight)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 5])
def test_many_tiles_give_the_reference(form: QuantType | DType, dtype: Any, rows: int, pool: int) -> None:
    weight = quantised(form, 2113, 513)
    x = RNG.standard_normal((1, rows, 513)).astype(dtype)
    assert weight.shape[0] > 10 * quantized.tile_rows(weight) and weight.shape[0] * weight.shape[1] > quantized.WORTH
    found = quantized.quantised_linear(Linear(), x, weight)
    want = Linear().reference(x.astype(np.float64), weight)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, want, atol=(1e-4 if dtype == np.float32 else 1e-11) * np.abs(want).max())


def test_every_code_is_widened_exactly() -> None:
    fp8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    finite = fp8[np.isfinite(fp8.astype(np.float32))]
    int4 = np.arange(256, dtype=np.uint8)
    for form, codes, width in (
        (QuantType(f8_e4m3, (1, None), f32), finite, len(finite)),
        (QuantType(f8_e4m3, (1, None), f32), fp8, 256),
        (QuantType(i8, (1, None), f32), np.arange(-128, 128).astype(np.int8), 256),
        (QuantType(i4, (1, None), f32), int4, 512),
        (QuantType(i4, (1, None), f32), int4, 511),
    ):
        weight = QuantizedArray(codes[None], np.ones((1, 1), np.float32), form, (1, width))
        want = Dequantize("float32").reference(weight)
        np.testing.assert_array_equal(quantized.widened(weight, slice(0, 1), np.dtype(np.float32)), want)


def test_a_nan_code_is_a_nan_in_its_row_alone() -> None:
    weight = quantised(FORMS[3], 300, 80)
    weight.data[137, 5] = np.nan
    y = quantized.quantised_linear(Linear(), np.ones((1, 1, 80), np.float32), weight)
    assert np.flatnonzero(np.isnan(y)).tolist() == [137]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_experts_of_many_tokens_and_of_one_give_the_reference(form: QuantType | DType, pool: int) -> None:
    gate_up, down = quantised(form, 9, 192, 256), quantised(form, 9, 256, 96)
    for tokens in (1, 70):
        x = RNG.standard_normal((1, tokens, 256)).astype(np.float32)
        ids = np.argsort(RNG.random((1, tokens, 8)), axis=-1)[..., :4].astype(np.int32)
        weights = RNG.random((1, tokens, 4)).astype(np.float32)
        found = quantized.quantised_moe_experts(MoEExperts(), x, weights, ids, gate_up, down)
        want = MoEExperts().reference(x.astype(np.float64), weights.astype(np.float64), ids, gate_up, down)
        np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_whole_weight_is_never_widened(form: QuantType | DType) -> None:
    weight = quantised(form, 4096, 512)
    x, op = np.ones((1, 1, 512), np.float32), Linear()
    quantized.quantised_linear(op, x, weight)
    tracemalloc.start()
    quantized.quantised_linear(op, x, weight)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * quantized.TILE < 4096 * 512 * 4 / 8, f"{peak} bytes"
