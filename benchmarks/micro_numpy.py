"""Time every NumPy kernel at the shapes of a model.

Run ``python benchmarks/micro_numpy.py [tiny-next|next-0.3b] [--threads N] [--op NAME]``. Prints microseconds of one call for one
token and for 512 tokens (medians), beside the op's reference for one token. Weights rotate over 64 MB, so that a decode step
reads them from memory as in a real model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.graph.op import Array
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Appended, Kernel

ROTATED_BYTES = 64e6


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer: hidden, delta heads (key, value) and their width, attention heads and width, experts."""

    hidden: int
    key_heads: int
    value_heads: int
    width: int
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    experts: int
    chosen: int
    inner: int
    shared: int
    vocabulary: int
    context: int = 128


GEOMETRIES = {
    "tiny-next": Geometry(192, 4, 8, 32, 4, 2, 64, 16, 16, 4, 32, 128, 4096),
    "next-0.3b": Geometry(1024, 8, 16, 128, 8, 2, 128, 32, 64, 8, 128, 128, 32768),
}


@dataclass(frozen=True)
class Call:
    """One call: a label, the op's name and attributes, makers of its inputs; ``weights`` are positions that rotate."""

    label: str
    op: str
    attributes: dict[str, Any]
    inputs: list[Any]
    weights: tuple[int, ...] = ()


def calls(g: Geometry, seq: int) -> list[Call]:
    """The calls of one delta layer, one attention layer, one expert block and the head."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, dtype=np.float32)

    def matrix(label: str, inner: int, outer: int) -> Call:
        return Call(f"linear {label}", "linear", {}, [normal(1, seq, inner), normal(outer, inner)], (1,))

    keys, values = g.key_heads * g.width, g.value_heads * g.width
    channels = 2 * keys + values
    past = g.context if seq == 1 else 0
    room = past + seq
    cache = Appended(normal(1, g.kv_heads, room, g.head_dim), past)
    chosen = np.argsort(rng.random((1, seq, g.experts)), axis=-1)[..., : g.chosen].astype(np.int32)
    q, k = (ops.get("l2_norm")().reference(normal(1, seq, g.key_heads, g.width)) for _ in range(2))  # type: ignore[misc]
    gates = [-rng.random((1, seq, g.value_heads), np.float32), rng.random((1, seq, g.value_heads), np.float32)]
    heads = [normal(1, seq, g.value_heads, g.width) for _ in range(2)]
    gate_up, down = normal(g.experts, 2 * g.inner, g.hidden), normal(g.experts, g.hidden, g.inner)
    angles = [normal(1, seq, g.rotary // 2) for _ in range(2)]
    queries = normal(1, seq, g.query_heads, g.head_dim)
    attention = [queries, *(normal(1, seq, g.kv_heads, g.head_dim) for _ in range(2)), cache, cache, np.ones((1, room), bool)]
    norm = {"eps": 1e-6, "zero_centred": True}
    return [
        Call("rms_norm hidden", "rms_norm", norm, [normal(1, seq, g.hidden), normal(g.hidden)]),
        Call("mask_padding", "mask_padding", {}, [normal(1, seq, g.hidden), np.ones((1, room), bool)]),
        matrix("qkvz", g.hidden, 2 * keys + 2 * values),
        matrix("ba", g.hidden, 2 * g.value_heads),
        Call("split qkvz", "split", {"sizes": (keys, keys, values, values)}, [normal(1, seq, channels + values)]),
        Call("concat qkv", "concat", {"axis": -1}, [normal(1, seq, keys), normal(1, seq, keys), normal(1, seq, values)]),
        Call(
            "causal_conv1d",
            "causal_conv1d",
            {"activation": "silu"},
            [normal(1, seq, channels), normal(channels, 1, 4), normal(1, 3, channels).transpose(0, 2, 1)],
        ),
        Call("l2_norm", "l2_norm", {}, [normal(1, seq, g.key_heads, g.width)]),
        Call(
            "delta_gates", "delta_gates", {}, [*(normal(1, seq, g.value_heads) for _ in range(2)), gates[0][0, 0], gates[1][0, 0]]
        ),
        Call(
            "gated_delta_rule",
            "gated_delta_rule",
            {"scale": g.width**-0.5},
            [q, k, heads[0], *gates, normal(1, g.value_heads, g.width, g.width)],
            (5,),
        ),
        Call("gated_rms_norm", "gated_rms_norm", {"eps": 1e-6}, [*heads, normal(g.width)]),
        Call("unflatten", "unflatten", {"sizes": (g.value_heads, g.width)}, [normal(1, seq, values)]),
        Call("flatten", "flatten", {}, [heads[0]]),
        matrix("delta out", values, g.hidden),
        Call("add", "add", {}, [normal(1, seq, g.hidden), normal(1, seq, g.hidden)]),
        matrix("attention q+gate", g.hidden, 2 * g.query_heads * g.head_dim),
        matrix("attention k", g.hidden, g.kv_heads * g.head_dim),
        Call("rms_norm q", "rms_norm", norm, [queries, normal(g.head_dim)]),
        Call("rope q", "rope", {}, [queries, *angles]),
        Call("attention", "attention", {"scale": g.head_dim**-0.5}, attention),
        Call("sigmoid_gate", "sigmoid_gate", {}, [normal(1, seq, g.query_heads * g.head_dim) for _ in range(2)]),
        matrix("router", g.hidden, g.experts),
        Call("router_topk", "router_topk", {"k": g.chosen, "normalize": True}, [normal(1, seq, g.experts)]),
        Call("moe_experts", "moe_experts", {}, [normal(1, seq, g.hidden), normal(1, seq, g.chosen), chosen, gate_up, down], (3, 4)),
        matrix("shared up", g.hidden, g.shared),
        Call("swiglu shared", "swiglu", {}, [normal(1, seq, g.shared), normal(1, seq, g.shared)]),
        Call("sigmoid_gate shared", "sigmoid_gate", {}, [normal(1, seq, g.hidden), normal(1, seq, 1)]),
        matrix("head", g.hidden, g.vocabulary),
    ]


def microseconds(run: Callable[[], object]) -> float:
    """Median time of one call, over about a third of a second."""
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    repeats = max(1, min(100, int(0.01 / max(once, 1e-7))))
    times = []
    for _ in range(max(3, min(21, int(0.3 / max(once * repeats, 1e-6))))):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        times.append((time.perf_counter() - start) / repeats)
    return 1e6 * sorted(times)[len(times) // 2]


def choose(kernels: list[Kernel], call: Call, seq: int) -> Kernel:
    """The first kernel of the op, or for several tokens the first that is not for one token."""
    fit = [kernel for kernel in kernels if kernel.op == call.op and not (seq > 1 and "step" in kernel.name)]
    return fit[0]


def measure(kernel: Kernel, call: Call) -> float:
    """Time of ``kernel`` on the inputs of ``call``, in the weight layout that it wants."""
    op = ops.get(call.op)(**call.attributes)
    names = op.input_names()
    inputs = list(call.inputs)
    for name, axes in kernel.wants.items():
        at = names.index(name)
        inputs[at] = np.ascontiguousarray(inputs[at].transpose(axes))
    size = sum(inputs[at].nbytes for at in call.weights)
    copies = max(1, int(ROTATED_BYTES / size)) if size > 1e5 else 1
    variants = [[array.copy() if at in call.weights else array for at, array in enumerate(inputs)] for _ in range(copies)]
    turn = iter(range(1 << 60))
    return microseconds(lambda: kernel.run(op, *variants[next(turn) % copies]))


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny-next", choices=sorted(GEOMETRIES))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--op", action="append", default=[])
    options = parser.parse_args()
    backend = NumpyBackend(threads=options.threads)
    kernels = list(backend.kernels())
    geometry = GEOMETRIES[options.model]
    print(f"{options.model}, {backend.threads} threads; us a call")
    print(f"{'call':24} {'kernel':28} {'1 token':>10} {'reference':>10} {'512 tokens':>11}")
    for one, many in zip(calls(geometry, 1), calls(geometry, 512)):
        if options.op and one.op not in options.op:
            continue
        step, blocks = choose(kernels, one, 1), choose(kernels, many, 512)
        definition = [kernel for kernel in kernels if kernel.op == one.op][-1]
        row = [measure(step, one), measure(definition, one), measure(blocks, many)]
        print(f"{one.label:24} {step.name:28} {row[0]:10.1f} {row[1]:10.1f} {row[2]:11.0f}", flush=True)


if __name__ == "__main__":
    main()
