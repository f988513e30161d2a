"""Where values end: at their last reader, at once if nobody reads them, never if they leave the graph."""

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.lifetimes import last_uses
from deltaloom.graph.types import f32


def test_values_end_at_their_last_reader() -> None:
    g = GraphBuilder("ends")
    x, weight = g.input("x", f32[2, 8]), g.param("w", [8, 8], f32)
    a = g.silu(x, name="a")
    b = g.linear(a, weight, name="b")
    c = g.add(a, b, name="c")
    _, unread = g.split(c, sizes=(4, 4), axis=-1, name="halves")
    kept = g.silu(unread, name="kept")
    g.silu(kept, name="unread")
    g.output("out", kept)
    graph = g.build()
    found = {node: {value.name for value in values} for node, values in last_uses(graph).items()}
    assert found == {"c": {"a", "b"}, "halves.0": {"c", "halves.0"}, "kept": {"halves.1"}, "unread": {"unread"}}
