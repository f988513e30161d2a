"""The text form prints and parses back exactly, and damage to a text is refused with a sentence that shows the line."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.text import print_graph


@given(data=st.data())
def test_a_printed_graph_parses_back(data: st.DataObject, random_graphs: Any, registry: Any) -> None:
    graph = data.draw(random_graphs)
    text = print_graph(graph)
    again = parse_graph(text, registry=registry)
    assert again == graph
    assert print_graph(again) == text
    assert [type(a) for n in again.nodes for a in n.op.attributes().values()] == [
        type(a) for n in graph.nodes for a in n.op.attributes().values()
    ]


def test_the_text_is_as_it_was_written(sample: Graph, text: str) -> None:
    assert print_graph(sample) == text
    assert str(sample) == text


def test_what_the_text_means(sample: Graph) -> None:
    region = sample.regions["layer"]
    split = region.nodes[1]
    assert split.op.attributes() == {"sizes": (4, 4), "axis": -1}
    assert [value.name for value in split.outputs] == ["gate", "up"]
    assert region.states[1].append_axis == 1 and region.states[0].append_axis is None
    assert region.nodes[2].placement is not None
    assert region.nodes[2].placement.refusals[0].reason == 'no "torch" here'
    assert sample.nodes[3].origins == ("first", "second")
    assert sample.nodes[0].scope == "model" and sample.nodes[0].source == "models/sample.py:10"
    assert sample.symbols()["seq"].high == 64 and sample.symbols()["past"].low == 0


def test_remarks_and_empty_lines_are_not_read(sample: Graph, text: str, registry: Any) -> None:
    assert parse_graph("\n# a remark\n" + text.replace("\noutputs\n", "\n\n  # another\noutputs\n"), registry=registry) == sample


def test_sources_can_be_left_out(sample: Graph, registry: Any) -> None:
    text = print_graph(sample, sources=False)
    assert " at " not in text
    again = parse_graph(text, registry=registry)
    assert [n.source for n in again.nodes] == [""] * 4
    assert [n.scope for n in again.nodes] == [n.scope for n in sample.nodes]


def test_a_weight_graph_is_printed_under_its_owner(sample: Graph, registry: Any) -> None:
    layer = sample.regions["layer"]
    weights = Graph("layer.weights", params=layer.params, outputs=(("proj.weight", layer.params[0]),))
    graph = replace(sample, regions={"layer": replace(layer, weights=weights)})
    text = print_graph(graph)
    assert "  weights layer.weights\n    params\n      @proj.weight: f32[8, 4]\n" in text
    assert parse_graph(text, registry=registry) == graph


DAMAGES = [
    ("graph sample", "grap sample", "line 1: expected 'graph'"),
    ("(format 1)", "(format 2)", "has format 2, and this deltaloom reads up to format 1"),
    ("past >= 0", "past > 0", "line 2: expected '>='"),
    ("1 <= seq <= 64", "9 <= seq <= 5", "symbol 'seq' has the bounds 9 to 5"),
    ("past >= 0, ", "", "uses 'past', which is neither a number nor a declared symbol"),
    ("past >= 0", "batch >= 0", "expected a new symbol"),
    ("i64[batch, seq]", "i65[batch, seq]", "unknown dtype 'i65'"),
    ("i64[batch, seq]", "i64[batch seq]", "'batch seq' is not a dimension"),
    ("i64[batch, seq]", "i64(batch, seq)", "line 4: expected a type such as"),
    ("%ids: i64", "@ids: i64", "@ids should begin with '%' here"),
    ("  @norm.weight: f32[4]\n", "  @norm.weight: f32[4]\n  @norm.weight: f32[4]\n", "@norm.weight is defined twice"),
    ("embedding(%ids", "embedding(%idx", "%idx is not defined in the lines before"),
    ("= embedding(", "= embeding(", "there is no op 'embeding'; did you mean embedding"),
    ("= embedding(", "= embedding v2(", "op embedding is stored in version 2, and this deltaloom has version 1"),
    ("eps=1e-06", "epsilon=1e-06", "op rms_norm has no attribute 'epsilon'"),
    ("{eps=1e-06, zero_centred=False}", "{zero_centred=False}", "op rms_norm needs the attribute 'eps'"),
    ("eps=1e-06", "eps='small'", "attribute 'eps' of op rms_norm is 'small', expected float"),
    ("zero_centred=False", "zero_centred=0", "attribute 'zero_centred' of op rms_norm is 0, expected bool"),
    ("sizes=(4, 4)", "sizes=(4, 4.0)", "attribute 'sizes' of op split is (4, 4.0)"),
    ("eps=1e-06", "eps=small", "expected a number, a string, True, False, None or a tuple"),
    ("{axis=1}", "{axis=1", "expected ','"),
    ("hidden = %norm", "hidden %norm", "line 14: expected '='"),
    ("outputs\n  hidden", "results\n  hidden", "expected one of the sections inputs, params"),
    ("outputs\n  hidden", "outputs\n   hidden", "indented by 3 blanks, expected 2"),
    ("append axis 1", "append axis one", "expected an axis"),
    ("append axis 1", "append axis 3", "has no axis 3 to append to"),
    ("f32[batch, 4]\n", "f32[batch, 4] fixed\n", "nothing more was expected on this line"),
    ('not torch.swiglu: "no', "not torch.swiglu: no", "expected the reason in double quotes"),
    ("  # mixer\n", "  # mixer gate\n", "nothing more was expected on this line"),
    ("region layer", "region other", "calls region 'layer', which does not exist; there is other"),
    ("add(%x, %act)", "add(%x, %gate, %act)", "op add takes 2 inputs (x, y), got 3"),
    (
        "%out: f32[batch, seq, 4] =",
        "%out: f32[batch, seq, 5] =",
        "%out has type f32[batch, seq, 5], but add gives f32[batch, seq, 4]",
    ),
]


@pytest.mark.parametrize(("old", "new", "sentence"), DAMAGES, ids=[sentence[:40] for _, _, sentence in DAMAGES])
def test_damage_is_refused(text: str, registry: Any, old: str, new: str, sentence: str) -> None:
    assert old in text
    with pytest.raises(GraphError) as caught:
        parse_graph(text.replace(old, new), registry=registry)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a remark\n"])
def test_an_empty_text_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="the graph text is empty"):
        parse_graph(text)


def test_an_error_shows_the_line_and_the_place(text: str, registry: Any) -> None:
    with pytest.raises(GraphError) as caught:
        parse_graph(text.replace("hidden = %norm", "hidden = norm"), registry=registry)
    assert str(caught.value) == ("line 14: expected a value such as %x, @weight or $state\n    hidden = norm\n             ^")


@given(data=st.data())
def test_any_cut_text_is_read_or_refused_with_a_graph_error(data: st.DataObject, text: str, registry: Any) -> None:
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 12)))
    put = data.draw(st.text("%@$[](){}=,:#\"' \nabc019.", max_size=3))
    try:
        parse_graph(text[:start] + put + text[stop:], registry=registry)
    except GraphError as error:
        assert str(error)
