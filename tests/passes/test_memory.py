"""The memory plan: planned programs compute what their graphs mean, and the checker refuses every plan that would not."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory_graphs import BATCH, Runner, ToyWithBuffers, compiled, random_graph

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.passes.emit import Program
from deltaloom.passes.memory import ALIGNMENT, Key, MemoryPlan, Place
from deltaloom.passes.memory_check import check_plan
from deltaloom.runtime.arena import make_arena, no_buffers

SIZES = {"batch": 3, "past": 5}
HOME = ToyWithBuffers("numpy", only=())


def planned(data: st.DataObject) -> tuple[Graph, Program]:
    graph = random_graph(data.draw)
    program = compiled(graph)
    assume(program.memory is not None)
    return graph, program


def moved(plan: MemoryPlan, name: str, key: Key, place: Place) -> MemoryPlan:
    return replace(plan, places={**plan.places, name: {**plan.places[name], key: place}})


@settings(max_examples=100)
@given(data=st.data())
def test_a_planned_program_computes_what_its_graph_means(data: st.DataObject) -> None:
    """Step by step in one arena, which is full of NaN before each step and spoilt before results are looked at."""
    graph, program = planned(data)
    runner = Runner(program, graph, SIZES["batch"])
    arena = make_arena(program, HOME, "test", SIZES)
    runner.step(arena.buffers)
    runner.step(arena.buffers)
    runner.step(no_buffers(program))


@settings(max_examples=100)
@given(data=st.data())
def test_two_buffers_that_are_alive_at_once_must_not_share_a_byte(data: st.DataObject) -> None:
    _, program = planned(data)
    assert program.memory is not None
    plan = program.plan(SIZES)
    for name, part in program.memory.parts.items():
        for one, other in combinations(part.needs, 2):
            together = one.first <= other.last and other.first <= one.last
            here, there = plan.places[name][one.key], plan.places[name][other.key]
            if together and here.nbytes and there.nbytes:
                assert not here.overlaps(there)
                with pytest.raises(CompileError):
                    check_plan(program.memory, moved(plan, name, one.key, here._replace(offset=there.offset)))


@settings(max_examples=100)
@given(data=st.data())
def test_a_plan_that_the_checker_accepts_is_right(data: st.DataObject) -> None:
    """A buffer is moved anywhere: either the checker refuses, or the program still computes what it should."""
    graph, program = planned(data)
    assert program.memory is not None
    plan = program.plan(SIZES)
    filled = [name for name, places in plan.places.items() if places]
    assume(filled)
    name = data.draw(st.sampled_from(filled))
    key = data.draw(st.sampled_from(sorted(plan.places[name])))
    offset = data.draw(st.integers(0, plan.nbytes // ALIGNMENT)) * ALIGNMENT
    changed = moved(plan, name, key, plan.places[name][key]._replace(offset=offset))
    try:
        check_plan(program.memory, changed)
    except CompileError:
        return
    runner = Runner(program, graph, SIZES["batch"])
    object.__setattr__(program, "plan", lambda sizes: changed)
    runner.step(make_arena(program, HOME, "test", SIZES).buffers)


def chain(length: int, *, region: bool = False) -> Graph:
    """``x + x``, then its sum with x, and so on; with ``region``, twice in a region."""
    g = GraphBuilder("body" if region else "chain")
    x = h = g.input("x", f32[BATCH, 16])
    for number in range(length):
        h = g.mul(h, x, name=f"h{number}")
    g.output("y", h)
    if not region:
        return g.build()
    outer = GraphBuilder("outer")
    value = outer.mul(outer.input("x", f32[BATCH, 16]), outer.input("z", f32[BATCH, 16]), name="first")
    for number in range(3):
        value = outer.call(g.build(), value, prefix=f"layers.{number}.")
    outer.output("y", value)
    return outer.build()


def test_a_chain_works_in_two_buffers_and_its_result_is_outside() -> None:
    plan = compiled(chain(10)).plan({"batch": 4, "past": 0})
    assert len(plan.places[""]) == 9 and plan.nbytes == 2 * 4 * 16 * 4 and plan.unshared == 9 * 4 * 16 * 4
    assert "512 bytes for 9 buffers at batch 4, past 0 (2,304 without reuse)" in str(plan)


def test_regions_share_the_start_of_the_arena_and_write_into_their_callers_buffers() -> None:
    program = compiled(chain(4, region=True))
    plan = program.plan({"batch": 4, "past": 0})
    assert len(plan.places["body"]) == 3 and max(p.offset for p in plan.places["body"].values()) < 512
    assert set(plan.places[""]) == {Key("first", "out", 0), Key("layers.0.y", "out", 0), Key("layers.1.y", "out", 0)}
    assert min(p.offset for p in plan.places[""].values()) >= 512 and plan.nbytes == 512 + 2 * 256
    buffers = make_arena(program, HOME, "test", {"batch": 4, "past": 0}).buffers
    assert buffers["layers.0."][-1] is not None and buffers["layers.2."][-1] is None, "the last call's output is the result"


def test_the_source_names_the_buffers() -> None:
    source = compiled(chain(2)).source
    assert "def chain(x, weights, fixed, append, buffers):" in source
    assert '(m_h0,) = buffers[""]' in source and "h0 = numpy_mul(mul_0, x, x, out=m_h0)" in source
    assert "h1 = numpy_mul(mul_0, h0, x)" in source, "the result has no buffer"


def test_a_program_of_unknown_length_takes_no_buffers() -> None:
    g = GraphBuilder("prefill")
    x = g.input("x", f32[BATCH, symbol("seq"), 4])
    g.output("y", g.mul(g.mul(x, x), x))
    program = compiled(g.build())
    assert program.memory is None and "buffers" not in program.source
    with pytest.raises(CompileError, match="'prefill' takes no buffers"):
        program.plan(SIZES)


def test_a_view_that_leaves_keeps_its_buffer_out_of_the_arena() -> None:
    g = GraphBuilder("views")
    x = g.input("x", f32[BATCH, 8])
    state = g.state("s", f32[BATCH, 4])
    kept, handed = (g.split(g.mul(x, x, name=name), sizes=(4, 4), axis=-1) for name in ("viewed", "stored"))
    g.update(s=g.mul(handed[0], state, name="new_state"))
    g.output("y", kept[0])
    plan = compiled(g.build()).plan(SIZES)
    assert set(plan.places[""]) == {Key("stored", "out", 0)}


def faulty(plan: MemoryPlan, how: str) -> MemoryPlan:
    """The plan of ``chain(4, region=True)`` with one fault."""
    key, place = Key("h1", "out", 0), plan.places["body"][Key("h1", "out", 0)]
    top = plan.places[""][Key("layers.0.y", "out", 0)]
    changed: dict[str, Any] = {
        "misaligned": ("body", key, place._replace(offset=place.offset + 4)),
        "before": ("body", key, place._replace(offset=-ALIGNMENT)),
        "behind": ("body", key, place._replace(offset=plan.nbytes)),
        "too small": ("body", key, place._replace(nbytes=ALIGNMENT)),
        "in the caller's": ("body", key, place._replace(offset=top.offset)),
        "nobody's": ("body", Key("h9", "out", 0), place._replace(offset=0)),
        "a result": ("", Key("layers.2.y", "out", 0), top),
        "an input of the call": ("", Key("layers.1.y", "out", 0), top),
    }
    return moved(plan, *changed[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("misaligned", "expected a multiple of 64"),
        ("before", "has bytes -64 to"),
        ("behind", "of an arena of 1024"),
        ("too small", "has 64 bytes for a f32"),
        ("in the caller's", "that it (uses otherwise too|reads)"),
        ("nobody's", "which no node has"),
        ("a result", "leaves 'outer' but lies in its"),
        ("an input of the call", "uses otherwise too"),
    ],
)
def test_a_faulty_plan_is_refused_with_the_reason(how: str, message: str) -> None:
    program = compiled(chain(4, region=True))
    assert program.memory is not None
    plan = program.plan({"batch": 4, "past": 0})
    with pytest.raises(CompileError, match=message):
        check_plan(program.memory, faulty(plan, how))
    missing = {key: place for key, place in plan.places["body"].items() if key.node != "h1"}
    with pytest.raises(CompileError, match="has the buffers .., needs"):
        check_plan(program.memory, replace(plan, places={**plan.places, "body": missing}))


def test_scratch_grows_with_the_room_of_append_states() -> None:
    g = GraphBuilder("sum")
    x = g.input("x", f32[BATCH, 16])
    g.output("y", g.silu(g.add(x, x)))
    program = compiled(g.build())
    small, large = (program.plan({"batch": 1, "past": past}) for past in (64, 128))
    scratch = Key("add", "scratch", 1)
    assert str(small.places[""][scratch].type) == "f32[64, 3]" and str(large.places[""][scratch].type) == "f32[128, 3]"
    assert large.nbytes - small.nbytes == 64 * 3 * 4
