"""The drawing names every body, node and value once, and points nowhere that is not there."""

import re

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dot import dot
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32

QUOTED = r'"((?:[^"\\]|\\.)*)"'


def test_arrows_join_what_is_drawn(sample: Graph) -> None:
    text = dot(sample)
    drawn = re.findall(rf"^ +{QUOTED} \[label=", text, re.M)
    assert len(drawn) == len(set(drawn))
    arrows = re.findall(rf"^ +{QUOTED} -> {QUOTED}", text, re.M)
    assert arrows and {end for arrow in arrows for end in arrow} <= set(drawn)
    for body in (sample, *sample.regions.values()):
        assert f'label="{body.name}"' in text
        assert {f"{body.name}/{node.name}" for node in body.nodes} <= set(drawn)
    assert text.count("{") == text.count("}") and "style=dashed" in text and "fillcolor=" in text


def test_a_graph_that_gives_back_its_input() -> None:
    g = GraphBuilder("same")
    g.output("x", g.input("x", f32[2]))
    text = dot(g.build())
    assert '"same/%x" -> "same/output x";' in text and "cluster_1" not in text
