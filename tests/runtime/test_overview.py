"""The overview against figures that were computed without it: the published sizes of the 80B model and a model made by hand."""

from pathlib import Path

import pytest

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import RequestError
from deltaloom.graph.types import f32, i64
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.overview import Overview, fold_layers, layer_letters, overview
from deltaloom.runtime.subject import read_subject

CONFIG = Path(__file__).parents[1] / "models" / "config_80b.json"

# Sizes of the 80B model, counted by hand from its specification.
H, V, LAYERS, DELTA, FULL, E, K = 2048, 151936, 48, 36, 12, 512, 10
EXPERT = 3 * H * 512
DENSE = (
    DELTA * (H * 12288 + H * 64 + 8192 * 4 + 4096 * H + 2 * 32 + 128)  # projections, convolution, gates, norm
    + FULL * (H * 8192 + 2 * H * 512 + 4096 * H + 2 * 256)  # query with gate, key, value, output, norms
    + LAYERS * (H * E + EXPERT + H + 2 * H)  # router, shared expert and its gate, norms
    + H  # the last norm
)
STATE = 32 * 128 * 128
CONV = 8192 * 3


def hit(batch: int) -> float:
    """Experts of a layer that so many tokens reach, each being as likely."""
    return E * (1 - (1 - K / E) ** batch)


@pytest.fixture(scope="module")
def compiled() -> deltaloom.CompiledModel:
    pytest.importorskip("torch")
    return read_subject(str(CONFIG), config=CompileConfig(backends=("torch",), dtype="bfloat16")).compiled()


def test_parameters_of_the_80b(compiled: deltaloom.CompiledModel) -> None:
    found = compiled.overview()
    assert found.parameters == DENSE + LAYERS * E * EXPERT + 2 * V * H == 79_674_391_296
    # One row of the embedding is what a token reads of it.
    assert found.active == DENSE + LAYERS * K * EXPERT + V * H + H
    assert round(found.active / 1e9, 2) == 3.56


def test_states_of_the_80b(compiled: deltaloom.CompiledModel) -> None:
    found = compiled.overview()
    assert found.growing == 24_576
    assert found.fixed == DELTA * (4 * STATE + 2 * CONV) and 4 * DELTA * STATE == 75_497_472
    assert found.state_bytes(1_000_000) == found.fixed + 24_576_000_000


@pytest.mark.parametrize(("batch", "context"), [(1, 1000), (1, 32_768), (8, 32_768), (64, 1000)])
def test_work_of_a_decode_step_of_the_80b(compiled: deltaloom.CompiledModel, batch: int, context: int) -> None:
    found = compiled.overview(batch=batch, context=context)
    weights = 2 * (DENSE + LAYERS * hit(batch) * EXPERT + V * H)
    states = batch * DELTA * (2 * STATE * 4 + 2 * CONV * 2)
    assert found.work.bytes == pytest.approx(weights + states + batch * context * 24_576, rel=0.01)
    active = DENSE + LAYERS * K * EXPERT + V * H
    flops = batch * (2 * active + FULL * 4 * 16 * 256 * context + DELTA * 7 * STATE)
    assert found.work.flops == pytest.approx(flops, rel=0.01)


def test_parts_add_up(compiled: deltaloom.CompiledModel) -> None:
    found = compiled.overview()
    tops = [part for part in found.parts if part.depth == 0]
    assert [part.name for part in tops] == ["input", "linear_layer", "attention_layer", "output"]
    assert [part.calls for part in tops] == [1, 36, 12, 1]
    for position, part in enumerate(found.parts):
        inside = []
        for other in found.parts[position + 1 :]:
            if other.depth == 0:
                break
            inside.append(other)
        if part.depth == 0 and inside:
            assert sum(other.parameters for other in inside) == part.parameters
            assert sum(other.work.flops for other in inside) == part.work.flops


def tied() -> Overview:
    """An embedding that is the head too."""
    g = GraphBuilder("tied")
    ids = g.input("ids", i64[symbol("batch"), symbol("seq")])
    table = g.param("table", [10, 4])
    g.output("logits", g.linear(g.embedding(ids, table), table))
    graph = g.build()
    return deltaloom.compile(graph).overview(batch=2)


def test_a_parameter_counts_once_where_most_of_it_is_read() -> None:
    found = tied()
    assert (found.parameters, found.active, found.layers) == (40, 40, "none")
    assert [part.name for part in found.parts] == ["tied"]
    assert (found.fixed, found.growing) == (0, 0)


def test_sizes_that_cannot_be_are_refused() -> None:
    g = GraphBuilder("plain")
    g.output("y", g.silu(g.input("x", f32[symbol("batch"), 4])))
    graph = g.build()
    assert overview(graph, graph, batch=3).work.flops == 60
    with pytest.raises(RequestError, match="batch is 0, expected at least 1"):
        overview(graph, graph, batch=0)
    with pytest.raises(RequestError, match="context is -1"):
        overview(graph, graph, context=-1)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], "none"),
        (["a"], "A"),
        (["a"] * 4, "4 × A"),
        (["a", "b"], "A + B"),
        (["a", "a", "b"] * 3, "3 × (2 × A + B)"),
        (["a", "b", "a"], "A + B + A"),
        (["a1", "a2", "a1"], "A + 2 + A"),
    ],
)
def test_layers_are_folded(names: list[str], folded: str) -> None:
    assert fold_layers(names, layer_letters(names)) == folded
