"""Faults that are planted one at a time, and what ``compare`` and ``bisect`` say of each: the node, the rule or the pass."""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deltaloom
import deltaloom.backends.numpy.backend
from deltaloom.backends.numpy.table import table
from deltaloom.graph.errors import CompileError, ConfigError, RequestError
from deltaloom.graph.ir import Graph, Node
from deltaloom.graph.registry import ops
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.fuse.norm import FuseAddRMSNorm
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.runtime import weights
from deltaloom.runtime.bisect import Bisection, bisect
from deltaloom.runtime.compare import REFERENCE, Finding, Way, compare

IDS = [5, 17, 99, 3, 44, 250, 7, 12, 300, 21]
NUMPY = CompileConfig(backends=("numpy",), threads=1)
UNFUSED = replace(NUMPY, skip=("fold", "fuse", "border_fusion"))
Wrong = Callable[..., Any]


def found(a: Way = NUMPY, b: Way = REFERENCE, ids: list[int] = IDS, steps: int = 2) -> Finding:
    finding = compare("tiny-next", a, b, ids=ids, steps=steps).finding
    assert finding is not None
    return finding


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Wrong], None]:
    """Puts ``wrong(run, op, *arguments, **buffers)`` in the place of NumPy's kernels for an op."""

    def put(op: str, wrong: Wrong) -> None:
        def replaced(kernel: Any) -> Any:
            @wraps(kernel.run)
            def run(*given: Any, **buffers: Any) -> Any:
                return wrong(kernel.run, *given, **buffers)

            return replace(kernel, run=run) if kernel.op == op else kernel

        monkeypatch.setattr(table, "kernels", [replaced(kernel) for kernel in table.kernels])

    return put


@pytest.mark.parametrize("a", [NUMPY, UNFUSED, replace(NUMPY, quantise="int8")], ids=["fused", "unfused", "int8"])
def test_what_is_right_parts_nowhere(a: CompileConfig) -> None:
    seen = compare("tiny-next", a, REFERENCE, ids=IDS, steps=2)
    assert seen.finding is None and seen.values > 150 and seen.states == 3 * 16 and len(seen.largest) == 3


def test_torch_and_numpy_part_nowhere() -> None:
    pytest.importorskip("torch")
    seen = deltaloom.compare("tiny-next", NUMPY, CompileConfig(backends=("torch",)), ids=IDS)
    assert seen.finding is None and not any(seen.unmatched.values()) and seen.values > 400


def test_ranks_and_one_rank_part_nowhere() -> None:
    seen = compare("tiny-next", REFERENCE, replace(NUMPY, mesh={"tp": 2}), ids=IDS, steps=1)
    assert seen.finding is None and seen.values > 500


def kernel_at(finding: Finding, name: str, kernel: str) -> str:
    assert (finding.cause.kind, finding.cause.name) == ("kernel", name), finding.cause
    assert f"the kernel {kernel} does not compute" in finding.cause.sentence
    return finding.cause.interior


def test_a_norm_with_another_epsilon(plant: Any) -> None:
    plant("rms_norm", lambda run, op, *given, **buffers: run(replace(op, eps=1e-2), *given, **buffers))
    assert kernel_at(found(UNFUSED), "layers.0.input_layernorm", "numpy.rms_norm") == ""


def test_a_convolution_that_is_off_by_one(plant: Any) -> None:
    def late(run: Wrong, op: Any, x: Any, weight: Any, state: Any, **buffers: Any) -> Any:
        out, new = run(op, x, weight, state, **buffers)
        return np.roll(out, 1, axis=1) if x.shape[1] > 1 else out, new

    plant("causal_conv1d", late)
    kernel_at(found(), "layers.0.linear_attn.heads.conv1d", "numpy.convolution")


def test_key_heads_in_another_order(plant: Any) -> None:
    """Query head i with key head i % 2 instead of i // group."""

    def mixed(run: Wrong, op: Any, q: Any, *rest: Any, **buffers: Any) -> Any:
        heads = q.shape[2]
        order = np.arange(heads).reshape(2, -1).T.reshape(-1)
        return run(op, np.ascontiguousarray(q[:, :, order]), *rest, **buffers)

    plant("gated_attention", mixed)
    interior = kernel_at(found(), "layers.3.self_attn.gated", "numpy.gated_attention_blocks")
    assert interior == "every part of its decomposition is right on this backend, so only the fused kernel is wrong"


def test_a_state_that_is_not_renewed(plant: Any) -> None:
    """Seen as the new state of that step, not first in the logits of the next."""

    def stale(run: Wrong, op: Any, *given: Any, **buffers: Any) -> Any:
        position = op.input_names().index("delta")
        before = np.array(given[position])
        out, conv, _ = run(op, *given, **buffers)
        return out, conv, before

    plant("gated_delta_net", stale)
    finding = found()
    assert (finding.step, finding.name) == (1, "layers.0.linear_attn.delta_rule.new_state")
    kernel_at(finding, "layers.0.linear_attn.heads", "numpy.delta_net_step")


def test_a_convolution_state_that_is_lost_between_chunks(plant: Any) -> None:
    plant("causal_conv1d", lambda run, op, x, weight, state, **b: run(op, x, weight, np.zeros_like(state), **b))
    unfused = replace(UNFUSED, prefill_chunk=4)
    finding = found(unfused)
    assert finding.step == 1, "the first chunk starts at zero, so that only the decode step shows it"
    kernel_at(finding, "layers.0.linear_attn.conv1d", "numpy.convolution_step")


def test_positions_that_are_one_too_far_at_decode(plant: Any) -> None:
    plant("rotary_embedding", lambda run, op, positions, **b: run(op, positions + (positions.shape[1] == 1), **b))
    finding = found()
    assert finding.step == 1
    kernel_at(finding, "rotary.cos", "numpy.rotary_embedding")


def test_sums_in_bfloat16(plant: Any) -> None:
    def narrow(run: Wrong, op: Any, x: Any, weight: Any, *rest: Any, **buffers: Any) -> Any:
        made = run(op, x, weight, *rest, **buffers)
        made[...] = made.astype(ml_dtypes.bfloat16)
        return made

    plant("linear", narrow)
    finding = found()
    assert 2**-10 < finding.difference.error < 2**-6 and finding.difference.ulps > 1e4
    kernel_at(finding, finding.cause.name, "numpy.linear")


def test_experts_that_are_mixed_up(plant: Any) -> None:
    plant("shared_moe", lambda run, op, x, weights, ids, *rest, **b: run(op, x, weights, ids ^ 1, *rest, **b))
    plant("moe_experts", lambda run, op, x, weights, ids, *rest, **b: run(op, x, weights, ids ^ 1, *rest, **b))
    finding = found()
    assert finding.cause.kind == "kernel" and finding.cause.name.startswith("layers.0.mlp")


def test_a_kernel_that_writes_over_what_is_still_read(plant: Any) -> None:
    def greedy(run: Wrong, op: Any, x: Any, *rest: Any, **buffers: Any) -> Any:
        made = np.array(run(op, x, *rest))
        x[...] = 0
        return made

    plant("silu", greedy)
    plant("sigmoid", greedy)
    plant("router_topk", lambda run, op, logits, **b: (run(op, logits.copy(), **b), logits.fill(0))[0])
    plant("rms_norm", greedy)
    finding = found(UNFUSED)
    assert finding.cause.kind == "overwritten"
    assert "wrote over" in finding.cause.sentence and "their buffers overlap" in finding.cause.sentence


def test_a_weight_in_a_wrong_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    make = weights.materialise

    def swapped(graph: Any, value: Any, prefix: str, *rest: Any) -> Any:
        made = make(graph, value, prefix, *rest)
        return made[::-1] if prefix == "model.layers.3." and "o_proj" in value.name else made

    monkeypatch.setattr(weights, "materialise", swapped)
    finding = found()
    assert (finding.kind, finding.name) == ("weight", "layers.3.self_attn.o_proj.weight")
    assert "is not the checkpoint's" in finding.cause.sentence


def test_a_wrong_sharding_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are summed over what the ranks have each a part of."""
    wrong = "b s h!, b s k!, b s k!, e! (i 2) h!, e! h! i -> b s h!"
    monkeypatch.setattr(ops.get("moe_experts"), "sharding", wrong)
    finding = found(REFERENCE, replace(NUMPY, mesh={"tp": 2}), steps=0)
    assert (finding.cause.kind, finding.name) == ("ranks", "layers.0.mlp.experts")
    assert f"its sharding string is '{wrong}'" in finding.cause.sentence


def blamed(how: Bisection) -> tuple[str, str, str]:
    assert how.culprit is not None
    return how.culprit.pass_name, how.culprit.rule, how.culprit.node


def forgets_delta(self: FuseAddRMSNorm, g: Any, m: Any) -> Any:
    return g.add_rms_norm(m.x, m.x, m.weight, eps=m["eps"], zero_centred=m["zero_centred"])


def test_a_wrong_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FuseAddRMSNorm, "rewrite", forgets_delta)
    how = bisect("tiny-next", ids=IDS)
    assert blamed(how)[:2] == ("fuse", "add_rms_norm")
    assert how.culprit is not None and how.culprit.value and len(how.trials) < 20
    kind = found(NUMPY, UNFUSED).cause
    assert kind.kind == "graph" and "`deltaloom bisect` says which" in kind.sentence


def test_a_wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings packed in another order than they are split: of a pass without rules, the first value is named."""
    right = PackSiblings.region

    def swapped(node: Node) -> Node:
        """The weights of k and v, which have one shape, the other way round."""
        last = [value.type for value in node.inputs[-2:]]
        same = node.op.name == "concat" and len(node.inputs) == 3 and last[0] == last[1]
        return replace(node, inputs=(node.inputs[0], *node.inputs[:0:-1])) if same else node

    def region(self: PackSiblings, graph: Graph, ctx: Any) -> Graph:
        packed = right(self, graph, ctx)
        known = {node.name for node in graph.nodes}
        return replace(packed, nodes=tuple(node if node.name in known else swapped(node) for node in packed.nodes))

    monkeypatch.setattr(PackSiblings, "region", region)
    how = bisect("tiny-next", ids=IDS)
    assert blamed(how) == ("pack_siblings", "", "")
    assert how.culprit is not None and how.culprit.value.startswith("layers.3.self_attn.")


def test_a_judge_of_whole_configurations_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FuseAddRMSNorm, "rewrite", forgets_delta)
    wanted = last_logits(replace(NUMPY, fuel=0))
    how = bisect("tiny-next", lambda config: bool(np.allclose(last_logits(config), wanted, atol=1e-3)), config=NUMPY, ids=IDS)
    assert how.culprit is not None and how.culprit.rule == "add_rms_norm" and how.culprit.rewrite


def last_logits(config: CompileConfig) -> Any:
    return deltaloom.load("tiny-next", config=config).forward(IDS, logits="last").logits


def test_bisect_finds_nothing_where_nothing_is_wrong() -> None:
    how = bisect("tiny-next", ids=IDS)
    assert how.culprit is None and how.rewrites > 5 and all(trial.good for trial in how.trials)


@pytest.mark.parametrize(
    ("a", "b", "ids", "error", "text"),
    [
        (NUMPY, NUMPY, IDS, ConfigError, "there is nothing to compare"),
        (NUMPY, REFERENCE, [], RequestError, "expected some of"),
        (NUMPY, REFERENCE, [10**6], RequestError, "expected some of"),
        (NUMPY, CompileConfig(backends=("nope",)), IDS, CompileError, "nope"),
    ],
)
def test_what_cannot_be_compared(a: Way, b: Way, ids: list[int], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        compare("tiny-next", a, b, ids=ids)
