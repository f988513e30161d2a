"""Requests that cannot be met: each has its sentence, all that is wrong is told at once, and no file is left or changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import deltaloom  # noqa: E402
import deltaloom.backends.onnx.weights as onnx_weights  # noqa: E402
from deltaloom.backends.onnx.problems import UnexportableError  # noqa: E402
from deltaloom.graph.builder import GraphBuilder  # noqa: E402
from deltaloom.graph.dims import symbol  # noqa: E402
from deltaloom.graph.errors import DeltaloomError, ExportError  # noqa: E402
from deltaloom.graph.op import Op  # noqa: E402
from deltaloom.graph.types import TensorType, bf16, f32  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx  # noqa: E402

GRAPHS = deltaloom.build_graph("tiny-next")


class Twice(Op):
    """y = 2 x."""

    name = "toy.twice"

    def infer(self, x: TensorType) -> TensorType:
        return x

    def onnx(self, b, x):
        return b.Add(x, x)


class Opaque(Op):
    """y = x, by nobody knows what."""

    name = "toy.opaque"

    def infer(self, x: TensorType) -> TensorType:
        return x


class Broken(Opaque):
    """y = x, with a rule that fails."""

    name = "toy.broken"

    def onnx(self, b, x):
        return b.no_such_thing(x)


def toy(*ops, dtype=f32, output="y"):
    g = GraphBuilder("toy")
    x = g.input("x", dtype[symbol("batch"), 4])
    with g.scope("layers.0.mixer"):
        for op in ops:
            x = g.apply(op, x)
    g.output(output, x)
    return g.build()


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(model_folder("tiny-next"), tmp_path / "tiny"))


def linked(checkpoint, link):
    """The checkpoint with its tensors behind a link."""
    tensors = checkpoint / "model.safetensors"
    away = tensors.replace(checkpoint.parent / "elsewhere.safetensors")
    link(away, tensors)
    return checkpoint


def without(checkpoint, name):
    """The checkpoint without a tensor."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint


def cut_short(checkpoint):
    os.truncate(checkpoint / "model.safetensors", 1_000_000)
    return checkpoint


def placed():
    compiled = deltaloom.compile(GRAPHS.main, deltaloom.CompileConfig())
    return compiled.program("decode").graph


REQUESTS = {
    "profile": ({"profile": "protable"}, "profile is 'protable', expected portable, modern, ort"),
    "old opset": ({"opset": 20}, "opset is 20, but profile 'portable' is written for 21"),
    "new opset": ({"opset": 99}, "opset is 99, but profile"),
    "opset is no number": ({"opset": "21"}, "opset is '21', but profile"),
    "weights": ({"weights": "everywhere"}, "weights is 'everywhere', expected auto, reference, copy, inline, none"),
    "dtype": ({"dtype": "bfloat16"}, "dtype is 'bfloat16', expected float32, float16, bfloat16-storage"),
    "state names": ({"state_names": "ort"}, "state_names is 'ort', expected portable, genai, transformersjs"),
    "nodes and op": ({"nodes": "layers.1", "op": "add"}, "nodes (layers.1) and op (add) both say what to export"),
    "part with MTP head": ({"nodes": "layers.1", "mtp": True}, "the MTP head is written beside a whole model"),
    "op": ({"op": "gated_delta_rul"}, "has no op 'gated_delta_rul'; did you mean gated_delta_rule?"),
    "bad cut": ({"nodes": "layers.99"}, "has no node, scope or region 'layers.99'"),
    "hole": ({"nodes": "layers.0,layers.2"}, "the part to export has a hole: %layers.2."),
    "output": ({"outputs": ["logit"]}, "has no output 'logit'; it has logits, last_logits"),
    "no outputs": ({"outputs": []}, "outputs is empty; name at least one"),
    "suffix": ({"path": "model.pb"}, "model.pb', expected a name that ends in .onnx"),
    "the MTP head's file": ({"path": "mtp.onnx", "mtp": True}, "mtp.onnx is the name of the MTP head's file"),
    "no path": ({"path": 7}, "the model's file is 7, expected a path"),
    "zero byte": ({"path": "mod\0el.onnx"}, "holds a zero byte"),
    "folder in the way": ({"path": "folder.onnx"}, "folder.onnx is a folder; give the model's file a name of its own"),
    "no folder": ({"path": "file/model.onnx"}, "file is no folder"),
    "file system that refuses": ({"path": "/proc/model.onnx"}, "/proc/model.onnx cannot be written"),
    "weights outside": ({"weights": "reference"}, "is not in the model's folder or below; export into the checkpoint's folder"),
    "link": (
        {"model": lambda c: linked(c, lambda away, here: here.symlink_to(away)), "path": "tiny/model.onnx", "weights": "reference"},
        "model.safetensors: it is a link, which runtimes refuse",
    ),
    "hard link": (
        {"model": lambda c: linked(c, lambda away, here: os.link(away, here)), "path": "tiny/model.onnx", "weights": "reference"},
        "model.safetensors: it has several hard links, which runtimes refuse",
    ),
    "the checkpoint's own file": (
        {"model": lambda c: c, "path": "tiny/model.onnx", "weights": "copy"},
        "model.safetensors is a file of the checkpoint; give the model another name",
    ),
    "another checkpoint's file": (
        {"path": "tiny/model.onnx", "weights": "copy"},
        "model.safetensors has weights that no export wrote; export into another folder",
    ),
    "no model": ({"model": "tinynext"}, "the model 'tinynext' is neither a folder nor a bundled name"),
    "missing weight": ({"model": lambda c: without(c, "model.norm.weight")}, "missing"),
    "truncated weights": ({"model": cut_short}, "model.safetensors"),
    "not a model": ({"model": 7}, "a model to export is int, expected a path or a graph"),
    "graph without weights": ({"model": GRAPHS, "weights": "copy"}, "a graph alone has no weights that weights='copy' could keep"),
    "graph in another dtype": ({"model": GRAPHS, "dtype": "float16"}, "a graph says itself what it computes in"),
    "placed graph": ({"model": lambda c: placed()}, "reason: the graph is already lowered to backend 'numpy'"),
    "dtype of a graph": ({"model": toy(Twice(), dtype=bf16)}, "reason: the dtype of %x: bf16[batch, 4] is not supported"),
    "no MTP head": ({"model": GRAPHS.main, "mtp": True}, "has no MTP head to export; leave mtp out"),
    "scheme": ({"quantise": "int3"}, "quantise: there is no scheme 'int3'"),
    "two of one name": ({"model": toy(Twice(), output="x")}, "that an ONNX model would call 'x'; give one of them another name"),
    "op without rule": ({"model": toy(Opaque())}, "reason: op toy.opaque has neither an onnx rule nor a decomposition"),
    "rule that fails": ({"model": toy(Broken())}, "reason: its onnx rule failed: AttributeError: no_such_thing"),
}


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}, sorted(folder.rglob("*"))


@pytest.mark.parametrize("case", REQUESTS)
def test_a_request_that_cannot_be_met_has_its_sentence_and_leaves_no_file(tmp_path, checkpoint, case):
    options, message = dict(REQUESTS[case][0]), REQUESTS[case][1]
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").write_text("in the way")
    model = options.pop("model", "tiny-next")
    given = model(checkpoint) if callable(model) else model
    path = options.pop("path", "new/folder/model.onnx")
    path = tmp_path / path if isinstance(path, str) else path
    before = contents(tmp_path)
    with pytest.raises(DeltaloomError) as found:
        export_onnx(given, path, **options)
    assert message in str(found.value)
    assert contents(tmp_path) == before


def test_weights_that_are_too_large_for_a_message_are_not_put_into_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_weights, "MOST_INLINE", 1_000_000)
    with pytest.raises(ExportError, match="bytes, over the 1,000,000 that can lie in a model; use weights='copy'"):
        export_onnx("tiny-next", tmp_path / "model.onnx", weights="inline")
    assert not list(tmp_path.iterdir())


def test_all_nodes_that_cannot_be_exported_are_told_at_once_one_block_an_op(tmp_path):
    graph = toy(Opaque(), Broken(), Twice(), *[Opaque()] * 4)
    with pytest.raises(UnexportableError) as found:
        export_onnx(graph, tmp_path / "toy.onnx")
    assert [one.op for one in found.value.problems] == ["toy.opaque", "toy.broken", *["toy.opaque"] * 4]
    first, second = str(found.value).split("\n\n")
    lines = first.splitlines()
    assert lines[0] == "cannot export op 'toy.opaque' to ONNX (profile 'portable', opset 21)"
    assert lines[1].startswith("  node:   layers.0.mixer.opaque      (created at tests/runtime/test_onnx_export_requests.py:")
    assert lines[4].strip() == "and 2 more"
    assert lines[5] == "  reason: op toy.opaque has neither an onnx rule nor a decomposition"
    assert lines[6] == "  fix:    give the op an `onnx(b, ...)` rule or a decomposition, or cut before this node (`--nodes`)"
    assert second.startswith("cannot export op 'toy.broken' to ONNX") and not list(tmp_path.iterdir())


def test_a_plugins_op_with_a_rule_is_exported_and_a_cut_leaves_out_what_has_none(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    result = export_onnx(
        toy(Twice(), Twice(), Opaque()), tmp_path / "toy.onnx", nodes="layers.0.mixer.twice:layers.0.mixer.twice_2"
    )
    assert result.functions == ("Twice",) and result.outputs == ("layers.0.mixer.twice_2",)
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], 4 * x)


def test_a_failure_while_writing_leaves_the_earlier_export_as_it_was(tmp_path, monkeypatch):
    export_onnx("tiny-next", tmp_path / "model.onnx")
    before = contents(tmp_path)
    writing = onnx_weights.TensorFile.write

    def full(self, path):
        writing(self, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_weights.TensorFile, "write", full)
    with pytest.raises(ExportError, match=r"model\.onnx cannot be written: No space left on device"):
        export_onnx("tiny-next", tmp_path / "model.onnx")
    assert contents(tmp_path) == before


KILLED = """
import os, signal, sys
from deltaloom.runtime import onnx_files
replace, left = os.replace, [int(sys.argv[2])]
def stop(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    replace(*paths)
onnx_files.os.replace = stop
import deltaloom
deltaloom.export_onnx("tiny-next", sys.argv[1], dtype="bfloat16-storage")
"""


@pytest.mark.parametrize("replaced", [0, 1, 2])
def test_a_kill_at_any_moment_leaves_no_model_that_is_wrong(tmp_path, replaced):
    """Over an earlier export: the old model with its weights, or none."""
    path = tmp_path / "model.onnx"
    export_onnx("tiny-next", path)
    done = subprocess.run([sys.executable, "-c", KILLED, path, str(replaced)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert export_onnx("tiny-next", path).path.exists()


def test_a_model_can_be_written_again_and_is_the_same(tmp_path):
    export_onnx("tiny-next", tmp_path / "model.onnx")
    before = contents(tmp_path)
    export_onnx("tiny-next", tmp_path / "model.onnx")
    assert contents(tmp_path) == before


def test_the_files_of_an_export_are_readable_as_safetensors_with_tensors_on_pages(tmp_path):
    from safetensors import safe_open

    result = export_onnx("tiny-next", tmp_path / "model.onnx")
    model = onnx.load(result.path, load_external_data=False)
    entries = [{one.key: one.value for one in tensor.external_data} for tensor in model.graph.initializer]
    assert entries and all(int(one["offset"]) % 4096 == 0 for one in entries)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert "lm_head.weight" in file.keys()


def test_a_config_alone_is_exported_with_weights_as_inputs(tmp_path, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["model_type"]
    result = export_onnx(checkpoint / "config.json", tmp_path / "model.onnx")
    assert result.weights == "none" and "lm_head.weight" in result.inputs
    assert result.warnings[0].startswith("there are no weights, so ")
    assert replace(result, warnings=()).derived == ()


def test_a_compiled_models_given_graph_is_exported(tmp_path):
    compiled = deltaloom.compile(GRAPHS.main)
    compiled.program("decode")
    found = [export_onnx(given, tmp_path / "model.onnx") for given in (compiled, GRAPHS, GRAPHS.main)]
    assert found[0] == found[1] == found[2] and found[0].weights == "none"
