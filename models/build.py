"""From a config to its graphs: the table of families, each imported when it is first asked for."""

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from deltaloom.graph.errors import ConfigError
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType, f32
from deltaloom.models.config import ModelConfig


@dataclass(frozen=True)
class ModelGraphs:
    """The main model and, where there is one, its multi-token-prediction head."""

    main: Graph
    mtp: Graph | None = None


@dataclass(frozen=True)
class FamilyGraphs:
    """Where a family's builders are, as ``module:function``; both are called with ``(config, dtype, names)``."""

    main: str
    mtp: str | None = None


FAMILY_GRAPHS = {
    "qwen3": FamilyGraphs("deltaloom.models.qwen3.graph:model"),
    "qwen3_moe": FamilyGraphs("deltaloom.models.qwen3_moe.graph:model"),
    "qwen3_next": FamilyGraphs("deltaloom.models.qwen3_next.graph:model", mtp="deltaloom.models.qwen3_next.mtp:mtp_head"),
}


def build_graph(config: ModelConfig, *, dtype: DType = f32, names: Collection[str] | None = None) -> ModelGraphs:
    """The layer graphs of a model that computes in ``dtype``.

    ``names`` are the checkpoint's tensor names; they decide for each layer whether its experts are stacked, and whether
    there is an MTP head. Without them the published layout is assumed (one tensor an expert, the head if the config
    announces one). A layer of which ``names`` knows neither layout is built one tensor an expert, so that a comparison
    of names can say what is missing.

    Raises ConfigError for an unknown family, CheckpointError for a layout that is not read.
    """
    family = FAMILY_GRAPHS.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"there is no layer graph for model_type {config.model_type!r}; known are {', '.join(sorted(FAMILY_GRAPHS))}."
        )
    known = None if names is None else frozenset(names)
    main: Graph = _function(family.main)(config, dtype, known)
    mtp: Graph | None = _function(family.mtp)(config, dtype, known) if family.mtp else None
    return ModelGraphs(main, mtp)


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
