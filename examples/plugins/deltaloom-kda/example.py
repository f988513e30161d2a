"""One layer of Kimi Delta Attention, compiled for two backends: a prompt, then token by token, with the same numbers from both."""

import sys
from importlib.util import find_spec

import numpy as np

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import f32
from deltaloom.models.layers import BATCH, SEQ

HIDDEN, HEADS, KEY_DIM, VALUE_DIM, RANK, TAPS = 64, 4, 16, 24, 16, 4


def kda_layer() -> Graph:
    """x [batch, seq, HIDDEN] -> y of the same shape: short convolutions, a decay a channel, a gated norm (arXiv 2510.26692, 4)."""
    g = GraphBuilder("kda_layer")
    x = g.input("x", f32[BATCH, SEQ, HIDDEN])
    keys, values = HEADS * KEY_DIM, HEADS * VALUE_DIM

    heads = {}
    for name, width, size in (("q", keys, KEY_DIM), ("k", keys, KEY_DIM), ("v", values, VALUE_DIM)):
        projected = g.linear(x, g.param(f"{name}_proj.weight", [width, HIDDEN]))
        past = g.state(f"{name}_conv", f32[BATCH, width, TAPS - 1])
        mixed, new_past = g.causal_conv1d(projected, g.param(f"{name}_conv.weight", [width, 1, TAPS]), past, activation="silu")
        g.update(**{f"{name}_conv": new_past})
        heads[name] = g.unflatten(mixed, sizes=(HEADS, size))

    a = g.linear(g.linear(x, g.param("f_a_proj.weight", [RANK, HIDDEN])), g.param("f_b_proj.weight", [keys, RANK]))
    a = g.unflatten(a, sizes=(HEADS, KEY_DIM))
    log_decay = g.kda.decay(a, g.param("A_log", [HEADS]), g.param("dt_bias", [HEADS, KEY_DIM]), name="log_decay")
    beta = g.sigmoid(g.linear(x, g.param("b_proj.weight", [HEADS, HIDDEN])), name="beta")

    delta = g.state("delta", f32[BATCH, HEADS, KEY_DIM, VALUE_DIM])
    q, k = g.l2_norm(heads["q"]), g.l2_norm(heads["k"])
    out, new_delta = g.kda.delta_attention(q, k, heads["v"], log_decay, beta, delta, scale=KEY_DIM**-0.5, name="attention")
    g.update(delta=new_delta)

    gate = g.linear(g.linear(x, g.param("g_a_proj.weight", [RANK, HIDDEN])), g.param("g_b_proj.weight", [values, RANK]))
    normed = g.flatten(g.rms_norm(out, g.param("o_norm.weight", [VALUE_DIM]), eps=1e-5), axes=2)
    g.output("y", g.linear(g.sigmoid_gate(normed, gate), g.param("o_proj.weight", [HIDDEN, values])))
    return g.build()


def main() -> None:
    graph = kda_layer()
    rng = np.random.default_rng(0)
    weights = {}
    for name, type_ in graph.all_params().items():
        shape = type_.static_shape()
        weights[name] = (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    prompt, tokens = (rng.standard_normal((2, length, HIDDEN)).astype(np.float32) for length in (37, 3))

    results = {}
    for backend in ("numpy", "torch") if find_spec("torch") else ("numpy",):
        compiled = deltaloom.compile(graph, deltaloom.CompileConfig(backends=(backend,)))
        executor = compiled.bind(weights)
        state = executor.new_state(2)
        parts = [executor.run({"x": prompt}, state, None, ("y",))["y"]]
        for token in np.split(tokens, 3, axis=1):
            parts.append(executor.run({"x": token}, state, None, ("y",))["y"])
        results[backend] = np.concatenate(parts, axis=1)
        kernels = {row.op: row.kernel for row in compiled.explain("decode") if row.op.startswith("kda.")}
        print(f"{backend}: y {results[backend].shape} by", ", ".join(f"{op} on {kernel}" for op, kernel in sorted(kernels.items())))

    whole = executor.run({"x": np.concatenate([prompt, tokens], axis=1)}, executor.new_state(2), None, ("y",))["y"]
    differences = {f"{name} and the whole at once": np.abs(y - whole).max() for name, y in results.items()}
    for pair, difference in differences.items():
        print(f"{pair} on {backend}: at most {difference:.1e} apart")
    if max(differences.values()) > 1e-5:
        sys.exit("the results differ")


if __name__ == "__main__":
    main()
