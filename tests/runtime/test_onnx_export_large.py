"""The 80B model's graph, and layers of its true size with FP8 weights: time and memory of an export in a process of its own."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import deltaloom  # noqa: E402
from deltaloom.models.bundled import model_folder  # noqa: E402
from deltaloom.models.inventory import checkpoint_tensors  # noqa: E402

if not Path("/proc/self/status").exists():
    pytest.skip("memory is measured in /proc", allow_module_level=True)

CONFIG = Path(__file__).parents[1] / "models" / "config_80b.json"
SECONDS, BYTES = 60, 2e9
"""What an export may take."""
LAYERS = 2

EXPORT = """
import json, sys, time
begun = time.perf_counter()
import deltaloom
result = deltaloom.export_onnx(sys.argv[1], sys.argv[2], weights=sys.argv[3])
seconds = time.perf_counter() - begun
(line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]  # ru_maxrss may be that of the parent
peak = int(line.split()[1]) * 1024
print(json.dumps({"seconds": seconds, "bytes": peak, "outputs": len(result.outputs), "derived": list(result.derived)}))
"""


def export(model, path, weights):
    """What the export reports, after a look at its time and memory."""
    done = subprocess.run([sys.executable, "-c", EXPORT, model, path, weights], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"{found['seconds']:.1f} s, {found['bytes'] / 1e9:.2f} GB")
    assert found["seconds"] < SECONDS and found["bytes"] < BYTES
    return found


def test_the_graph_of_the_80b_without_weights(tmp_path):
    found = export(CONFIG, tmp_path / "model.onnx", "none")
    assert found["outputs"] == 1 + 2 * 48
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx")
    experts = [one for one in model.graph.input if one.name.endswith("experts.gate_up")]
    sizes = [dim.dim_value for dim in experts[0].type.tensor_type.shape.dim]
    assert len(experts) == 48 and sizes == [512, 1024, 2048]


def write_checkpoint(folder):
    """Layers of the 80B, one of each kind, with random weights in block FP8."""
    config = json.loads(CONFIG.read_text())
    config |= {"num_hidden_layers": LAYERS, "full_attention_interval": LAYERS, "num_nextn_predict_layers": 0}
    kept = [f"model.layers.{i}.{name}" for i in range(LAYERS) for name in ("mlp.gate", "mlp.shared_expert_gate")]
    kept += [f"model.layers.{i}.linear_attn.{name}" for i in range(LAYERS) for name in ("in_proj_ba", "conv1d")]
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head", "model.embed_tokens", *kept],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, stored in checkpoint_tensors(deltaloom.build_graph(folder / "config.json").main).items():
        kind = {"float8_e4m3fn": "F8_E4M3", "float32": "F32"}.get(stored.dtype.long_name, "") if stored.dtype else "BF16"
        end = offset + math.prod(stored.shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[kind]
        header[name] = {"dtype": kind, "shape": list(stored.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    numbers = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.float8_e4m3fn).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(offset // len(numbers)):
            file.write(numbers)
        file.write(numbers[: offset % len(numbers)])


def test_a_small_model_of_48_layers_opens_in_onnx_runtime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    config = model_folder("tiny-next") / "config.json"
    result = deltaloom.export_onnx(config, tmp_path / "model.onnx", hf_overrides={"num_hidden_layers": 48})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(result.path, options, providers=["CPUExecutionProvider"])
    assert len(session.get_outputs()) == 1 + 2 * 48


@pytest.fixture
def folder(tmp_path):
    """For files that nobody wants to find afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_layers_of_the_80b_in_fp8(folder):
    write_checkpoint(folder)
    found = export(folder, folder / "fp8.onnx", "reference")
    experts = [name for name in found["derived"] if ".experts." in name]
    assert len(experts) == LAYERS * 4 and not any(name.endswith("lm_head.weight") for name in found["derived"])
    model = onnx.load(folder / "fp8.onnx", load_external_data=False)
    codes = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    assert any(list(one.dims) == [512, 1024, 2048] for one in codes)
