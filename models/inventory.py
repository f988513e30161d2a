"""Which tensors of a checkpoint a graph reads, and how many parameters a model has."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from deltaloom.graph.ir import Graph, names_apart
from deltaloom.graph.quantized import SCALE_SUFFIX
from deltaloom.graph.types import DType, QuantType, TensorType


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
    given = [graph for graph in graphs if graph]
    if names_apart(*given):
        shared = {value.name: value.type for graph in given for value in (graph.weights or graph).params}
        inside = [one.graph for graph in given for one in graph.instances() if one.graph is not graph]
        regions = {id(region): _elements(value.type for value in (region.weights or region).params) for region in inside}
        return _elements(shared.values()) + sum(regions[id(region)] for region in inside)
    return _elements({name: type_ for graph in given for name, type_ in graph.all_params().items()}.values())


def _elements(types: Iterable[TensorType]) -> int:
    return sum(math.prod(type_.static_shape()) for type_ in types)


def _tensors(params: Mapping[str, TensorType]) -> Iterator[tuple[str, StoredTensor]]:
    for name, type_ in params.items():
        if isinstance(type_.dtype, QuantType):
            yield name, StoredTensor(type_.static_shape(), type_.dtype.storage)
            yield name + SCALE_SUFFIX, StoredTensor(type_.dtype.scale_shape(type_.shape), type_.dtype.scale)
        else:
            yield name, StoredTensor(type_.static_shape())
