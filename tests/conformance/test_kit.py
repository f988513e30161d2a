"""The conformance kit finds what it is there for: each op here breaks one promise."""

from typing import Any, ClassVar

import numpy as np
import pytest

from deltaloom.graph.errors import GraphError
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.types import TensorType, bf16, f32, f64
from deltaloom.ops.attention import Attention
from deltaloom.ops.convolution import CausalConv1d
from deltaloom.ops.delta_rule import GatedDeltaRule
from deltaloom.ops.elementwise import Add
from deltaloom.ops.fused_moe import SharedMoE
from deltaloom.ops.laws import Idempotent, PaddingIsNoOp, PermutationEquivariant, Streaming
from deltaloom.ops.linear import Linear
from deltaloom.ops.moe import MoEExperts
from deltaloom.ops.norm import L2Norm
from deltaloom.ops.quantized import Quantize
from deltaloom.testing import checks, conformance
from deltaloom.testing.draw import SeededDraw
from deltaloom.testing.measure import assert_close, distance

SEEDS = range(40)


def fails(check: Any, op: type[Op]) -> bool:
    """Whether ``check`` finds a fault in ``op`` in one of a few cases."""
    for seed in SEEDS:
        try:
            check(op, SeededDraw(seed))
        except AssertionError:
            return True
    return False


class WrongType(L2Norm):
    def infer(self, x: TensorType) -> TensorType:
        return x


class LenientType(Linear):
    def infer(self, x: TensorType, weight: TensorType, bias: TensorType | None = None) -> TensorType:
        return x.with_shape(*x.shape[:-1], weight.shape[0])


class WrongParts(CausalConv1d):
    def decompose(self, g: Any, x: Any, weight: Any, state: Any) -> Any:
        return g.causal_conv1d(x, weight, state)


class WrongTorch(L2Norm):
    def torch(self, torch: Any, x: Any) -> Any:
        return super().torch(torch, x) * (1 + 1e-4)


class Difference(Add):
    def reference(self, x: Array, y: Array) -> Array:
        return x - y


class WrongFactors(L2Norm):
    sharding: ClassVar[str] = "... d -> ... d"


class WrongBias(Linear):
    sharding: ClassVar[str] = "... i, o i, o -> ... o"


class InterleavedExperts(MoEExperts):
    sharding: ClassVar[str] = MoEExperts.sharding.replace("(2 i)", "(i 2)")


class RepeatsOutside(Attention):
    sharding: ClassVar[str] = Attention.sharding.replace("(h r)", "(r h)")


class SharedOnEveryRank(SharedMoE):
    sharding: ClassVar[str] = SharedMoE.sharding.replace("+", "")


class CutsInsideBlocks(Quantize):
    def factors(self, w: TensorType) -> str:
        return "... -> ..."


class ForgetsState(CausalConv1d):
    def reference(self, x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
        y, new_state = super().reference(x, weight, state)
        return y, np.zeros_like(new_state)


class DecaysInPadding(GatedDeltaRule):
    laws: ClassVar[tuple[Any, ...]] = (PaddingIsNoOp(("q", "k", "v", "log_decay", "beta"), zero=("beta",)),)


class MixesBatch(L2Norm):
    laws: ClassVar[tuple[Any, ...]] = (PermutationEquivariant(("x",)),)

    def reference(self, x: Array) -> Array:
        return np.cumsum(super().reference(x), axis=0)


class LooksAhead(Add):
    laws: ClassVar[tuple[Any, ...]] = (Streaming(("x", "y")),)

    def reference(self, x: Array, y: Array) -> Array:
        return x + y.sum(axis=1, keepdims=True)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        return Case(cls(), (draw.uniform(0, 1, 2, 5), draw.uniform(0, 1, 2, 5)))


class Doubles(L2Norm):
    laws: ClassVar[tuple[Any, ...]] = (Idempotent(),)

    def reference(self, x: Array) -> Array:
        return 2 * x


@pytest.mark.parametrize(
    ("check", "op"),
    [
        (checks.check_types, WrongType),
        (checks.check_decompose, WrongParts),
        (checks.check_torch, WrongTorch),
        (checks.check_commutative, Difference),
        (checks.check_sharding_string, WrongFactors),
        (checks.check_sharding_string, WrongBias),
        (checks.check_sharding_string, InterleavedExperts),
        (checks.check_sharding_string, RepeatsOutside),
        (checks.check_sharding_string, SharedOnEveryRank),
        (checks.check_sharding_string, CutsInsideBlocks),
        (checks.check_laws, ForgetsState),
        (checks.check_laws, DecaysInPadding),
        (checks.check_laws, MixesBatch),
        (checks.check_laws, LooksAhead),
        (checks.check_laws, Doubles),
    ],
)
def test_a_broken_promise_is_found(check: Any, op: type[Op]) -> None:
    if check is checks.check_torch:
        pytest.importorskip("torch")
    assert fails(check, op)
    assert not fails(check, op.__mro__[1]), "the sound op must pass, or the fault proves nothing"


def test_types_that_are_accepted_must_work() -> None:
    """A lenient infer lets sizes through that the reference cannot multiply, or mixes dtypes."""
    with pytest.raises((AssertionError, ValueError)):
        for seed in range(200):
            checks.check_bad_types(LenientType, SeededDraw(seed))


def test_an_op_without_cases_is_refused() -> None:
    class NoCases(L2Norm):
        cases: ClassVar[None] = None  # type: ignore[assignment]

    with pytest.raises(GraphError, match="no cases rule"):
        checks.check_types(NoCases, SeededDraw(0))


def test_a_prefix_chooses_the_ops() -> None:
    marks = conformance("rope", backends=()).pytestmark  # type: ignore[attr-defined]
    found = [case.id for case in next(mark for mark in marks if mark.name == "parametrize").args[1]]
    assert {name.split("-")[1] for name in found} == {"rope"}
    assert {"op-rope-types", "op-rope-torch", "op-rope-bad_types", "op-rope-round_trip"} <= set(found)


def test_the_measure_scales_with_the_mantissa() -> None:
    truth = np.linspace(1.0, 2.0, 64)
    for dtype, slip in ((f64, 1e-11), (f32, 1e-4), (bf16, 0.1)):
        rounded = truth.astype(dtype.numpy)
        assert_close("the rounded truth", rounded, truth, rounded)
        wrong = (truth + slip).astype(dtype.numpy)
        with pytest.raises(AssertionError, match="from the float64 reference"):
            assert_close("a slip", wrong, truth, rounded)


def test_the_measure_sees_what_is_not_finite() -> None:
    truth = np.array([1.0, 2.0])
    assert distance(np.array([1.0, np.nan]), truth) == np.inf
    assert distance(np.array([1.0, 2.0]), np.array([1.0, np.inf])) == np.inf
    assert distance(np.array([1.0, -np.inf]), np.array([1.0, -np.inf])) == 0


def test_the_measure_is_lenient_below_the_normal_numbers_only() -> None:
    assert distance(np.array([0.0, 1e-30], np.float32), np.zeros(2)) > 1e7
    assert distance(np.array([0.0, 1e-44], np.float32), np.zeros(2)) < 1e-5
    assert distance(np.array([0.0, 1e-44]), np.zeros(2)) > 1e7
