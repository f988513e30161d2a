"""A model to look at: its shape and its graphs, from config.json and the headers of its files; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaloom.models.build import ModelGraphs, build_graph
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.plans import shard_pass
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver, plain_variants
from deltaloom.passes.pipeline import Context
from deltaloom.passes.shard.plan import Plan
from deltaloom.runtime.compile import CompiledModel, context

OUTPUTS = ("last_logits",)
"""What the programs of a subject give."""


@dataclass(frozen=True)
class Subject:
    """What is looked at: a model's files and shape, its graphs, and what they are compiled with."""

    folder: Path
    shape: ModelConfig
    graphs: ModelGraphs
    context: Context
    plan: Plan

    def compiled(self) -> CompiledModel:
        """The programs of the main model that give the last logits."""
        graph, variants = self.graphs.main, plain_variants(OUTPUTS)
        return CompiledModel(graph, Driver(graph, self.context, planned=variants, plan=self.plan), outputs=OUTPUTS)


def read_subject(model: str, hf_overrides: Mapping[str, Any] | None = None, config: CompileConfig | None = None) -> Subject:
    """A checkpoint folder, a config.json alone or a bundled name as a subject. Raises ``ConfigError``, ``CheckpointError`` or
    ``CompileError``."""
    alone = model.endswith(".json")
    folder = Path(model) if alone else model_folder(model)
    options = config or CompileConfig()
    shape = read_config(folder, hf_overrides or {}, use=options.use)
    compile_context = context(options, shape)
    element = compile_context.backends[0].compute_dtype(compile_context.config.dtype)
    graphs = build_graph(shape, dtype=element, names=None if alone else tensor_names(folder))
    plan = shard_pass(shape, options.mesh).plan if options.mesh else ()
    return Subject(folder, shape, graphs, compile_context, plan)


def tensor_names(folder: Path) -> list[str] | None:
    """The names in the headers of the checkpoint's files, or None for a folder that has a config.json only."""
    if not any((folder / name).exists() for name in (INDEX_FILE, SINGLE_FILE)):
        return None
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.names()
