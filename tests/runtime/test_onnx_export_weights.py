"""Where the weights of an exported model lie, and in which form: dtypes, stored and made codes, files of the checkpoint."""

import shutil
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.runtime.onnx_export import export_onnx  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
CLOSE, HALF = 3e-4, 2e-2
"""Of the largest logit: the bounds of whole models in float32 and in float16."""
BATCH, TOKENS = 2, 9


def logits(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    sizes = {"batch_size": BATCH, "past_sequence_length": 0}
    feed = {
        "input_ids": ids(),
        "attention_mask": np.ones((BATCH, TOKENS), np.int64),
        "position_ids": np.tile(np.arange(TOKENS), (BATCH, 1)),
    }
    for one in session.get_inputs():
        if one.name.startswith("past"):
            dtype = np.float16 if "float16" in one.type else np.float32
            feed[one.name] = np.zeros([sizes.get(size, size) for size in one.shape], dtype)
    return session.run(["logits"], feed)[0].astype(np.float64)


def ids():
    return np.random.default_rng(0).integers(0, 64, (BATCH, TOKENS))


def reference(model, **options):
    """The same weights, dequantised, in NumPy."""
    config = deltaloom.CompileConfig(backends=("numpy",), dtype="float32", **options)
    return deltaloom.load(model, config=config).forward(ids()).logits


def types_of(path):
    """Element type of each initialiser, by name."""
    model = onnx.load(path, load_external_data=False)
    return {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}


@pytest.mark.parametrize("functions", [True, False], ids=["functions", "flat"])
@pytest.mark.parametrize(
    ("model", "scheme", "code"),
    [
        (GOLDEN / "next_fp8", None, "FLOAT8E4M3FN"),
        ("tiny-next", "int8", "INT8"),
        ("tiny-next", "int8_g64", "INT8"),
        ("tiny-next", "int4", "INT4"),
        ("tiny-next", "fp8", "FLOAT8E4M3FN"),
        ("tiny-next", "bf16", "BFLOAT16"),
    ],
    ids=str,
)
def test_quantised_weights_stay_codes_and_mean_what_they_mean(tmp_path, model, scheme, code, functions):
    result = export_onnx(model, tmp_path / "model.onnx", quantise=scheme, functions=functions)
    onnx.checker.check_model(result.path, full_check=True)
    want = reference(model, **({"quantise": scheme} if scheme else {"keep_quantized": True}))
    assert np.abs(logits(result.path) - want).max() <= CLOSE * np.abs(want).max()
    types = types_of(result.path)
    experts = [name for name in types if ".experts." in name and not name.endswith("_scale")]
    assert experts and all(types[name] == code for name in experts)


def test_codes_that_a_checkpoint_stores_are_referred_to_where_they_lie(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "next_fp8", tmp_path / "fp8"))
    result = export_onnx(folder, folder / "fp8.onnx")
    assert result.weights == "reference"
    model = onnx.load(result.path, load_external_data=False)
    where = {tensor.name: tensor.external_data[0].value for tensor in model.graph.initializer}
    kept = [name for name, location in where.items() if location == "model.safetensors"]
    codes = [name for name in kept if types_of(result.path)[name] == "FLOAT8E4M3FN"]
    assert codes and all(f"{name}_scale" in kept for name in codes)
    want = reference(folder, keep_quantized=True)
    assert np.abs(logits(result.path) - want).max() <= CLOSE * np.abs(want).max()


def test_a_checkpoint_below_the_models_folder_is_referred_to(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "next_base", tmp_path / "below" / "base"))
    result = export_onnx(folder, tmp_path / "model.onnx", weights="reference")
    model = onnx.load(result.path, load_external_data=False)
    assert "below/base/model.safetensors" in {tensor.external_data[0].value for tensor in model.graph.initializer}
    want = reference(folder)
    assert np.abs(logits(result.path) - want).max() <= CLOSE * np.abs(want).max()


def test_a_loaded_model_is_exported_with_the_weights_that_it_runs_with(tmp_path):
    config = deltaloom.CompileConfig(backends=("numpy",), quantise="int8")
    model = deltaloom.load("tiny-next", config=config)
    result = export_onnx(model, tmp_path / "model.onnx")
    want = model.forward(ids()).logits
    assert "INT8" in types_of(result.path).values()
    assert np.abs(logits(result.path) - want).max() <= CLOSE * np.abs(want).max()


def test_float16_computes_near_enough_and_keeps_its_states_so(tmp_path):
    result = export_onnx("tiny-next", tmp_path / "model.onnx", dtype="float16")
    want, found = reference("tiny-next"), logits(result.path)
    assert np.abs(found - want).max() <= HALF * np.abs(want).max()
    inputs = {one.name: one.type.tensor_type.elem_type for one in onnx.load(result.path, load_external_data=False).graph.input}
    assert inputs["past_key_values.3.key"] == onnx.TensorProto.FLOAT16
    assert inputs["past_key_values.0.recurrent_state"] == onnx.TensorProto.FLOAT


def test_weights_kept_in_bfloat16_lose_nothing_where_the_checkpoint_has_them_so(tmp_path):
    whole = export_onnx("tiny-next", tmp_path / "whole" / "model.onnx")
    half = export_onnx("tiny-next", tmp_path / "half" / "model.onnx", dtype="bfloat16-storage")
    assert half.warnings == ()
    np.testing.assert_array_equal(logits(half.path), logits(whole.path))
    sizes = [sum(file.stat().st_size for file in one.files) for one in (half, whole)]
    assert sizes[0] < 0.7 * sizes[1]
    assert types_of(half.path)["model.layers.0.mlp.experts.down.bfloat16"] == "BFLOAT16"


def test_digits_that_bfloat16_has_not_are_told(tmp_path):
    result = export_onnx(GOLDEN / "next_base", tmp_path / "model.onnx", dtype="bfloat16-storage")
    assert (
        len(result.warnings) == 1
        and "weights are rounded to bfloat16, because the checkpoint has more digits" in result.warnings[0]
    )


def test_unaligned_offsets_into_the_checkpoint_are_right(tmp_path):
    """A header of an odd length: tensors begin at odd bytes."""
    folder = Path(shutil.copytree(model_folder("tiny-next"), tmp_path / "tiny"))
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    result = export_onnx(folder, folder / "m.onnx", weights="reference")
    model = onnx.load(result.path, load_external_data=False)
    offsets = {int(t.external_data[1].value) for t in model.graph.initializer if t.external_data[0].value == file.name}
    assert any(offset % 2 for offset in offsets)
    want = reference(folder)
    assert np.abs(logits(result.path) - want).max() <= CLOSE * np.abs(want).max()
