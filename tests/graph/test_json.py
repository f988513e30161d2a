"""The JSON form reads back exactly, is canonical, and refuses what is newer or damaged."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import Graph
from deltaloom.graph.serialize import fingerprint, from_json, to_json


@given(data=st.data())
def test_a_stored_graph_reads_back(data: st.DataObject, random_graphs: Any, registry: Any) -> None:
    graph = data.draw(random_graphs)
    text = to_json(graph)
    again = from_json(text, registry=registry)
    assert again == graph
    assert to_json(again) == text
    for old, new in zip(graph.nodes, again.nodes, strict=True):
        assert repr(old.op) == repr(new.op)


def test_equal_graphs_give_equal_texts(sample: Graph) -> None:
    other = {"other": Graph("other")}
    left, right = replace(sample, regions={**sample.regions, **other}), replace(sample, regions={**other, **sample.regions})
    assert left == right and to_json(left) == to_json(right)
    document = json.loads(to_json(sample))
    assert list(document) == sorted(document) and document["format"] == 1
    assert document["symbols"] == {"batch": [1, None], "past": [0, None], "seq": [1, 64]}


def test_the_fingerprint_sees_everything_but_the_builders_lines(sample: Graph) -> None:
    moved = replace(sample, nodes=tuple(replace(n, source="elsewhere.py:1") for n in sample.nodes))
    scoped = replace(sample, nodes=tuple(replace(n, scope="elsewhere") for n in sample.nodes))
    deeper = sample.map_regions(lambda r: replace(r, outputs=(("out", r.nodes[2].outputs[0]),)))
    assert len(fingerprint(sample)) == 64
    assert fingerprint(moved) == fingerprint(sample)
    assert len({fingerprint(g) for g in (sample, scoped, deeper)}) == 3


def damaged(graph: Graph, *path: Any, value: Any) -> str:
    """The JSON of ``graph`` with the entry at ``path`` replaced."""
    document = json.loads(to_json(graph))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return json.dumps(document)


DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("format",), 2, "the JSON graph has format 2, and this deltaloom reads up to format 1"),
    (("format",), "1", "'format' of the document is '1' in the JSON graph, expected int"),
    (("symbols", "seq"), [1], "symbol 'seq' of the JSON graph is [1], expected [low, high]"),
    (("symbols", "seq"), [5, 2], "symbol 'seq' has the bounds 5 to 2"),
    (("symbols",), {}, "neither a number nor a declared symbol"),
    (("graph", "nodes"), None, "'nodes' of graph 'sample' is None in the JSON graph, expected list"),
    (("graph", "nodes", 0), 7, "a node of graph 'sample' in the JSON graph has no 'outputs'"),
    (("graph", "nodes", 0, "op"), "embeding", "there is no op 'embeding'"),
    (("graph", "nodes", 0, "version"), 9, "op embedding is stored in version 9, and this deltaloom has version 1"),
    (("graph", "nodes", 3, "attributes"), {"eps": {}}, "attribute 'eps' of %norm of graph 'sample' is {}"),
    (("graph", "nodes", 3, "attributes"), {"eps": "x"}, "attribute 'eps' of op rms_norm is 'x', expected float"),
    (("graph", "nodes", 3, "inputs", 0), "%lost", "%norm of graph 'sample' uses %lost, which is not defined"),
    (("graph", "nodes", 3, "inputs", 0), [], "uses [], which is not defined"),
    (("graph", "inputs", 0, "type"), "i64", "'i64' is not a type"),
    (("graph", "outputs", 0), "hidden", "'outputs' of graph 'sample' has 'hidden', expected [name, value]"),
    (("graph", "regions", "layer", "states", 1, "append_axis"), "1", "'append_axis' of state 'seen' is '1'"),
    (("graph", "regions", "layer", "states", 1, "append_axis"), 2, "grows along axis 2, but its update is"),
    (("graph", "regions", "layer", "nodes", 2, "placement", "refusals"), [1], "refusals or layouts that are not lists of pairs"),
    (("graph", "regions", "layer", "nodes", 2, "placement", "kernel"), 3, "'kernel' of %act of graph 'layer' is 3"),
]


@pytest.mark.parametrize(("path", "value", "sentence"), DAMAGES, ids=[sentence[:40] for _, _, sentence in DAMAGES])
def test_damage_is_refused(sample: Graph, registry: Any, path: tuple[Any, ...], value: Any, sentence: str) -> None:
    with pytest.raises(GraphError) as caught:
        from_json(damaged(sample, *path, value=value), registry=registry)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"), [("{", "not legal JSON"), ("[]", "the JSON graph is list"), ("{}", "has no 'format'")]
)
def test_other_texts_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        from_json(text)


def test_infinite_attributes_are_legal_json(sample: Graph, registry: Any) -> None:
    tagged = registry.get("tests.tagged")(number=1, scale=math.inf, table=(-math.inf, 2.0))
    node = replace(sample.nodes[3], op=tagged, inputs=sample.nodes[3].inputs[:1])
    graph = replace(sample, nodes=(*sample.nodes[:3], node))
    assert "Infinity" not in to_json(graph)
    assert from_json(to_json(graph), registry=registry) == graph


@given(data=st.data())
def test_any_damaged_json_is_read_or_refused_with_a_graph_error(data: st.DataObject, sample: Graph, registry: Any) -> None:
    document = json.loads(to_json(sample))
    at = document
    while True:
        key = data.draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at)))))
        if not isinstance(at[key], (dict, list)) or not at[key] or not data.draw(st.integers(0, 5)):
            break
        at = at[key]
    at[key] = data.draw(st.sampled_from([None, 0, -1, 9, 1.5, "", "x", "%x", [], {}, [1], {"name": "x"}, True, "f32[batch]"]))
    try:
        from_json(json.dumps(document), registry=registry)
    except GraphError as error:
        assert str(error)
