"""From a config to its graphs, by the functions of its family."""

from collections.abc import Collection
from dataclasses import dataclass

from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType, f32
from deltaloom.models.config import ModelConfig


@dataclass(frozen=True)
class ModelGraphs:
    """The main model and, where there is one, its multi-token-prediction head."""

    main: Graph
    mtp: Graph | None = None


def build_graph(config: ModelConfig, *, dtype: DType = f32, names: Collection[str] | None = None) -> ModelGraphs:
    """The layer graphs of a model that computes in ``dtype``.

    ``names`` are the checkpoint's tensor names; they decide for each layer whether its experts are stacked, and whether
    there is an MTP head. Without them the published layout is assumed (one tensor an expert, the head if the config
    announces one). A layer of which ``names`` knows neither layout is built one tensor an expert, so that a comparison
    of names can say what is missing.

    Raises CheckpointError for a layout that is not read.
    """
    known = None if names is None else frozenset(names)
    build, build_mtp = config.family.function("graph"), config.family.function("mtp")
    assert build is not None
    main: Graph = build(config, dtype, known)
    mtp: Graph | None = build_mtp(config, dtype, known) if build_mtp else None
    return ModelGraphs(main, mtp)
