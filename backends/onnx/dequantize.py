"""Quantised weights in a model: codes and scales as they are stored, and a function that makes numbers of them."""

from __future__ import annotations

from onnx import helper

from deltaloom.backends.onnx.body import Body
from deltaloom.backends.onnx.functions import DOMAIN, Library
from deltaloom.graph.types import DType, QuantType, TensorType, f32

SCALE = "_scale"
"""Name of a weight -> that of its scales."""


def dequantizer(library: Library, weight: TensorType, dtype: DType) -> str:
    """The name of the function from codes and scales of ``weight`` to its numbers in ``dtype``, computed in float32."""
    form = weight.dtype
    assert isinstance(form, QuantType)
    rows, columns = form.block
    body = Body(library, dtypes={"codes": form.storage, "scale": form.scale})
    for name in ("codes", "scale", "out"):
        body.name(name)
    scale = body.cast("scale", f32)
    if rows > 1:
        scale = _every_row(body, scale, rows, weight.static_shape())
    axis, width = weight.rank - 1, columns or weight.static_shape()[-1]
    numbers = body.DequantizeLinear("codes", scale, axis=axis, block_size=width)
    body.dtypes[numbers] = f32
    body.nodes.append(helper.make_node("Identity", [body.cast(numbers, dtype)], ["out"], name="give_out"))
    return _added(library, body, f"{form}: code times the scale of its block, in float32")


def _every_row(body: Body, scale: str, rows: int, shape: tuple[int, ...]) -> str:
    """Scales of blocks of ``rows`` rows as scales of rows: DequantizeLinear knows blocks along one axis only."""
    *lead, height, _ = shape
    count = -(-height // rows)
    apart = body.Unsqueeze(scale, body.ints(-2))
    wide = body.Expand(apart, body.ints(*lead, count, rows, 1))
    return body.slice(body.reshape(wide, *lead, count * rows, -1), len(lead), 0, height)


def _added(library: Library, body: Body, doc: str) -> str:
    """Put the function into the library, under the name that an equal one has."""
    imports = [helper.make_opsetid("", library.profile.opset)]
    made = helper.make_function(DOMAIN, "Dequantize", ["codes", "scale"], ["out"], body.nodes, imports, doc_string=doc)
    count = 1
    while (known := library.functions.get(made.name)) is not None and known != made:
        count += 1
        made.name = f"Dequantize_{count}"
    library.functions[made.name] = made
    return made.name


def is_quantised(type_: TensorType) -> bool:
    """Whether a value is codes and scales."""
    return isinstance(type_.dtype, QuantType)


def parts(name: str, type_: TensorType) -> tuple[tuple[str, DType, tuple[int, ...]], ...]:
    """The tensors that a weight is in a model: name, element type and shape of its codes and its scales."""
    form = type_.dtype
    assert isinstance(form, QuantType)
    return (name, form.storage, type_.static_shape()), (name + SCALE, form.scale, form.scale_shape(type_.shape))
