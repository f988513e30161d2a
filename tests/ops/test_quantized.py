"""Quantised types and ops: sizes, borders, rounding and the layout of codes, by hand and by generated weights."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import GraphError
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import QuantType, bf16, f8_e4m3, f16, f32, i4, i8, i64, parse_quant, parse_type
from deltaloom.ops.fused_moe import SharedMoE
from deltaloom.ops.linear import Linear
from deltaloom.ops.quantized import Dequantize, Quantize
from deltaloom.ops.shape import Concat, Reshape, Split, Stack, Transpose

INT8, INT8_G32 = QuantType(i8, (1, None), f32), QuantType(i8, (1, 32), bf16)
INT4, FP8 = QuantType(i4, (1, 32), bf16), QuantType(f8_e4m3, (128, 128), f32)
TEXTS = {
    INT8: "int8{row, scale f32}",
    INT8_G32: "int8{group 32, scale bf16}",
    INT4: "int4{group 32, scale bf16}",
    FP8: "fp8_e4m3{block 128x128, scale f32}",
}
WEIGHTS = st.tuples(st.integers(1, 5), st.integers(1, 70)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**127), 2.0**127, width=32))
)


def quantised(form: QuantType, w: Any) -> QuantizedArray:
    return Quantize(str(form)).reference(np.asarray(w, np.float32))


def dequantised(form: QuantType, w: Any) -> Any:
    return Dequantize("float64").reference(quantised(form, w))


def steps(codes: QuantizedArray) -> Any:
    """The scale of every element, found by a loop."""
    rows, columns = codes.form.block
    out = np.empty(codes.shape)
    for o, i in np.ndindex(*codes.shape):
        out[o, i] = codes.scale[o // rows, 0 if columns is None else i // columns]
    return out


@pytest.mark.parametrize(("form", "text"), TEXTS.items(), ids=TEXTS.values())
def test_a_type_prints_parses_and_goes_through_json(form: QuantType, text: str) -> None:
    assert str(form) == text and parse_quant(text) == form
    assert parse_type(f"{text}[8, 256, 64]", {}) == form[8, 256, 64]
    g = GraphBuilder("one")
    g.output("w", g.dequantize(g.param("w", [256, 64], form), dtype="float32"))
    graph = g.build()
    assert parse_graph(print_graph(graph)) == graph == from_json(to_json(graph))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3{group 32, scale f32}", "'int3' is no form of quantised codes"),
        ("f32{row, scale f32}", "'f32' is no form of quantised codes"),
        ("int4{group 3, scale f32}", "expected an even number, because two codes share a byte"),
        ("int8{group 0, scale f32}", "a block of 1 x 0 has no elements"),
        ("int8{row, scale i32}", "scales are i32, expected f32"),
        ("int8{group 32}", "is not a type"),
        ("float32", "is not a quantised dtype"),
    ],
)
def test_types_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        parse_quant(text)


def test_sizes_count_codes_and_scales() -> None:
    assert INT8[10, 64].nbytes() == 10 * 64 + 10 * 4
    assert INT4[10, 64].nbytes() == 10 * 32 + 10 * 2 * 2
    assert INT4[3, 10, 33].nbytes() == 3 * 10 * (17 + 2 * 2)
    assert FP8[192, 32].nbytes() == 192 * 32 + 2 * 1 * 4
    with pytest.raises(GraphError, match="a matrix or a stack of them"):
        INT8[(64,)].nbytes()


@pytest.mark.parametrize("form", [INT8, INT8_G32, INT4], ids=str)
@given(w=WEIGHTS)
def test_an_integer_code_is_wrong_by_half_a_step_at_most(form: QuantType, w: Any) -> None:
    codes = quantised(form, w)
    back, step = Dequantize("float64").reference(codes), steps(codes)
    exact = step > 0
    assert (np.abs(back - w)[exact] <= step[exact] * (0.5 + 2**-20)).all()
    assert (back[~exact] == 0).all() and (np.abs(w[~exact]) < 2.0**-118).all()
    assert np.isfinite(Dequantize("float32").reference(codes)).all()


@given(w=WEIGHTS)
def test_an_fp8_code_is_the_nearest_of_its_grid(w: Any) -> None:
    codes = quantised(FP8, w)
    step = steps(codes)
    grid = np.unique(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64))
    grid = grid[np.isfinite(grid)]
    for value, code, scale in zip(w.ravel().tolist(), codes.data.astype(np.float64).ravel(), step.ravel(), strict=True):
        if scale:
            nearest = np.abs(grid - value / scale).min()
            assert abs(code - value / scale) <= nearest + 1e-4 * max(1.0, abs(code))


def test_codes_are_where_the_layout_says() -> None:
    codes = quantised(QuantType(i4, (1, 2), f32), [[7, -7, 3.5, 0, 14]])
    assert codes.scale.tolist() == [[1, 0.5, 2]]
    assert codes.data.tolist() == [[0x07 | 0x09 << 4, 0x07, 0x07]]
    by_row = quantised(INT8, [[127, -127, 63.5, 64.5, 0], [0, 0, 0, 0, 0]])
    assert by_row.data.tolist() == [[127, -127, 64, 64, 0], [0] * 5] and by_row.scale.tolist() == [[1], [0]]
    short = quantised(QuantType(f8_e4m3, (2, 2), f32), [[448, 1, 896], [0, 0, 0], [4.48, 0, 8.96]])
    np.testing.assert_allclose(short.scale, [[1, 2], [0.01, 0.02]], rtol=1e-6)
    assert short.data.astype(np.float32).tolist() == [[448, 1, 448], [0, 0, 0], [448, 0, 448]]


def test_the_lowest_integer_is_never_written() -> None:
    w = -np.abs(np.random.default_rng(0).standard_normal((40, 64))).astype(np.float32)
    assert quantised(INT8, w).data.min() == -127
    assert round((dequantised(INT4, w) / steps(quantised(INT4, w))).min()) == -7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127 * 1.01, -3e38])
def test_what_no_scale_can_hold_is_refused(bad: float) -> None:
    with pytest.raises(GraphError, match="1 of 6 values are not finite or are above"):
        quantised(INT8, [[1, 2, 3], [4, bad, 6]])


def test_the_dtype_of_the_weight_does_not_matter() -> None:
    w = np.random.default_rng(1).standard_normal((6, 40)).astype(ml_dtypes.bfloat16)
    one, other = (Quantize(str(INT4)).reference(w.astype(dtype)) for dtype in (np.float32, np.float64))
    assert one.data.tobytes() == other.data.tobytes() and one.scale.tobytes() == other.scale.tobytes()
    assert Quantize(str(INT4)).infer(bf16[6, 40]) == INT4[6, 40]


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        (lambda: Split((64, 64), 0).infer(FP8[128, 256]), "border at 64 of axis 0, which is inside a block"),
        (lambda: Split((32, 96), 1).infer(FP8[128, 128]), "border at 32 of axis 1"),
        (lambda: Split((16, 16), -1).infer(INT4[8, 32]), "border at 16 of axis 1"),
        (lambda: Split((16, 16), -1).infer(INT8[8, 32]), "border at 16 of axis 1"),
        (lambda: Concat(0).infer(FP8[100, 64], FP8[128, 64]), "border at 100 of axis 0"),
        (lambda: Concat(0).infer(FP8[128, 64], f32[128, 64]), "only axis 0 may differ"),
        (lambda: Reshape((4, 64, 32)).infer(FP8[256, 32]), "matrices would end inside its blocks"),
        (lambda: Reshape((64, 128)).infer(INT8[256, 32]), "its rows must stay whole"),
        (lambda: Transpose((1, 0)).infer(INT8[4, 4]), "is quantised where a plain tensor is expected"),
        (lambda: Quantize(str(QuantType(i8, (1, None), f16))).infer(f32[4, 4]), "scales are computed in f32 or bf16"),
        (lambda: Quantize(str(INT8)).infer(f32[(4,)]), "should be \\[..., out, in\\]"),
        (lambda: Quantize(str(INT8)).infer(i64[4, 4]), "expected f64, f32, f16 or bf16"),
        (lambda: Linear().infer(INT8[4, 4], INT8[4, 4]), "is quantised where a plain tensor is expected"),
    ],
)
def test_what_would_cut_a_block_is_refused(infer: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        infer()


@pytest.mark.parametrize("form", [INT8, INT4, QuantType(f8_e4m3, (4, 8), f32)], ids=str)
def test_pieces_of_codes_mean_pieces_of_the_weight(form: QuantType) -> None:
    w = np.random.default_rng(2).standard_normal((3, 12, 64)).astype(np.float32)
    codes, whole = quantised(form, w), dequantised(form, w)

    def meant(array: Any) -> Any:
        return Dequantize("float64").reference(array)

    for part, wanted in zip(Split((4, 8), 1).reference(codes), (whole[:, :4], whole[:, 4:]), strict=True):
        np.testing.assert_array_equal(meant(part), wanted)
    np.testing.assert_array_equal(meant(Reshape((9, 4, 64)).reference(codes)), whole.reshape(9, 4, 64))
    np.testing.assert_array_equal(meant(Concat(1).reference(codes, codes)), np.concatenate([whole, whole], axis=1))
    np.testing.assert_array_equal(meant(Stack().reference(codes[0], codes[2])), whole[[0, 2]])
    assert np.shares_memory(Split((4, 8), 1).reference(codes)[1].data, codes.data)


def test_a_fused_op_reads_quantised_weights_through_its_parts() -> None:
    rng = np.random.default_rng(4)
    x, gate = rng.standard_normal((1, 2, 8)).astype(np.float32), rng.standard_normal((1, 2, 1)).astype(np.float32)
    shares, ids = rng.random((1, 2, 2)).astype(np.float32), np.array([[[0, 2], [1, 2]]], np.int32)
    plain = [rng.standard_normal(shape).astype(np.float32) for shape in ((3, 6, 8), (3, 8, 3), (10, 8), (8, 5))]
    codes = [quantised(form, w) for form, w in zip((INT4, INT8, FP8, INT8_G32), plain, strict=True)]
    found = SharedMoE().reference(x, shares, ids, gate, *codes)
    np.testing.assert_array_equal(found, SharedMoE().reference(x, shares, ids, gate, *map(Dequantize("float32").reference, codes)))
    assert np.abs(found - SharedMoE().reference(x, shares, ids, gate, *plain)).max() > 1e-3
