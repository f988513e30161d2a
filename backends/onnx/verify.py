"""What can be said of an ONNX file without the model that it came from: is it valid, is all of it typed, does it load and run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from deltaloom.graph.op import Array

ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
SIZES = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 7, "total_sequence_length": 12}
"""Sizes of symbols where any will do."""


def file_faults(path: Path) -> list[str]:
    """What the checker, strict shape inference and a look at the outputs find wrong, a sentence each."""
    found = []
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # the checker and its C++ side raise several kinds
        found.append(f"onnx.checker refuses {path.name}: {_first_line(error)}")
    try:
        model = onnx.load(str(path), load_external_data=False)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:
        return [*found, f"strict shape inference fails on {path.name}: {_first_line(error)}"]
    for output in inferred.graph.output:
        tensor = output.type.tensor_type
        if not tensor.elem_type or not tensor.HasField("shape"):
            found.append(f"output {output.name} of {path.name} has no type or no rank")
    return found


def open_session(path: Path, *, optimised: bool) -> Any:
    """A session on the CPU, with all of ONNX Runtime's rewrites or none. Raises what ONNX Runtime raises."""
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else activations are quantised too
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def evaluator(path: Path) -> Callable[[Mapping[str, Array]], list[Array]]:
    """What runs a model in onnx's reference evaluator. It takes the attributes of a function for those of the standard op that has
    the same name, so bodies stand in the places of calls."""
    made = ReferenceEvaluator(inline_local_functions(onnx.load(str(path))))

    def run(feeds: Mapping[str, Array]) -> list[Array]:
        with np.errstate(all="ignore"):
            return [np.asarray(array) for array in made.run(None, dict(feeds))]

    return run


def some_inputs(session: Any, seed: int = 0) -> dict[str, Array]:
    """Seeded numbers of legal shapes for every input of a part: small floats, ids 0, everything valid."""
    rng = np.random.default_rng(seed)
    found: dict[str, Array] = {}
    for given in session.get_inputs():
        shape = [SIZES.get(size, 5) if isinstance(size, str) else size for size in given.shape]
        if given.type == "tensor(bool)":
            found[given.name] = np.ones(shape, bool)
        elif "int" in given.type:
            found[given.name] = np.zeros(shape, ELEMENTS.get(given.type, np.int64))
        else:
            found[given.name] = (0.1 * rng.standard_normal(shape)).astype(ELEMENTS.get(given.type, np.float32))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
