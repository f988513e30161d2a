"""Models of segments in ONNX Runtime: sessions are made at the first call, and weights stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from deltaloom.backends.onnx.segment import SegmentModel
from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Array
from deltaloom.passes.kernel import Appended

ONLY_ERRORS = 3
"""ONNX Runtime's warnings speak of what it does to graphs, which no user of ours can change."""


def session(proto: onnx.ModelProto, title: str, threads: int) -> ort.InferenceSession:
    """A session on the CPU. ``CompileError`` if ONNX Runtime refuses the model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = ONLY_ERRORS
    # A program has a session for each segment, and each has threads of its own: those of one must not wait by spinning while
    # another works.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        raise CompileError(f"ONNX Runtime {ort.__version__} refuses the model of '{title}': {_first_line(error)}") from error


class SegmentSession:
    """What runs a segment: takes the arguments of its emitted function. A state that grows is extended where it is."""

    def __init__(self, title: str, make: Callable[[], SegmentModel], threads: int) -> None:
        self._title = title
        self._make = make
        self._threads = threads
        self._model: SegmentModel | None = None
        self._session: ort.InferenceSession | None = None

    def __call__(self, *arguments: Any) -> tuple[Array, ...]:
        if self._model is None:
            self._model = self._make()
            self._session = session(self._model.proto, self._title, self._threads)
        axes = {growth.position: growth.axis for growth in self._model.grown}
        feed = {
            name: np.ascontiguousarray(_filled(given, axes[position]) if position in axes else given)
            for position, (name, given) in enumerate(zip(self._model.inputs, arguments, strict=True))
        }
        made = self._run(feed)
        count = len(made) - len(self._model.grown)
        for growth, new in zip(self._model.grown, made[count:], strict=True):
            _extend(arguments[growth.position], growth.axis, new)
        return tuple(made[:count])

    def _run(self, feed: dict[str, Array]) -> Sequence[Array]:
        assert self._session is not None and self._model is not None
        try:
            made: Sequence[Array] = self._session.run(self._model.outputs, feed)
        except Exception as error:
            raise CompileError(f"ONNX Runtime {ort.__version__} cannot run '{self._title}': {_first_line(error)}") from error
        return made


def _filled(state: Appended, axis: int) -> Array:
    """The entries that an append state has."""
    return _along(state.data, axis, 0, int(state.length))


def _extend(state: Appended, axis: int, new: Array) -> None:
    """Write new entries behind those that an append state has."""
    start = int(state.length)
    _along(state.data, axis, start, start + new.shape[axis])[...] = new


def _along(array: Array, axis: int, start: int, stop: int) -> Array:
    view: Array = array[(*[slice(None)] * axis, slice(start, stop))]
    return view


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
