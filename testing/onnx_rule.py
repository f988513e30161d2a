"""An op as an ONNX model of one node, run by ONNX Runtime or by the reference evaluator of the package onnx."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np

from deltaloom.graph.interpret import type_of
from deltaloom.graph.op import Array, Op
from deltaloom.graph.types import TensorType
from deltaloom.testing.evaluate import Value, one_node

PACKAGES = ("onnx", "onnxruntime")
EVERYTHING, NOTHING, EVALUATOR = "all optimisations", "no optimisations", "reference evaluator"
"""Ways to run a model: ONNX Runtime, twice, and plain NumPy."""


def runs_onnx() -> bool:
    """Whether ONNX models can be made and run here."""
    return all(find_spec(package) is not None for package in PACKAGES)


def onnx_rule(op: Op, arrays: tuple[Value, ...]) -> tuple[Array, ...]:
    """The op in the portable profile, by ONNX Runtime, on NumPy arrays. Raises what the export and ONNX Runtime raise."""
    return run_model(op_model(op, tuple(map(type_of, arrays))), arrays)


def op_model(op: Op, types: tuple[TensorType, ...], profile: Any = None, *, functions: bool = True) -> Any:
    """The op as a model of one node, in a profile of ``deltaloom.backends.onnx.profiles``, by default the portable one. Without
    ``functions`` the body stands in the place of the node."""
    from onnx.inliner import inline_local_functions

    from deltaloom.backends.onnx.functions import Library
    from deltaloom.backends.onnx.model import ModelBuilder
    from deltaloom.backends.onnx.profiles import profile as named

    used = named("portable") if profile is None else profile
    proto = ModelBuilder(one_node(op, types), Library(used)).build().proto("case", used.opset, "deltaloom.testing", ())
    return proto if functions else inline_local_functions(proto)


def run_model(proto: Any, arrays: tuple[Value, ...], how: str = EVERYTHING) -> tuple[Array, ...]:
    """The outputs of a model for inputs in their order. ``how``: one of the ways above."""
    names = [value.name for value in proto.graph.input]
    given = {name: _as_declared(array) for name, array in zip(names, arrays, strict=True)}
    if how == EVALUATOR:
        from onnx.inliner import inline_local_functions
        from onnx.reference import ReferenceEvaluator

        # It takes the attributes of a function for those of the standard op that has the same name.
        with np.errstate(all="ignore"):
            return tuple(ReferenceEvaluator(inline_local_functions(proto)).run(None, given))
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if how == NOTHING else level.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    return tuple(session.run(None, given))


def _as_declared(value: Value) -> Array:
    """Masks are given as int64, as tokenizers make them."""
    array = np.asarray(value)
    return np.ascontiguousarray(array.astype(np.int64) if array.dtype == bool else array)
