"""Weights of an exported model: where their bytes lie, and the file for those that no checkpoint file holds as they are needed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnx
from onnx import helper

from deltaloom.backends.onnx.body import ELEMENTS, to_array
from deltaloom.backends.onnx.model import Weight
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.op import Array
from deltaloom.graph.types import DTYPES, DType, QuantType

WeightMode = Literal["auto", "reference", "copy", "inline", "none"]
MODES: tuple[WeightMode, ...] = ("auto", "reference", "copy", "inline", "none")
MOST_INLINE = 1_500_000_000
"""Bytes; a protobuf message ends at 2 GiB."""
CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int8": "I8"}
"""Dtypes as the safetensors format names them."""


class StoredTensor(Protocol):
    """Where a stored tensor lies: byte positions in ``file``."""

    @property
    def dtype(self) -> np.dtype[np.generic]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...


class WeightSource(Protocol):
    """The tensors of a checkpoint, and what is made of them."""

    def stored(self, weight: Weight) -> StoredTensor | None:
        """Where the tensor lies that ``weight`` is, whatever its dtype; None for one that is computed."""

    def array(self, weight: Weight) -> Array:
        """``weight`` in its own dtype."""


@dataclass
class Initializers:
    """The tensors of a model, nodes that bring them to the dtype of the graph, and what has to be written to ``extra``, the file
    beside the model."""

    mode: WeightMode
    extra: str
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    casts: list[onnx.NodeProto] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    """Names of the weights in ``extra``."""
    _pending: list[tuple[str, DType, tuple[int, ...], Callable[[], Array]]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the extra file in the safetensors format, a tensor at a time."""
        if not self._pending:
            return
        with path.open("wb") as file:
            file.write(self._head())
            for _, dtype, _, make in self._pending:
                file.write(np.ascontiguousarray(make(), dtype.numpy).view(np.uint8).reshape(-1).data)

    def place(self) -> None:
        """Make the tensors that refer to the extra file, once all of them are known."""
        start = len(self._head())
        for name, dtype, shape, _ in self._pending:
            size = _nbytes(dtype, shape)
            self.tensors.append(external(name, dtype, shape, self.extra, start, size))
            self.written.append(name)
            start += size

    def _head(self) -> bytes:
        """Length and header, filled with spaces so that the data begins on a page."""
        header, offset = {}, 0
        for name, dtype, shape, _ in self._pending:
            end = offset + _nbytes(dtype, shape)
            header[name] = {"dtype": CODES[dtype.long_name], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 4096)
        return len(text).to_bytes(8, "little") + text


def initializers(weights: Sequence[Weight], source: WeightSource, mode: WeightMode, folder: Path, extra: str) -> Initializers:
    """What ``weights`` become in a model in ``folder``. ``ExportError`` before anything is written, with every file that cannot be
    referred to, and for weights that are too large to lie inline."""
    require(mode in MODES, f"weights is {mode!r}, expected {', '.join(MODES)}", ExportError)
    made = Initializers(mode, extra)
    if mode == "none":
        infos = (helper.make_tensor_value_info(w.name, ELEMENTS[_dtype(w)], list(_shape(w))) for w in weights)
        made.inputs.extend(infos)
        return made
    stored = {weight.name: source.stored(weight) for weight in weights}
    if mode in ("auto", "reference"):
        wrong = unusable({s.file for s in stored.values() if s is not None}, folder)
        text = "; ".join(f"{file}: {reason}" for file, reason in wrong.items())
        hint = "export into the checkpoint's folder, or with weights='copy'"
        require(
            mode == "auto" or not wrong, f"the checkpoint's files cannot be external data of {folder}: {text}; {hint}", ExportError
        )
        made.mode = "copy" if wrong else "reference"
    size = sum(_nbytes(_dtype(weight), _shape(weight)) for weight in weights)
    too_large = f"the weights have {size:,} bytes, over the {MOST_INLINE:,} that can lie in a model; use weights='copy'"
    require(made.mode != "inline" or size <= MOST_INLINE, too_large, ExportError)
    for weight in weights:
        _add(made, weight, stored[weight.name], source, folder)
    made.place()
    return made


def _add(made: Initializers, weight: Weight, stored: StoredTensor | None, source: WeightSource, folder: Path) -> None:
    wanted = _dtype(weight)
    if made.mode == "inline":
        tensor = to_array(source.array(weight), wanted)
        tensor.name = weight.name
        made.tensors.append(tensor)
    elif made.mode == "reference" and stored is not None and stored.shape == _shape(weight):
        dtype = next(d for d in DTYPES.values() if d.numpy == stored.dtype)
        name = weight.name if dtype == wanted else f"{weight.name}.{dtype.long_name}"
        where = stored.file.resolve().relative_to(folder.resolve()).as_posix()
        made.tensors.append(external(name, dtype, stored.shape, where, stored.begin, stored.end - stored.begin))
        if dtype != wanted:
            made.casts.append(helper.make_node("Cast", [name], [weight.name], name=f"widen_{weight.name}", to=ELEMENTS[wanted]))
    else:
        made._pending.append((weight.name, wanted, _shape(weight), lambda: source.array(weight)))


def external(name: str, dtype: DType, shape: Sequence[int], location: str, offset: int, length: int) -> onnx.TensorProto:
    """A tensor whose data lies in a file beside the model."""
    tensor = onnx.TensorProto(name=name, data_type=ELEMENTS[dtype], dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def unusable(files: set[Path], folder: Path) -> Mapping[str, str]:
    """File -> why no runtime would take it as external data of a model in ``folder``."""
    found: dict[str, str] = {}
    home = folder.resolve()
    for file in sorted(files):
        if file.is_symlink():
            found[str(file)] = "it is a link, which runtimes refuse"
        elif not file.resolve().is_relative_to(home):
            found[str(file)] = "it is not in the model's folder or below"
        elif os.stat(file).st_nlink > 1:
            found[str(file)] = "it has several hard links, which runtimes refuse"
    return found


def _dtype(weight: Weight) -> DType:
    dtype = weight.value.type.dtype
    if isinstance(dtype, QuantType):
        raise ExportError(f"the weight '{weight.name}' is {weight.value.type}; quantised weights cannot be exported")
    return dtype


def _shape(weight: Weight) -> tuple[int, ...]:
    return weight.value.type.static_shape()


def _nbytes(dtype: DType, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
