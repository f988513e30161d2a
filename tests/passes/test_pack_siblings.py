"""Packing: linears with a bias are packed among themselves, and the scope is what the packed ones share."""

from __future__ import annotations

import numpy as np

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.interpret import interpret
from deltaloom.graph.types import f32
from deltaloom.passes.pack_siblings import PackSiblings
from deltaloom.passes.pipeline import Context


def test_linears_with_a_bias_are_packed_with_their_biases() -> None:
    g = GraphBuilder("siblings")
    x, given = g.input("x", f32[symbol("batch"), 4]), g.input("given", f32[3])
    with g.scope("attn"):
        sizes = {"q": 6, "k": 2, "v": 3}
        q, k, v = (
            g.linear(x, g.param(f"{name}.weight", [size, 4]), g.param(f"{name}.bias", [size]), name=name)
            for name, size in sizes.items()
        )
        plain = g.linear(x, g.param("gate.weight", [1, 4]), name="gate")
        with g.scope("inner"):
            deep = g.linear(x, g.param("up.weight", [2, 4]), name="up")
        computed = g.linear(x, g.param("w.weight", [3, 4]), given, name="computed")
    for name, value in (("q", q), ("k", k), ("v", v), ("plain", plain), ("deep", deep), ("computed", computed)):
        g.output(name, value)
    graph = g.build()
    after = PackSiblings().run(graph, Context())
    packed = {node.name: node for node in after.nodes if node.op.name == "linear"}
    assert sorted(packed) == ["attn.computed", "attn.gate_up", "attn.q_k_v"]
    weight, bias = packed["attn.q_k_v"].inputs[1:]
    assert (str(weight.type), str(bias.type)) == ("f32[11, 4]", "f32[11]")
    assert packed["attn.gate_up"].scope == "attn" and packed["attn.gate_up"].origins == ("attn.gate", "attn.inner.up")

    rng = np.random.default_rng(3)
    params = {name: rng.standard_normal(type_.static_shape(), np.float32) for name, type_ in graph.all_params().items()}
    inputs = {"x": rng.standard_normal((3, 4), np.float32), "given": rng.standard_normal(3).astype(np.float32)}
    want, found = (interpret(one, inputs, params.__getitem__, {}).outputs for one in (graph, after))
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=1e-5)
