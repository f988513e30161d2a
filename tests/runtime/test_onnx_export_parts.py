"""Parts of a model as ONNX: a scope, a range, a region, a cut between values or one op gives what the whole graph has there."""

import re
from functools import cache

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom.backends.onnx.flat import flatten  # noqa: E402
from deltaloom.graph.errors import ExportError  # noqa: E402
from deltaloom.graph.interpret import interpret  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.models.checkpoint import Checkpoint  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx, prepared  # noqa: E402

CLOSE = 5e-5
"""Of the largest value: the bound of the contract for a layer in float32."""
BATCH, TOKENS = 2, 5


@cache
def whole():
    """Every value of the whole graph by the interpreter, by the names of the exporter; the new states too."""
    graph = deltaloom.build_graph("tiny-next").main
    rng = np.random.default_rng(1)
    given = {
        "token_ids": rng.integers(0, 4000, (BATCH, TOKENS)),
        "positions": np.tile(np.arange(TOKENS), (BATCH, 1)),
        "valid": np.ones((BATCH, TOKENS), bool),
    }
    sizes = {"batch": BATCH, "past": 0}
    states = {
        name: np.zeros([size if isinstance(size, int) else sizes[str(size)] for size in state.value.type.shape], np.float32)
        for name, state in graph.all_states().items()
    }
    seen = {}
    with Checkpoint.open(model_folder("tiny-next")) as checkpoint:
        found = interpret(
            graph, given, lambda name: np.asarray(checkpoint.read(name), np.float32), states,
            observe=lambda name, array: seen.setdefault(name.removeprefix("model."), array),
        )  # fmt: skip
    named = {"input_ids": given["token_ids"], "position_ids": given["positions"], "attention_mask": given["valid"].astype(np.int64)}
    named["hidden_states"] = found.outputs["final_norm"]
    return {**seen, **found.outputs, **named}, states, found.states


def run(path):
    """The part on what the whole graph has at its inputs: its outputs, and the names of those that are states."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    values, states, _ = whole()
    feed = {}
    for one in session.get_inputs():
        feed[one.name] = states[full_state(one.name)] if one.name.startswith("past") else values[one.name]
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))


def full_state(public):
    """``past_key_values.3.conv_state`` -> ``model.layers.3.linear_attn.conv``."""
    _, layer, kind = public.split(".")
    module = "self_attn" if kind in ("key", "value") else "linear_attn"
    return f"model.layers.{layer}.{module}.{ {'conv_state': 'conv', 'recurrent_state': 'delta'}.get(kind, kind) }"


def check(path):
    values, _, new = whole()
    found = run(path)
    for name, array in found.items():
        want = new[full_state(name)] if name.startswith("present") else values[name]
        assert array.shape == want.shape and np.abs(array - want).max() <= CLOSE * max(np.abs(want).max(), 1e-3), name
    return set(found)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("layers.3", ["layers.3.out", "present.3.key", "present.3.value"]),
        ("model.layers.0.linear_attn", None),
        ("layers.0.mlp", None),
        ("embed", ["embed"]),
        ("attention_layer", ["layers.3.out", "present.3.key", "present.3.value"]),
        ("layers.1:layers.2.mlp", None),
        ("layers.6:logits", None),
        (["layers.1", "layers.2"], None),
        ("layers.1,layers.2", None),
        ("layers.1.out, valid -> layers.2.mixed", None),
        ("layers.6.out -> final_norm", None),
        ("layers.3.self_attn.q_norm", ["layers.3.self_attn.q_norm"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("functions", [True, False], ids=["functions", "flat"])
def test_a_part_gives_what_the_whole_graph_has_there(tmp_path, nodes, outputs, functions):
    result = export_onnx("tiny-next", tmp_path / "part.onnx", nodes=nodes, functions=functions)
    onnx.checker.check_model(result.path, full_check=True)
    found = check(result.path)
    assert found == set(result.outputs) and (outputs is None or sorted(found) == outputs)
    assert bool(result.functions) == functions


@cache
def ops_of_tiny_next():
    graph = prepared(deltaloom.build_graph("tiny-next").main, ("logits",))
    return sorted({node.op.name for node in flatten(graph).graph.nodes})


@pytest.mark.parametrize("op", ops_of_tiny_next())
def test_one_op_gives_what_the_whole_graph_has_there(tmp_path, op):
    result = export_onnx("tiny-next", tmp_path / "op.onnx", op=op)
    check(result.path)


def test_a_model_without_functions_gives_the_same_bits(tmp_path):
    export_onnx("tiny-next", tmp_path / "blocks.onnx")
    flat = export_onnx("tiny-next", tmp_path / "flat.onnx", functions=False)
    assert flat.functions == () and all(node.domain == "" for node in onnx.load(flat.path, load_external_data=False).graph.node)
    for left, right in zip(run(tmp_path / "blocks.onnx").values(), run(flat.path).values(), strict=True):
        np.testing.assert_array_equal(left, right)


def test_nodes_are_called_as_their_scopes(tmp_path):
    result = export_onnx("tiny-next", tmp_path / "part.onnx", nodes="layers.3.mlp")
    names = [node.name for node in onnx.load(result.path, load_external_data=False).graph.node if node.op_type != "Cast"]
    assert names[0].startswith("/model/layers.3/mlp/") and len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ("layers.9", "has no node, scope or region 'layers.9'; did you mean layers."),
        ("layers.2:layers.1", "the range 'layers.2:layers.1' ends before it begins"),
        ("layers.0.linear_attn, layers.0.mlp.shared_expert", "the part to export has a hole"),
        ("layers.1.uot -> layers.2.out", "has no value 'layers.1.uot' to cut at; did you mean layers.1.out"),
        ("layers.5.out -> layers.2.out", "layers.5.out is not needed for layers.2.out; leave it out, or cut further on"),
        ("layers.2.out -> layers.2.out", "between the two sides of 'layers.2.out -> layers.2.out' there is no node"),
        ("", "to export has an empty name"),
        ("layers.1,,layers.2", "to export has an empty name"),
        ([], "the part to export is [], expected a name or a list of names"),
        (7, "the part to export is 7, expected a name or a list of names"),
    ],
    ids=str,
)
def test_parts_that_are_none_are_refused(tmp_path, nodes, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        export_onnx("tiny-next", tmp_path / "part.onnx", nodes=nodes)
    assert not list(tmp_path.iterdir())
