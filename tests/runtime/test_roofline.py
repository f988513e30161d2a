"""Rooflines: predictions are sums of costs over limits and agree with counts made by hand; measurements stand beside them."""

from dataclasses import replace
from pathlib import Path
from time import sleep

import pytest

import deltaloom
from deltaloom.backends.numpy.table import table
from deltaloom.graph.errors import ConfigError, RequestError
from deltaloom.graph.ir import Graph
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.cost import Work, graph_work
from deltaloom.runtime.compile import Kind
from deltaloom.runtime.device_profile import KNOWN, DeviceProfile
from deltaloom.runtime.model import Model
from deltaloom.runtime.roofline import Roofline, Step, measure, predict

CONFIG_80B = Path(__file__).resolve().parents[1] / "models" / "config_80b.json"
PROFILE = DeviceProfile("even", 40e9, {"float32": 160e9}, 1e-6)
DECODE, PREFILL = Step("decode", 1, 1, 300), Step("prefill", 2, 70, 10)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return deltaloom.load("tiny-next", config=CompileConfig(threads=1))


def graph_of(model: Model, step: Step) -> Graph:
    return model.main.program(step.variant).graph


@pytest.mark.parametrize("step", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_predicted_sums_are_the_cost_of_the_graph(tiny: Model, step: Step) -> None:
    graph = graph_of(tiny, step)
    found = predict(graph, step, PROFILE)
    total = graph_work(graph, step.sizes).total
    assert found.work == total
    assert found.floor == pytest.approx(max(total.flops / 160e9, total.bytes / 40e9))
    assert sum(row.floor for row in found.rows) >= found.floor * (1 - 1e-9)
    nodes = {(i.graph.name, node.name) for i in graph.instances() for node in i.graph.nodes if node.op.name != "call"}
    assert {(row.body, name) for row in found.rows for name in row.nodes} == nodes
    assert found.layers == 8 and found.kernels == sum(len(i.graph.nodes) for i in graph.instances()) - 8
    assert found.dispatch == pytest.approx(found.kernels * 1e-6)
    assert found.seconds is found.observed is None and all(row.seconds is row.ratio is None for row in found.rows)


def test_every_row_takes_the_longer_of_its_two_limits(tiny: Model) -> None:
    slow_memory = replace(PROFILE, bandwidth=1.0, dispatch=0.0)
    slow_arithmetic = replace(PROFILE, flops={"float32": 1.0}, dispatch=0.0)
    graph = graph_of(tiny, DECODE)
    for profile, bound in ((slow_memory, "bytes"), (slow_arithmetic, "operations")):
        found = predict(graph, DECODE, profile)
        rows = [row for row in found.rows if row.work.flops]
        assert rows and {row.bound for row in rows} == {bound}
        for row in rows:
            assert row.floor == pytest.approx(row.work.bytes if bound == "bytes" else row.work.flops)
    slow_start = predict(graph, DECODE, replace(PROFILE, dispatch=1.0))
    assert {row.bound for row in slow_start.rows} == {"dispatch"}


def test_the_80b_takes_what_its_published_counts_say() -> None:
    """Decode of one sequence in bfloat16 on an H200: 1.60 ms after 1,000 tokens, 1.77 after 32,768; prefill of 8,192 in 79 ms."""
    graph = deltaloom.build_graph(CONFIG_80B, dtype="bfloat16").main
    compiled = deltaloom.compile(graph, CompileConfig(backends=("torch",), dtype="bfloat16"))

    def floor(kind: Kind, tokens: int, context: int) -> Roofline:
        step = Step(kind, 1, tokens, context)
        return predict(compiled.program(kind, outputs=("last_logits",)).graph, step, KNOWN["h200"])

    assert floor("decode", 1, 1000).floor == pytest.approx(1.60e-3, rel=0.01)
    assert floor("decode", 1, 32768).floor == pytest.approx(1.77e-3, rel=0.02)
    assert floor("prefill", 8192, 0).work.flops / 8192 == pytest.approx(7.52e9, rel=0.02)


@pytest.mark.parametrize("step", [DECODE, replace(DECODE, batch=3, context=0), PREFILL], ids=["decode", "batch", "prefill"])
def test_measured_times_stand_beside_the_predicted_ones(tiny: Model, step: Step) -> None:
    found = measure(tiny, step, PROFILE, repetitions=2)
    predicted = predict(graph_of(tiny, step), step, PROFILE)
    assert [replace(row, seconds=None) for row in found.rows] == list(predicted.rows)
    assert found.seconds is not None and 0 < found.seconds < 60
    assert found.observed == pytest.approx(sum(row.seconds or 0 for row in found.rows))
    for row in found.rows:
        assert row.seconds is not None and row.seconds > 0
        assert row.ratio is None if not row.floor else row.ratio == pytest.approx(row.seconds / row.floor)


def test_a_slow_kernel_is_found(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution is made to wait: its row, and no other, takes that long."""
    kernels = list(table.kernels)
    for number, kernel in enumerate(kernels):
        if kernel.op == "causal_conv1d":

            def late(*arguments: object, run: object = kernel.run, **buffers: object) -> object:
                assert callable(run)
                sleep(0.005)
                return run(*arguments, **buffers)

            kernels[number] = replace(kernel, run=late, title=kernel.name.partition(".")[2])
    monkeypatch.setattr(table, "kernels", kernels)
    found = measure(deltaloom.load("tiny-next"), Step("prefill", 1, 4, 0), PROFILE, repetitions=2)
    slow = {row.op for row in found.rows if row.seconds is not None and row.seconds > 0.005 * row.calls}
    assert slow == {"causal_conv1d"}


@pytest.mark.parametrize(
    "kind, batch, tokens, context, sentence",
    [
        ("decode", 1, 2, 0, "tokens is 2, and a decode step takes 1"),
        ("prefill", 1, 1, 0, "tokens is 1, and a prefill step takes at least 2"),
        ("decode", 0, 1, 0, "batch is 0, expected at least 1"),
        ("decode", 1, 1, -1, "context is -1, expected at least 0"),
    ],
)
def test_impossible_steps_are_refused(kind: Kind, batch: int, tokens: int, context: int, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        Step(kind, batch, tokens, context)


def test_what_does_not_fit_is_refused(tiny: Model) -> None:
    with pytest.raises(RequestError, match="2049 tokens are more than the maximum context length of 2048"):
        measure(tiny, Step("decode", 1, 1, 2048), PROFILE)
    with pytest.raises(RequestError, match="repetitions is 0"):
        measure(tiny, DECODE, PROFILE, repetitions=0)
    with pytest.raises(ConfigError, match="has no flops for float32, only for bfloat16"):
        predict(graph_of(tiny, DECODE), DECODE, replace(PROFILE, flops={"bfloat16": 1e12}))


def test_a_row_without_bytes_has_no_finite_intensity() -> None:
    (row, *_) = predict(deltaloom.compile(deltaloom.build_graph("tiny-next").main).program("decode").graph, DECODE, PROFILE).rows
    assert replace(row, work=Work(1, 0)).work.intensity == float("inf")
    assert replace(row, work=Work(0, 0)).work.intensity == 0
    assert replace(row, work=Work(6, 3)).work.intensity == 2
