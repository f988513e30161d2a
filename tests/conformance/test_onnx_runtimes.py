"""Exported models in the oldest ONNX Runtime that each profile is for, in an environment of its own."""

import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import deltaloom
from deltaloom.runtime.onnx_export import export_onnx

OLDEST = [("portable", None, "1.20.1"), ("modern", None, "1.24.4"), ("modern", 27, "1.32.0"), ("ort", None, "1.26.0")]
"""Profile, opset, and the version of ONNX Runtime from which on it is supported."""
CLOSE = 3e-4
"""Of the largest logit: float32 sums in other orders, through a whole model."""
CUTS = (16, 17, 18)
"""A prompt, two single tokens and a chunk."""

SCRIPT = """
import sys
import numpy as np
import onnxruntime as ort

model, given, made, *cuts = sys.argv[1:]
tokens = np.load(given)
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
session = ort.InferenceSession(model, options, ["CPUExecutionProvider"])
sizes = {"batch_size": len(tokens), "past_sequence_length": 0}
past = [one for one in session.get_inputs() if one.name.startswith("past")]
states = {one.name: np.zeros([sizes.get(size, size) for size in one.shape], np.float32) for one in past}
names, parts, done = [one.name for one in session.get_outputs()], [], 0
for piece in np.split(tokens, [int(cut) for cut in cuts], axis=1):
    places = np.tile(np.arange(done, done + piece.shape[1]), (len(piece), 1))
    done += piece.shape[1]
    feed = {"input_ids": piece, "attention_mask": np.ones((len(piece), done), np.int64), "position_ids": places, **states}
    found = dict(zip(names, session.run(None, feed)))
    parts.append(found.pop("logits"))
    states = {name.replace("present", "past_key_values"): state for name, state in found.items()}
np.save(made, np.concatenate(parts, axis=1))
print(ort.__version__)
"""


def python_with(version: str, folder: Path) -> Path:
    """The interpreter of an environment that has this ONNX Runtime; skips the test where it cannot be installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", f"onnxruntime=={version}", "numpy"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"onnxruntime {version} cannot be installed for Python {sys.version_info[0]}.{sys.version_info[1]}: {reason}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(("profile", "opset", "version"), OLDEST, ids=str)
def test_the_oldest_runtime_gives_our_logits(profile: str, opset: int | None, version: str, tmp_path: Path) -> None:
    python = python_with(version, tmp_path / "environment")
    result = export_onnx("tiny-next", tmp_path / "model.onnx", profile=profile, opset=opset)
    tokens = np.random.default_rng(0).integers(0, 4000, (2, 25))
    np.save(tmp_path / "tokens.npy", tokens)
    files = [str(result.path), str(tmp_path / "tokens.npy"), str(tmp_path / "logits.npy")]
    done = subprocess.run([python, "-c", SCRIPT, *files, *map(str, CUTS)], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == version
    want = deltaloom.load("tiny-next", backend="numpy").forward(tokens).logits
    assert want is not None
    error = np.abs(np.load(tmp_path / "logits.npy") - want).max() / np.abs(want).max()
    assert error <= CLOSE, f"ONNX Runtime {version} is {error:.2g} off"
    print(f"{profile} {result.opset} in ONNX Runtime {version}: {error:.2g} of the largest logit")
