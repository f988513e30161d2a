"""Each suite finds what it is there for: a fault is planted, and the check that it breaks names it; nothing else fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.graph.errors import ConfigError
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Op
from deltaloom.graph.rewriter import Rewriter
from deltaloom.graph.types import DType, TensorType, f32
from deltaloom.ops.elementwise import Silu
from deltaloom.passes.fuse.swiglu import FusePackedSwiglu
from deltaloom.passes.kernel import Kernel, dtype_in
from deltaloom.passes.pipeline import Context, Pass
from deltaloom.testing import (
    BackendSuite,
    ModelSuite,
    OpSuite,
    Outcome,
    PassSuite,
    Requirements,
    RuleSuite,
    Suite,
    claims,
    outcomes,
)
from deltaloom.testing.suite import Check

EXAMPLES = 25


def failures(suite: Suite, *only: str) -> dict[str, str]:
    """Check -> text of those that fail, of subjects and checks with one of ``only`` in their titles."""
    found: list[Outcome] = []
    for check in suite.checks():
        if not only or any(part in check.title for part in only):
            found += outcomes(
                [Suite.of(checks=lambda self, one=check: iter([one]), requirements=suite.requirements)], examples=EXAMPLES
            )
    return {f"{one.subject}: {one.check}": one.text for one in found if one.status == "failed"}


class FromNumpy(NumpyBackend):
    """NumPy's kernels under another name, those of ``changed`` in front; faults are planted in subclasses."""

    name = "tampered"
    changed: Sequence[Kernel] = ()

    def kernels(self) -> Sequence[Kernel]:
        inherited = [replace(one, backend=self.name, title=f"numpy.{one.title or one.run.__name__}") for one in super().kernels()]
        return [*(replace(one, backend=self.name) for one in self.changed), *inherited]


def test_a_sound_backend_passes() -> None:
    assert failures(BackendSuite.of(backend=FromNumpy, kernels=False)) == {}


def off_by_one(op: Any, x: Array) -> Array:
    """Right but for the last element of long rows."""
    y: Array = op.reference(x)
    if y.shape[-1] > 2:
        y[..., -1] = y[..., -2]
    return y


def test_a_kernel_that_is_off_by_one_is_named_with_its_op() -> None:
    class Tampered(FromNumpy):
        changed = (Kernel("silu", "tampered", off_by_one),)

    found = failures(BackendSuite.of(backend=Tampered), "for silu")
    name = "kernel tampered.off_by_one for silu"
    assert set(found) == {f"{name}: agrees with the reference", f"{name}: other dtypes"}
    text = found[f"{name}: agrees with the reference"]
    assert "output 0 of the tampered.off_by_one for silu()" in text and "drawn: " in text


def test_a_rule_of_an_op_that_is_off_is_named() -> None:
    pytest.importorskip("torch")

    class Scaled(Silu):
        name: ClassVar[str] = "tests.scaled"

        def torch(self, torch: Any, x: Any) -> Any:
            return super().torch(torch, x) * 1.001

    assert list(failures(OpSuite.of(op=Scaled, backends=()), "torch", "types")) == ["op tests.scaled: torch"]


def test_a_guard_that_never_refuses_is_found() -> None:
    def always(node: Any) -> None:
        return None

    class Tampered(FromNumpy):
        changed = (Kernel("silu", "tampered", lambda op, x: op.reference(x), when=(dtype_in("x", f32), always), title="guarded"),)

    found = failures(BackendSuite.of(backend=Tampered), "tampered.guarded")
    assert list(found) == ["kernel tampered.guarded for silu: guards"]
    assert "guards that refuse no case of silu: 1 (test_a_guard_that_never_refuses_is_found.always)" in found[list(found)[0]]


def step_on_stale_state(op: Any, *inputs: Any) -> Any:
    """A convolution that gives back the state it was given."""
    y, _ = op.reference(*inputs)
    return y, inputs[-1]


def test_a_backend_that_mixes_up_states_is_found_where_states_are_carried() -> None:
    class Tampered(FromNumpy):
        changed = (Kernel("causal_conv1d", "tampered", step_on_stale_state),)

    found = failures(BackendSuite.of(backend=Tampered, kernels=False), "prefill", "decode")
    assert list(found) == ["backend tampered: decode, float32"]
    assert "state model.layers.0.linear_attn.conv" in found["backend tampered: decode, float32"]


def test_zeros_that_share_memory_and_narrow_numbers_that_are_lost_are_found() -> None:
    class Tampered(FromNumpy):
        _kept: ClassVar[dict[Any, Array]] = {}

        def zeros(self, shape: Sequence[int], dtype: DType) -> Array:
            return self._kept.setdefault((tuple(shape), dtype), super().zeros(shape, dtype))

        def from_host(self, array: Any) -> Any:
            return np.asarray(array, np.float32) if getattr(array, "dtype", None) == np.float64 else array

    found = failures(BackendSuite.of(backend=Tampered, kernels=False), "zeros", "there and back")
    assert "share memory" in found["backend tampered: zeros"]
    assert "float32" in found["backend tampered: float64 there and back"]
    assert "backend tampered: float32 there and back" not in found


def test_a_backend_that_takes_any_device_is_found() -> None:
    class Tampered(FromNumpy):
        def __init__(self, *, device: str | None = None, threads: int | None = None) -> None:
            super().__init__(threads=threads)

    found = failures(BackendSuite.of(backend=Tampered, kernels=False), "refusals", "protocol", "prefill")
    assert found == {"backend tampered: refusals": "tampered takes the device 'no such device'; expected CompileError"}


@dataclass(frozen=True)
class DropsSilu(Pass):
    """Take silu for the identity."""

    name = "tests.drops_silu"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return self.each(graph, ctx)

    def region(self, graph: Graph, ctx: Context) -> Graph:
        rewriter = Rewriter(graph)
        for node in graph.nodes:
            if node.op.name == "silu":
                rewriter.replace(node.outputs[0], node.inputs[0])
                rewriter.remove(node)
        return rewriter.result(after=self.name)


@dataclass(frozen=True)
class Restless(Pass):
    """Exchange the inputs of every sum."""

    name = "tests.restless"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        rewriter = Rewriter(graph)
        for node in graph.nodes:
            if node.op.name == "add" and node.inputs[0] != node.inputs[1]:
                rewriter.change(node, node.op, node.inputs[::-1])
        return rewriter.result(after=self.name)


@dataclass(frozen=True)
class Destroys(Pass):
    """Empty the regions of the graph that was given."""

    name = "tests.destroys"

    def run(self, graph: Graph, ctx: Context) -> Graph:
        after = replace(graph, regions=dict(graph.regions))
        for name, region in list(graph.regions.items()):
            graph.regions[name] = replace(region, nodes=())  # type: ignore[index]
        return after


@dataclass(frozen=True)
class Impossible(Pass):
    """Require what nobody makes."""

    name = "tests.impossible"
    requires = ("blessed",)

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return graph


@pytest.mark.parametrize(
    ("step", "check", "text"),
    [
        (DropsSilu, "meaning", "after pass tests.drops_silu is"),
        (Restless, "idempotent", "pass tests.restless changes its own result"),
        (Destroys, "input left alone", "pass tests.destroys changed the graph that it was given"),
        (Impossible, "contract", "requires 'blessed', which no known pass establishes"),
        (Impossible, "legal graph", "'blessed', which tests.impossible requires, so it can never run"),
    ],
)
def test_a_pass_that_breaks_a_promise_is_named(step: type[Pass], check: str, text: str) -> None:
    suite = PassSuite.of(step=step)
    found = failures(suite, check)
    assert list(found) == [f"pass {step.name}: {check}"]
    assert text in found[f"pass {step.name}: {check}"]


def test_a_rule_that_changes_the_meaning_is_named() -> None:
    class Swapped(FusePackedSwiglu):
        name: ClassVar[str] = "tests.swapped"

        def rewrite(self, g: Any, m: Any) -> Any:
            gate, up = g.split(m.both, sizes=(m["width"], m["width"]))
            return g.swiglu(up, gate)

    found = failures(RuleSuite.of(rule=Swapped))
    assert list(found) == ["rule tests.swapped: keeps the meaning"]


class NoOp(Op):
    """x, as it is."""

    name: ClassVar[str] = "tests.no_op"

    def infer(self, x: TensorType) -> TensorType:
        return x


def test_an_op_without_what_an_op_needs_is_named() -> None:
    found = failures(OpSuite.of(op=NoOp, backends=()), "complete")
    assert found == {"op tests.no_op: complete": "op tests.no_op has no reference, so nothing says what it computes"}


def test_a_family_whose_graph_misses_a_weight_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is built without the norm of the keys: it does not fit a published checkpoint any more."""
    import deltaloom.models.qwen3.graph as qwen3

    real = qwen3.plain_norm
    monkeypatch.setattr(qwen3, "plain_norm", lambda g, config, x, module: x if module == "k_norm" else real(g, config, x, module))
    checkpoint = Path(__file__).resolve().parents[1] / "golden" / "qwen3_dense"
    found = failures(ModelSuite.of(model="qwen3", checkpoint=checkpoint, backends=()))
    assert set(found) == {"model qwen3: inventory"}
    assert "k_norm.weight" in found["model qwen3: inventory"]


def test_a_weight_that_is_read_for_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import deltaloom.models.qwen3.graph as qwen3

    real = qwen3.plain_norm

    def norm(g: Any, config: Any, x: Any, module: str) -> Any:
        return (real(g, config, x, module), x)[module == "k_norm"]

    monkeypatch.setattr(qwen3, "plain_norm", norm)
    found = failures(ModelSuite.of(model="qwen3", backends=()), "weights are used")
    assert "k_norm.weight" in found["model qwen3: weights are used"]


def test_claims_decide_what_is_run_and_what_is_counted() -> None:
    by_check = {
        one.check: one for one in outcomes([OpSuite.of(op=Silu, backends=(), requirements=claims("torch", "laws"))], examples=2)
    }
    assert by_check["types"].status == by_check["torch"].status == "passed"
    assert by_check["sharding_string"].status == "unclaimed" and "'sharding' is not claimed" in by_check["sharding_string"].text
    assert by_check["laws"].status == "failed" and "op silu claims 'laws' and does not have it" in by_check["laws"].text


def test_a_limitation_is_skipped_with_its_reason() -> None:
    limited = Requirements(limitations={"op silu: tor*": "no torch here"})
    (one,) = (o for o in outcomes([OpSuite.of(op=Silu, backends=(), requirements=limited)], examples=1) if o.check == "torch")
    assert (one.status, one.text) == ("skipped", "no torch here")


def test_a_claim_that_is_no_feature_is_refused() -> None:
    with pytest.raises(ConfigError, match="'flying' is claimed, but there is no such feature; known are .*sharding"):
        claims("flying")


def test_a_check_of_which_no_case_is_accepted_fails() -> None:
    suite = Suite.of(checks=lambda self: iter([Check("op x", "empty", lambda draw: False)]))
    (one,) = outcomes([suite], examples=5)
    assert one.status == "failed" and "none of the generated cases is accepted" in one.text


def test_a_suite_that_cannot_list_its_checks_is_one_failure() -> None:
    class Absent(FromNumpy):
        def __init__(self, **options: Any) -> None:
            raise SystemExit(3)

    (one,) = outcomes([BackendSuite.of(backend=Absent)])
    assert (one.subject, one.check, one.status) == ("backend tampered", "can be tested", "failed")
    assert "SystemExit: 3" in one.text
