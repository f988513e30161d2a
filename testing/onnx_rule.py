"""An op's ONNX rule, run by ONNX Runtime."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np

from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Array, Op
from deltaloom.testing.evaluate import Value, one_node

PACKAGES = ("onnx", "onnxruntime")


def runs_onnx() -> bool:
    """Whether ONNX models can be made and run here."""
    return all(find_spec(package) is not None for package in PACKAGES)


def onnx_rule(op: Op, arrays: tuple[Value, ...]) -> tuple[Array, ...]:
    """The op as a model of one node, on NumPy arrays. Raises what the export and ONNX Runtime raise."""
    import onnxruntime

    from deltaloom.backends.onnx.functions import Library
    from deltaloom.backends.onnx.model import ModelBuilder, portable_names
    from deltaloom.runtime.onnx_export import OPSET

    graph = one_node(op, tuple(map(type_of, arrays)))
    model = ModelBuilder(graph, Library(OPSET), portable_names).build()
    proto = model.proto("case", OPSET, "deltaloom.testing", ())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    given = {declared.name: _as_declared(array) for declared, array in zip(session.get_inputs(), arrays, strict=True)}
    return tuple(session.run(None, given))


def _as_declared(value: Value) -> Array:
    """Masks are given as int64, as tokenizers make them."""
    array = np.asarray(value)
    return np.ascontiguousarray(array.astype(np.int64) if array.dtype == bool else array)
