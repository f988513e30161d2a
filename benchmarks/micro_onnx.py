"""Time ops in ONNX Runtime at the shapes of a model: our own functions, ONNX Runtime's contrib ops, our NumPy and torch kernels.

    python benchmarks/micro_onnx.py [tiny-next|next-0.3b] [--threads N] [--rounds N] [--json]

Microseconds of one call for one token and for 512, the median over rounds in which the candidates take turns. Weights stay in the
cache, so the figures compare kernels and say nothing of memory. Every candidate's result is compared with the reference first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from micro_numpy import GEOMETRIES, Call, calls, microseconds
from onnx import TensorProto, helper

from deltaloom.backends import backend
from deltaloom.graph.op import Array
from deltaloom.graph.registry import ops
from deltaloom.passes.kernel import Kernel, kernels_for
from deltaloom.testing.kernels import accepted_node

TIMED = ("causal_conv1d", "gated_delta_rule", "moe_experts", "linear")
BACKENDS = ("onnx", "numpy", "torch")
CLOSE = 1e-4
"""Of the largest element: each candidate is float32 in an order of its own."""


def contrib(call: Call, threads: int) -> Callable[[], Any] | None:
    """ONNX Runtime's own op, as a model of one node; None where it has none. Repeating heads of q and k is not timed."""
    arrays = [np.ascontiguousarray(array) for array in call.inputs]
    attributes: dict[str, Any]
    if call.op == "causal_conv1d":
        x, weight, state = arrays
        arrays = [x.transpose(0, 2, 1).copy(), weight, state]
        kind, names, attributes = "CausalConvWithState", ["input", "weight", "", "past_state"], {"ndim": 1, "activation": "silu"}
    elif call.op == "gated_delta_rule":
        q, k, v, decay, beta, state = arrays
        heads = v.shape[2]
        q, k = (np.repeat(one, heads // one.shape[2], axis=2) for one in (q, k))
        arrays = [*(one.reshape(*one.shape[:2], -1) for one in (q, k, v)), state, decay, beta]
        kind, names = "LinearAttention", ["query", "key", "value", "past_state", "decay", "beta"]
        attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": call.attributes["scale"], "update_rule": "gated_delta"}
    else:
        return None
    given = dict(zip(filter(None, names), arrays, strict=True))
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in given.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("output", "present_state")]
    node = helper.make_node(kind, names, ["output", "present_state"], domain="com.microsoft", **attributes)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(helper.make_graph([node], kind, inputs, outputs), opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(onnx.ModelProto.SerializeToString(proto), options, ["CPUExecutionProvider"])
    return lambda: session.run(None, given)


def ours(call: Call, name: str, threads: int) -> Callable[[], Any]:
    """The first kernel of a backend that takes the op at these shapes."""
    where = backend(name, threads=threads)
    op = ops.get(call.op)(**call.attributes)
    arrays = tuple(np.ascontiguousarray(array) for array in call.inputs)
    found: list[tuple[Kernel, Any]] = [(kernel, accepted_node(kernel, op, arrays)) for kernel in kernels_for(where, call.op)]
    kernel, node = next(pair for pair in found if pair[1] is not None)
    layouts = dict(kernel.layouts(node))
    stored = [np.ascontiguousarray(a.transpose(layouts[i])) if i in layouts else a for i, a in enumerate(arrays)]
    tensors = [where.from_host(array.copy()) for array in stored]
    states = [position for position, given in enumerate(op.input_names()) if given in op.updates]
    run = where.alone(kernel.run) if name == "torch" else kernel.run  # type: ignore[attr-defined]

    def once() -> Any:
        for position in states:  # a kernel may write over the state, which must not grow from call to call
            tensors[position][...] = where.from_host(stored[position])
        return run(op, *tensors)

    return once


def checked(call: Call, title: str, run: Callable[[], Any]) -> None:
    """``SystemExit`` unless ``run`` gives what the op's reference does."""
    op = ops.get(call.op)(**call.attributes)
    assert op.reference is not None
    want = op.reference(*call.inputs)
    first: Array = want[0] if isinstance(want, tuple) else want
    found = run()
    got = np.asarray(found[0] if isinstance(found, tuple | list) else found)
    if got.shape != first.shape:  # the contrib ops have other layouts
        got = got.transpose(0, 2, 1) if call.op == "causal_conv1d" else got.reshape(first.shape)
    error = np.abs(got - first).max() / np.abs(first).max()
    if not error < CLOSE:
        raise SystemExit(f"{title} of {call.label} is {error:.2g} from the reference; its time would mean nothing")


def measure(geometry: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for seq in (1, 512):
        for call in calls(GEOMETRIES[geometry], seq):
            if call.op not in TIMED or call.op == "linear" and call.label != "linear qkvz":
                continue
            candidates = {name: ours(call, name, threads) for name in BACKENDS}
            if (raw := contrib(call, threads)) is not None:
                candidates["contrib"] = raw
            for title, run in candidates.items():
                checked(call, title, run)
            times: dict[str, list[float]] = {title: [] for title in candidates}
            for _ in range(rounds):
                for title, run in candidates.items():
                    times[title].append(microseconds(run))
            medians = {title: round(statistics.median(found), 1) for title, found in times.items()}
            rows.append({"op": call.label, "tokens": seq, **medians})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds as Markdown, each with its ratio to our function in ONNX Runtime."""
    titles = [*BACKENDS, "contrib"]
    lines = ["| op, tokens | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(titles)]
    for row in rows:
        cells = [f"{row[title]:.0f} ({row[title] / row['onnx']:.2f}×)" if title in row else "–" for title in titles]
        lines.append(f"| {row['op']}, {row['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("geometry", nargs="?", default="next-0.3b", choices=sorted(GEOMETRIES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    arguments = parser.parse_args()
    rows = measure(arguments.geometry, arguments.threads, arguments.rounds)
    print(json.dumps(rows) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
