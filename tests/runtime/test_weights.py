"""Loading: weight graphs evaluated into place equal their meaning, share what they can and stay within memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import deltaloom
import deltaloom.ops
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import CheckpointError
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph
from deltaloom.graph.quantized import copy_cast
from deltaloom.graph.types import f32
from deltaloom.passes.driver import SHARED
from deltaloom.passes.lift_weights import LiftWeights
from deltaloom.passes.pipeline import Context, run_pipeline
from deltaloom.runtime.weights import materialise


class Stored:
    """Tensors in a dictionary, counting reads."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Any:
        return self.tensors[name]


def rearranged(kind: str) -> Graph:
    """A weight graph of the forms that the models use: regroup rows, stack experts, offset a norm."""
    g = GraphBuilder("weights")
    if kind == "regroup":
        parts = g.split(g.reshape(g.param("w", [12, 5]), shape=(2, 6, 5)), sizes=(2, 4), axis=1)
        out = g.concat(*(g.reshape(p, shape=(2 * n, 5)) for p, n in zip(parts, (2, 4), strict=True)), axis=0)
    elif kind == "experts":
        out = g.stack(*(g.concat(g.param(f"{e}.gate", [3, 5]), g.param(f"{e}.up", [3, 5]), axis=0) for e in range(4)))
    elif kind == "norm":
        out = g.one_plus(g.param("w", [7]))
    else:
        out = g.transpose(g.param("w", [3, 4, 5]), axes=(2, 0, 1))
    g.output("y", g.silu(g.add(out, g.input("x", out.type))))
    return run_pipeline(g.build(), SHARED, Context()).graph


@pytest.mark.parametrize("kind", ["regroup", "experts", "norm", "transpose"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("order", ["typed", "reversed"])
def test_materialising_equals_interpreting_in_any_stored_layout(kind: str, dtype: Any, order: str) -> None:
    graph = rearranged(kind)
    assert graph.weights is not None
    rng = np.random.default_rng(1)
    tensors = {n: rng.standard_normal(t.static_shape()).astype(dtype) for n, t in graph.weights.all_params().items()}
    widened = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    want = interpret(graph.weights, {}, widened.__getitem__, {}).outputs
    for name, value in graph.weights.outputs:
        axes = tuple(range(value.type.rank))[::-1] if order == "reversed" else ()
        found = materialise(graph.weights, value, "", Stored(tensors), axes)
        np.testing.assert_array_equal(found, want[name].transpose(axes) if axes else want[name])
        assert found.dtype == np.float32 and found.flags.c_contiguous


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.booleans())
def test_widening_bfloat16_by_bits_is_the_cast(values: list[float], transposed: bool) -> None:
    source = np.array([values, values]).astype(ml_dtypes.bfloat16)
    out = np.empty(source.shape[::-1], np.float32).T if transposed else np.empty(source.shape, np.float32)
    copy_cast(source, out)
    np.testing.assert_array_equal(out, source.astype(np.float32))


def test_a_stored_tensor_that_fits_is_used_where_it_lies() -> None:
    g = GraphBuilder("plain")
    w = g.param("w", [4, 5])
    g.output("y", g.linear(g.input("x", w.type), w))
    graph = run_pipeline(g.build(), SHARED, Context()).graph
    stored = np.ones((4, 5), np.float32)
    assert graph.weights is not None
    assert np.shares_memory(materialise(graph.weights, graph.weights.output("w"), "", Stored({"w": stored}), ()), stored)


def narrowed(*, stacked: bool) -> Graph:
    """A weight graph that ends in a cast to bfloat16, of one parameter or of several side by side."""
    g = GraphBuilder("narrowed")
    names = ("a", "b") if stacked else ("a",)
    parts = [g.param(name, [4, 5]) for name in names]
    w = g.cast(g.concat(*parts, axis=0) if stacked else parts[0], dtype="bfloat16", name="w")
    g.output("y", g.linear(g.input("x", f32[2, 5]), w))
    return run_pipeline(g.build(), SHARED, Context()).graph


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_weight_in_bfloat16_is_rounded_once_where_it_is_copied(stacked: bool, dtype: Any) -> None:
    graph = narrowed(stacked=stacked)
    assert graph.weights is not None
    rng = np.random.default_rng(3)
    tensors = {name: rng.standard_normal((4, 5)).astype(dtype) for name in "ab"}
    value = graph.weights.output("w")
    found = materialise(graph.weights, value, "", Stored(tensors), ())
    want = np.concatenate([tensors[name] for name in ("ab" if stacked else "a")]).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16), want.view(np.uint16))
    assert np.shares_memory(found, tensors["a"]) == (dtype == ml_dtypes.bfloat16 and not stacked)


def test_a_weight_that_is_narrowed_and_widened_again_is_rounded() -> None:
    g = GraphBuilder("rounded")
    w = g.cast(g.cast(g.param("w", [4, 5]), dtype="bfloat16"), dtype="float32", name="wide")
    g.output("y", g.linear(g.input("x", f32[2, 5]), w))
    graph = run_pipeline(g.build(), [LiftWeights()], Context(), properties=frozenset({"canonical"})).graph
    stored = np.full((4, 5), 1 + 2.0**-12, np.float32)
    assert graph.weights is not None
    found = materialise(graph.weights, graph.weights.output("wide"), "", Stored({"w": stored}), ())
    np.testing.assert_array_equal(found, np.ones((4, 5), np.float32))


def test_a_wrong_shape_is_named() -> None:
    graph = rearranged("norm")
    assert graph.weights is not None
    (value,) = (v for _, v in graph.weights.outputs)
    with pytest.raises(CheckpointError, match=r"tensor 'layer\.w' has shape \[8\], expected \[7\]"):
        materialise(graph.weights, value, "layer.", Stored({"layer.w": np.ones(8, np.float32)}), ())


PEAK = """
import sys, threading, time
import deltaloom, numpy as np

def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous()); time.sleep(0.002)
import deltaloom.runtime.load
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = deltaloom.load(sys.argv[1], backend="numpy", dtype="float32")
done.set(); thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's RssAnon")
def test_peak_anonymous_memory_is_the_weights_and_one_tensor(tmp_path: Path) -> None:
    """A 60 MB bfloat16 checkpoint becomes 120 MB of float32 weights; loading must not hold much more at any time."""
    bundled = Path(deltaloom.load("tiny-next").folder)
    import json
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(bundled / name, tmp_path / name)
    config = json.loads((bundled / "config.json").read_text())
    config |= {"num_experts": 64, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    graphs = deltaloom.build_graph(tmp_path)
    tensors = {n: np.zeros(t.static_shape(), ml_dtypes.bfloat16) for n, t in graphs.main.all_params().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    final = 2 * sum(t.nbytes for t in tensors.values())
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True)
    largest = max(t.nbytes for t in tensors.values()) * 2
    assert int(done.stdout) < final + 2 * largest + 100e6, f"{int(done.stdout) / 1e6:.0f} MB for {final / 1e6:.0f} MB of weights"
