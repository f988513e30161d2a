"""A model as ONNX in ONNX Runtime: one graph for whole prompts, chunks, single tokens and left padding gives NumPy's logits."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom.graph.errors import ExportError  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx  # noqa: E402

CLOSE = 3e-4
"""Of the largest logit: float32 sums in other orders, through whole models."""
BATCH = 2


@cache
def ids():
    return np.random.default_rng(0).integers(0, 4000, (BATCH, 23))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    result = export_onnx("tiny-next", path)
    assert result.weights == "copy" and (result.opset, result.ir_version) == (21, 10)
    onnx.checker.check_model(path, full_check=True)
    assert sorted(file.name for file in path.parent.iterdir()) == ["tiny.derived.safetensors", "tiny.onnx", "tiny.safetensors"]
    assert {path.parent / "tiny.derived.safetensors", path.parent / "tiny.safetensors", path} == set(result.files)
    return opened(path)


def opened(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def start(session):
    sizes = {"batch_size": BATCH, "past_sequence_length": 0}
    past = (given for given in session.get_inputs() if given.name.startswith("past"))
    return {given.name: np.zeros([sizes.get(size, size) for size in given.shape], np.float32) for given in past}


def step(session, tokens, mask, states):
    seen = mask[:, : next(iter(s for n, s in states.items() if n.endswith("key"))).shape[2] + tokens.shape[1]]
    positions = np.maximum(seen.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
    feed = {"input_ids": tokens, "attention_mask": seen, "position_ids": positions, **states}
    found = dict(zip([output.name for output in session.get_outputs()], session.run(None, feed), strict=True))
    return found.pop("logits"), {name.replace("present", "past_key_values"): state for name, state in found.items()}


def reference(tokens):
    executor = deltaloom.load("tiny-next", backend="numpy").main
    return executor.run({"token_ids": tokens}, executor.new_state(len(tokens)), None, ("logits",))["logits"]


@pytest.mark.parametrize("sizes", [(23,), (5, 7, 11), (16, *[1] * 7)], ids=str)
def test_any_split_gives_numpys_logits(session, sizes):
    states, mask, parts = start(session), np.ones((BATCH, 23), np.int64), []
    for tokens in np.split(ids(), np.cumsum(sizes)[:-1], axis=1):
        logits, states = step(session, tokens, mask, states)
        parts.append(logits)
    want = reference(ids())
    assert np.abs(np.concatenate(parts, axis=1) - want).max() <= CLOSE * np.abs(want).max()


def test_a_left_padded_row_gives_what_it_gives_alone(session):
    mask = np.ones((BATCH, 23), np.int64)
    mask[1, :9] = 0
    logits, states = step(session, np.where(mask, ids(), 0)[:, :17], mask, start(session))
    later, _ = step(session, ids()[:, 17:], mask, states)
    want = reference(ids()[1:, 9:])[0]
    found = np.concatenate([logits[1, 9:], later[1]])
    assert np.abs(found - want).max() <= CLOSE * np.abs(want).max()


def test_weights_elsewhere_are_refused_and_nothing_is_written(tmp_path: Path):
    with pytest.raises(
        ExportError, match="is not in the model's folder or below; export into the checkpoint's folder, or with weights='copy'"
    ):
        export_onnx("tiny-next", tmp_path / "tiny.onnx", weights="reference")
    assert not list(tmp_path.iterdir())


def whole_logits(session):
    return step(session, ids(), np.ones((BATCH, 23), np.int64), start(session))[0]


@pytest.fixture
def checkpoint(tmp_path):
    return Path(shutil.copytree(model_folder("tiny-next"), tmp_path / "tiny"))


def test_in_the_checkpoints_folder_its_own_files_are_referred_to_and_stay_as_they_are(session, checkpoint):
    """Called like the checkpoint's file: what is written beside the model must not take that file's place."""
    before = (checkpoint / "model.safetensors").read_bytes()
    result = export_onnx(checkpoint, checkpoint / "model.onnx")
    assert result.weights == "reference" and (checkpoint / "model.safetensors").read_bytes() == before
    assert (checkpoint / "model.derived.safetensors").exists()
    assert "lm_head.weight" not in result.derived and "model.norm.one_plus" in result.derived
    onnx.checker.check_model(checkpoint / "model.onnx", full_check=True)
    np.testing.assert_array_equal(whole_logits(opened(checkpoint / "model.onnx")), whole_logits(session))


def test_inline_weights_need_no_other_file(session, tmp_path):
    result = export_onnx("tiny-next", tmp_path / "tiny.onnx", weights="inline")
    assert result.weights == "inline" and [file.name for file in tmp_path.iterdir()] == ["tiny.onnx"]
    np.testing.assert_array_equal(whole_logits(opened(tmp_path / "tiny.onnx")), whole_logits(session))


def test_weights_can_be_inputs(session, tmp_path):
    result = export_onnx("tiny-next", tmp_path / "tiny.onnx", weights="none")
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.onnx"]
    more = set(result.inputs) - {given.name for given in session.get_inputs()}
    assert "lm_head.weight" in more and "model.layers.0.linear_attn.conv1d.weight" in more
