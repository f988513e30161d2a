"""Block-quantised matrices back to plain ones."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from deltaloom.graph.errors import require
from deltaloom.graph.op import Array, Case, Draw, Op
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import LONG_NAMES, QuantType, TensorType, dtype_named, f8_e4m3


class Dequantize(Op):
    """y[o, i] = float32(data[o, i]) * scale[o // block[0], i // block[1]], rounded once to ``dtype`` (a long name)."""

    name: ClassVar[str] = "dequantize"
    dtype: str

    def infer(self, weight: TensorType) -> TensorType:
        require(isinstance(weight.dtype, QuantType), f"weight is {weight}, which is not quantised")
        known = self.dtype in LONG_NAMES and LONG_NAMES[self.dtype].kind == "float"
        require(known, f"dequantize to '{self.dtype}': expected float32, bfloat16, float16 or float64")
        require(weight.rank == 2, f"weight {weight} should be [out, in]")
        return TensorType(LONG_NAMES[self.dtype], weight.static_shape())

    def reference(self, weight: QuantizedArray) -> Array:
        target = dtype_named(self.dtype).numpy
        computed = np.promote_types(target, np.float32)
        rows, columns = weight.data.shape
        scale = weight.scale.astype(computed).repeat(weight.block[0], axis=0).repeat(weight.block[1], axis=1)
        product: Array = weight.data.astype(computed) * scale[:rows, :columns]
        return product.astype(target)

    def torch(self, torch: Any, weight: Any) -> Any:
        target = getattr(torch, self.dtype)
        computed = torch.float64 if target == torch.float64 else torch.float32
        rows, columns = weight.data.shape
        scale = weight.scale.to(computed)
        scale = scale.repeat_interleave(weight.block[0], 0).repeat_interleave(weight.block[1], 1)
        return (weight.data.to(computed) * scale[:rows, :columns]).to(target)

    @classmethod
    def cases(cls, draw: Draw) -> Case:
        block = (draw.choice(1, 3, 16), draw.choice(2, 5, 16))
        rows, columns = draw.size(40), draw.size(40)
        data = draw.normal(rows, columns).clip(-400, 400).astype(f8_e4m3.numpy)
        scale = draw.uniform(0.01, 2.0, -(-rows // block[0]), -(-columns // block[1])).astype(np.float32)
        weight = QuantizedArray(data, scale, block)
        return Case(cls(draw.choice("float32", "bfloat16", "float16", "float64")), (weight,))
