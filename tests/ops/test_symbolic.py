"""Type rules with symbolic dimensions, costs as expressions, and refusals that are sentences."""

from fractions import Fraction

import pytest

from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import GraphError
from deltaloom.graph.types import QuantType, bf16, bool_, f8_e4m3, f16, f32, i32, i64
from deltaloom.ops.attention import Attention
from deltaloom.ops.convolution import CausalConv1d
from deltaloom.ops.delta_rule import GatedDeltaRule
from deltaloom.ops.elementwise import ZerosLike
from deltaloom.ops.embedding import Embedding
from deltaloom.ops.fused_moe import SharedMoE
from deltaloom.ops.linear import Linear
from deltaloom.ops.moe import MoEExperts, RouterTopK
from deltaloom.ops.norm import RMSNorm
from deltaloom.ops.padding import MaskPadding
from deltaloom.ops.quantized import Dequantize
from deltaloom.ops.serving import TakeRows
from deltaloom.ops.shape import Concat, Flatten, Split, TakeLast, Unflatten

B, S, P = symbol("batch"), symbol("seq"), symbol("past", low=0)


def test_types_of_a_layer_in_symbols() -> None:
    assert str(Embedding().infer(i64[B, S], bf16[160, 32])) == "bf16[batch, seq, 32]"
    assert str(Linear().infer(bf16[B, S, 32], bf16[48, 32])) == "bf16[batch, seq, 48]"
    assert str(Unflatten((2, 24)).infer(bf16[B, S, 48])) == "bf16[batch, seq, 2, 24]"
    assert str(Flatten().infer(bf16[B, S, 2, 24])) == "bf16[batch, seq, 48]"
    assert [str(t) for t in Split((8, 16)).infer(bf16[B, S, 24])] == ["bf16[batch, seq, 8]", "bf16[batch, seq, 16]"]
    assert str(Concat(axis=1).infer(bf16[B, P, 4], bf16[B, S, 4])) == "bf16[batch, past + seq, 4]"
    assert str(TakeLast().infer(bf16[B, S, 4])) == "bf16[batch, 1, 4]"
    assert str(MaskPadding().infer(bf16[B, S, 4], bool_[B, P + S])) == "bf16[batch, seq, 4]"


def test_states_in_symbols() -> None:
    caches = bf16[B, 2, P, 8], bf16[B, 2, P, 8]
    out, keys, _ = Attention(scale=1.0).infer(bf16[B, S, 4, 8], bf16[B, S, 2, 8], bf16[B, S, 2, 8], *caches, bool_[B, P + S])
    assert (str(out), str(keys)) == ("bf16[batch, seq, 4, 8]", "bf16[batch, 2, past + seq, 8]")
    q, gate = f32[B, S, 2, 8], f32[B, S, 4]
    out, state = GatedDeltaRule(scale=1.0).infer(q, q, bf16[B, S, 4, 6], gate, gate, f32[B, 4, 8, 6])
    assert (str(out), str(state)) == ("bf16[batch, seq, 4, 6]", "f32[batch, 4, 8, 6]")
    y, state = CausalConv1d().infer(bf16[B, S, 12], bf16[12, 1, 4], bf16[B, 12, 3])
    assert (str(y), str(state)) == ("bf16[batch, seq, 12]", "bf16[batch, 12, 3]")


def test_costs_are_expressions() -> None:
    cost = Linear().cost(f32[B, S, 32], f32[48, 32])
    assert str(cost.flops) == "3072*batch*seq"
    assert str(cost.bytes) == str(4 * (80 * B * S + 48 * 32))
    ids, x = i32[B, S, 2], f32[B, S, 8]
    assert str(MoEExperts().cost(x, f32[B, S, 2], ids, f32[4, 6, 8], f32[4, 8, 3]).flops) == "288*batch*seq"


@pytest.mark.parametrize(
    ("infer", "message"),
    [
        (lambda: Linear().infer(f32[B, S, 8], f32[4, 9]), r"weight f32\[4, 9\] should be \[out, in\]: 'in' is 9, but 8 in x"),
        (lambda: Linear().infer(f32[B, S, 8], f16[4, 8]), r"weight is f16\[4, 8\], expected f32 as x"),
        (lambda: Linear().infer(i64[B, S, 8], i64[4, 8]), r"x is i64\[batch, seq, 8\], expected f64, f32, f16 or bf16"),
        (lambda: Linear().infer(f32[4, 8], QuantType(f8_e4m3, (128, 128), f32)[4, 9]), "'in' is 9, but 8 in x"),
        (lambda: RMSNorm(eps=1e-6, zero_centred=True).infer(bf16[B, 8], bf16[8]), r"expected f32 \(lifted by one_plus\)"),
        (lambda: RouterTopK(k=9, normalize=True).infer(f32[B, S, 8]), r"k is 9, but logits f32\[batch, seq, 8\] have 8 experts"),
        (lambda: CausalConv1d("relu").infer(f32[B, S, 8], f32[8, 1, 4], f32[B, 8, 3]), "activation is 'relu'"),
        (lambda: CausalConv1d().infer(f32[B, S, 8], f32[8, 1, 4], f32[B, 8, 4]), "should have 3 columns"),
        (lambda: Flatten(3).infer(f32[B, S, 8]), "needs known sizes in the last 3 axes"),
        (lambda: Dequantize("float32").infer(f32[4, 4]), "which is not quantised"),
        (lambda: Concat(axis=2).infer(f32[B, 8], f32[B, 8]), "has no axis 2"),
        (lambda: Embedding().infer(f32[B, S], f32[4, 8]), "expected i32 or i64"),
    ],
)
def test_refusals_name_the_type(infer: object, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        infer()  # type: ignore[operator]


def test_heads_must_divide() -> None:
    q, v = f32[B, S, 2, 8], f32[B, S, 3, 8]
    with pytest.raises(GraphError, match="the heads of v .* are not a multiple of those of k"):
        GatedDeltaRule(scale=1.0).infer(q, q, v, f32[B, S, 3], f32[B, S, 3], f32[B, 3, 8, 8])


def test_costs_of_what_reads_a_part() -> None:
    x, rows = f32[1, symbol("tokens"), 8], i32[symbol("rows")]
    assert str(TakeRows().cost(x, rows).bytes) == "68*rows"
    assert ZerosLike().cost(f32[B, 8]).bytes == 32 * B
    plain, silu = CausalConv1d(), CausalConv1d(activation="silu")
    types = f32[B, S, 12], f32[12, 1, 4], f32[B, 12, 3]
    assert silu.cost(*types).flops - plain.cost(*types).flops == 5 * 12 * B * S


def test_parts_of_weights_that_a_token_reads() -> None:
    assert Embedding().reads(i64[B, S], f32[160, 32]) == {"weight": Fraction(1, 160)}
    ids, x, weights = i32[B, S, 2], f32[B, S, 8], f32[B, S, 2]
    assert MoEExperts().reads(x, weights, ids, f32[4, 6, 8], f32[4, 8, 3]) == {"gate_up": Fraction(1, 2), "down": Fraction(1, 2)}
    shared = f32[B, S, 1], f32[4, 6, 8], f32[4, 8, 3], f32[10, 8], f32[8, 5]
    assert SharedMoE().reads(x, weights, ids, *shared) == {"gate_up": Fraction(1, 2), "down": Fraction(1, 2)}
    assert Linear().reads(f32[B, 32], f32[48, 32]) == {}
