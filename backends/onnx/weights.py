"""Weights of an exported model: what its initialisers are, and in which file the bytes of each lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
import onnx
from onnx import helper

from deltaloom.backends.onnx.body import ELEMENTS
from deltaloom.backends.onnx.dequantize import is_quantised, parts
from deltaloom.backends.onnx.flat import Weight
from deltaloom.backends.onnx.tensor_file import Piece, TensorFile
from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.op import Array
from deltaloom.graph.types import DTYPES, DType, i4

WeightMode = Literal["auto", "reference", "copy", "inline", "none"]
MODES: tuple[WeightMode, ...] = get_args(WeightMode)
MOST_INLINE = 1_500_000_000
"""Bytes; a protobuf message ends at 2 GiB."""


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

    def stored(self, weight: Weight, part: int) -> StoredTensor | None:
        """Where the tensor lies that ``weight`` is, whatever its dtype; None for one that is computed. ``part`` 1: its scales."""

    def moved(self, weight: Weight) -> bool:
        """Whether a computed weight is nothing but stored tensors, side by side."""

    def loses(self, weight: Weight, dtype: DType) -> bool:
        """Whether a weight that is stored, or only moved, is stored in a dtype that does not fit into ``dtype``."""

    def arrays(self, weight: Weight, part: int, dtype: DType) -> Iterable[Array]:
        """``weight`` in ``dtype``, in pieces that follow each other in memory; ``part`` 1: its scales."""


@dataclass(frozen=True)
class Tensor:
    """An initialiser: as it lies in the checkpoint (``stored``), or made. ``wanted``: what the graph takes it for."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    wanted: DType
    stored: StoredTensor | None
    arrays: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        return -(-prod(self.shape) // 2) if self.dtype == i4 else prod(self.shape) * self.dtype.itemsize

    @property
    def inner(self) -> str:
        """Its own name; the weight's is that of the cast where it needs one."""
        return self.name if self.dtype == self.wanted else f"{self.name}.{self.dtype.long_name}"


@dataclass
class Initializers:
    """The tensors of a model, nodes that bring them to the dtype of the graph, and the files that have to be written."""

    mode: WeightMode
    tensors: list[onnx.TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    casts: list[onnx.NodeProto] = field(default_factory=list)
    files: list[TensorFile] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)
    """Names of weights that no tensor of the checkpoint is."""
    rounded: list[str] = field(default_factory=list)
    """Names of weights that lose digits because the model keeps them in fewer bits than the checkpoint does."""


def initializers(
    weights: Sequence[Weight], source: WeightSource | None, mode: str, target: Path, *, storage: DType | None = None
) -> Initializers:
    """What ``weights`` become in the model ``target``. ``storage``: what weights that are only moved are kept in; None: what they
    are stored in. ``ExportError`` before anything is written, with every file that cannot be referred to, and for weights that are
    too large to lie inline."""
    known = _known(mode, source, weights)
    given = source if known != "none" else None
    tensors = [tensor for weight in weights for tensor in _tensors(weight, given, storage)]
    made = Initializers(_resolved(known, tensors, target.parent))
    if made.mode == "none":
        made.inputs += [helper.make_tensor_value_info(t.inner, ELEMENTS[t.dtype], t.shape) for t in tensors]
    elif made.mode == "inline":
        size = sum(tensor.nbytes for tensor in tensors)
        too_large = f"the weights have {size:,} bytes, over the {MOST_INLINE:,} that can lie in a model; use weights='copy'"
        require(size <= MOST_INLINE, too_large, ExportError)
        made.tensors += [_inline(tensor) for tensor in tensors]
    else:
        _place(made, tensors, target)
    made.casts += [_cast(tensor) for tensor in tensors if tensor.dtype != tensor.wanted]
    if given is not None:
        made.derived += [tensor.name for tensor in tensors if tensor.stored is None]
        made.rounded += [weight.name for weight in weights if storage is not None and given.loses(weight, storage)]
    return made


def _known(mode: str, source: WeightSource | None, weights: Sequence[Weight]) -> WeightMode:
    """A mode that there is; weights that a model has not got, or a checkpoint does not hold, are "none"."""
    found = next((one for one in MODES if one == mode), None)
    require(found is not None, f"weights is {mode!r}, expected {', '.join(MODES)}", ExportError)
    fits = source is not None or found in ("auto", "none")
    require(fits, f"a graph alone has no weights that weights={mode!r} could keep; give 'none'", ExportError)
    return "none" if found is None or source is None or not weights else found


def _resolved(mode: WeightMode, tensors: Sequence[Tensor], folder: Path) -> WeightMode:
    """What "auto" means here; refuses files that no runtime would take."""
    if mode not in ("auto", "reference"):
        return mode
    wrong = unusable({tensor.stored.file for tensor in tensors if tensor.stored is not None}, folder)
    text = "; ".join(f"{file}: {reason}" for file, reason in wrong.items())
    hint = "export into the checkpoint's folder, or with weights='copy'"
    found = f"the checkpoint's files cannot be external data of {folder}: {text}; {hint}"
    require(mode == "auto" or not wrong, found, ExportError)
    return "copy" if wrong else "reference"


def _tensors(weight: Weight, source: WeightSource | None, storage: DType | None) -> list[Tensor]:
    """The initialisers of one weight."""
    type_ = weight.value.type
    if is_quantised(type_):
        return [_part(weight, source, number, *form) for number, form in enumerate(parts(weight.name, type_))]
    wanted, shape = type_.plain_dtype, type_.static_shape()
    stored = source.stored(weight, 0) if source is not None else None
    dtype = wanted if stored is None else next(d for d in DTYPES.values() if d.numpy == stored.dtype)
    if storage is not None and wanted.kind == "float" and (stored is not None or source is None or source.moved(weight)):
        stored, dtype = (stored if dtype == storage else None), storage
    return [Tensor(weight.name, dtype, shape, wanted, stored, lambda: _arrays(source, weight, 0, dtype))]


def _part(weight: Weight, source: WeightSource | None, number: int, name: str, dtype: DType, shape: tuple[int, ...]) -> Tensor:
    """The codes or the scales of a quantised weight."""
    whole = dtype != i4 or shape[-1] % 2 == 0
    found = f"the weight '{weight.name}' has int4 rows of {shape[-1]} columns"
    require(whole, f"{found}; rows of an odd number of codes cannot be exported", ExportError)
    stored = source.stored(weight, number) if source is not None else None
    return Tensor(name, dtype, shape, dtype, stored, lambda: _arrays(source, weight, number, dtype))


def _arrays(source: WeightSource | None, weight: Weight, part: int, dtype: DType) -> Iterable[Array]:
    assert source is not None
    return source.arrays(weight, part, dtype)


def _place(made: Initializers, tensors: Sequence[Tensor], target: Path) -> None:
    """Say where each tensor lies: in the checkpoint, in a copy of it, or, those that are made, in a file of their own."""
    copy = TensorFile(target.with_name(f"{target.stem}.safetensors"))
    derived = TensorFile(target.with_name(f"{target.stem}.derived.safetensors"))
    for tensor in tensors:
        if tensor.stored is not None and made.mode == "reference":
            where = tensor.stored.file.resolve().relative_to(target.parent.resolve()).as_posix()
            made.tensors.append(external(tensor, where, tensor.stored.begin))
        else:
            file = derived if tensor.stored is None else copy
            file.add(Piece(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, tensor.arrays))
    made.files += [file for file in (copy, derived) if file.pieces]
    by_name = {tensor.name: tensor for tensor in tensors}
    for file in made.files:
        made.tensors += [external(by_name[name], file.path.name, offset) for name, offset in file.offsets().items()]


def _cast(tensor: Tensor) -> onnx.NodeProto:
    return helper.make_node("Cast", [tensor.inner], [tensor.name], name=f"widen_{tensor.name}", to=ELEMENTS[tensor.wanted])


def _inline(tensor: Tensor) -> onnx.TensorProto:
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in tensor.arrays())
    return onnx.TensorProto(name=tensor.inner, data_type=ELEMENTS[tensor.dtype], dims=tensor.shape, raw_data=data)


def external(tensor: Tensor, location: str, offset: int) -> onnx.TensorProto:
    """A tensor whose data lies in a file beside the model."""
    made = onnx.TensorProto(
        name=tensor.inner, data_type=ELEMENTS[tensor.dtype], dims=tensor.shape, data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(tensor.nbytes))):
        made.external_data.add(key=key, value=value)
    return made


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
