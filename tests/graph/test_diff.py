"""The difference of two graphs names what is gone, new and changed."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.diff import diff
from deltaloom.graph.ir import Graph
from deltaloom.graph.rewriter import Rewriter
from deltaloom.ops.elementwise import Mul, Silu


def test_removed_added_and_changed_nodes(sample: Graph) -> None:
    region = sample.regions["layer"]
    rewriter = Rewriter(region)
    act, twice = region.producers["act"], region.producers["twice"]
    new = rewriter.insert(Silu(), act.inputs[:1], name="plain", before=act)
    rewriter.replace(act.outputs[0], new)
    rewriter.remove(act)
    rewriter.change(twice, Mul())
    after = replace(sample, regions={"layer": rewriter.result()})
    assert diff(sample, after).splitlines() == [
        "region layer: 1 removed, 1 added, 3 changed (6 -> 6 nodes)",
        '  -   %act: f32[batch, seq, 4] = swiglu(%gate, %up) on numpy swiglu, not torch.swiglu: "no \\"torch\\" here"  # mixer',
        "  +   %plain: f32[batch, seq, 4] = silu(%gate)  # mixer",
        "  ~ - %seen_now: f32[batch, past + seq, 4] = concat($seen, %act) {axis=1}",
        "  ~ + %seen_now: f32[batch, past + seq, 4] = concat($seen, %plain) {axis=1}",
        "  ~ - %twice: f32[batch, 4] = add($total, $total)",
        "  ~ + %twice: f32[batch, 4] = mul($total, $total)",
        "  ~ - %out: f32[batch, seq, 4] = add(%x, %act)",
        "  ~ + %out: f32[batch, seq, 4] = add(%x, %plain)",
    ]


def test_declarations_outputs_and_whole_regions(sample: Graph) -> None:
    weights = Graph("w", params=sample.params[:1], outputs=(("embed.weight", sample.params[0]),))
    after = replace(sample, params=sample.params[:1], outputs=(("top", sample.outputs[0][1]),), regions={}, weights=weights)
    lines = diff(sample, after).splitlines()
    assert lines[0] == "graph: 2 removed, 1 added, 0 changed (4 -> 4 nodes)"
    assert {"  -   param @norm.weight: f32[4]", "  -   output hidden = %norm", "  +   output top = %norm"} <= set(lines)
    assert "region layer: 13 removed, 0 added, 0 changed (6 -> 0 nodes)" in lines
    assert "weights: 0 removed, 2 added, 0 changed (0 -> 0 nodes)" in lines


@given(data=st.data())
def test_the_same_graph_has_no_difference(data: st.DataObject, random_graphs: Any) -> None:
    graph = data.draw(random_graphs)
    moved = replace(graph, nodes=tuple(replace(n, source="elsewhere.py:3", origins=("a",)) for n in graph.nodes))
    assert diff(graph, graph) == "" and diff(graph, moved) == ""


@given(data=st.data())
def test_the_other_way_round_swaps_the_counts(data: st.DataObject, random_graphs: Any) -> None:
    left, right = data.draw(random_graphs), data.draw(random_graphs)
    there, back = diff(left, right).splitlines(), diff(right, left).splitlines()
    assert sum(line.startswith("  -") for line in there) == sum(line.startswith("  +") for line in back)
    assert sum(line.startswith("  ~") for line in there) == sum(line.startswith("  ~") for line in back)
    assert (there == []) == (back == [])
