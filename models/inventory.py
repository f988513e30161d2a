"""Which tensors of a checkpoint a graph reads, and how many parameters a model has."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType, QuantType, TensorType

SCALE_SUFFIX = "_scale_inv"  # block FP8: X.weight is multiplied by X.weight_scale_inv


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it must be in the file; ``dtype`` None: any float type, it is cast to the parameter's."""

    shape: tuple[int, ...]
    dtype: DType | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def checkpoint_tensors(*graphs: Graph | None) -> dict[str, StoredTensor]:
    """Name -> form of every tensor that the graphs read, in the order of use; a quantised parameter is two tensors."""
    return {name: stored for graph in graphs if graph for name, stored in _tensors(graph.all_params())}


def parameter_count(*graphs: Graph | None) -> int:
    """Elements of all parameters; one that several graphs share counts once, quantisation scales do not count."""
    shapes = {name: type_.static_shape() for graph in graphs if graph for name, type_ in graph.all_params().items()}
    return sum(math.prod(shape) for shape in shapes.values())


def _tensors(params: Mapping[str, TensorType]) -> Iterator[tuple[str, StoredTensor]]:
    for name, type_ in params.items():
        if isinstance(type_.dtype, QuantType):
            yield name, StoredTensor(type_.static_shape(), type_.dtype.storage)
            yield name + SCALE_SUFFIX, StoredTensor(type_.dtype.scale_shape(type_.shape), type_.dtype.scale)
        else:
            yield name, StoredTensor(type_.static_shape())
