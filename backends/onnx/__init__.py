"""ONNX: export of graphs as models of standard ops."""

from importlib.util import find_spec

from deltaloom.graph.errors import ExportError, require

require(
    find_spec("onnx") is not None,
    "exporting to ONNX needs the package onnx, which is not installed; install it with `pip install 'deltaloom[onnx]'`",
    ExportError,
)
