"""Composition: a checkpoint folder becomes a compiled ``Model``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from deltaloom.graph.errors import CheckpointError, ConfigError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import dtype_named
from deltaloom.models.build import ModelGraphs
from deltaloom.models.build import build_graph as build_family
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint, check_finite
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.models.coverage import CoverageReport, coverage
from deltaloom.models.inventory import checkpoint_tensors
from deltaloom.models.plans import shard_pass
from deltaloom.passes.cache import CompileCache, cache_of
from deltaloom.passes.config import CompileConfig, backend_order, default_device
from deltaloom.passes.driver import Driver, plain_variants
from deltaloom.passes.pipeline import Context
from deltaloom.passes.quantise_policy import check_matches, parameter_names
from deltaloom.runtime.compile import context
from deltaloom.runtime.executor import Executor
from deltaloom.runtime.model import Model, MtpHead
from deltaloom.runtime.weights import WeightStore

ModelReference = str | os.PathLike[str]


def load(
    model: ModelReference,
    *,
    backend: str | Sequence[str] | None = None,
    dtype: str | None = None,
    config: CompileConfig | None = None,
    max_model_len: int | None = None,
    hf_overrides: Mapping[str, object] | None = None,
    check_weights: bool = False,
) -> Model:
    """Read, compile and load a checkpoint: a folder, or a bundled name ("tiny-next").

    ``backend``: a name or several in order of preference; ``dtype``: "auto", "float32", "bfloat16", …; both override ``config``.
    ``max_model_len`` raises (or lowers) the context limit, by default the checkpoint's; ``hf_overrides`` are merged into
    config.json; ``check_weights`` reads every tensor and refuses NaN and infinity. Raises ``CheckpointError``, ``ConfigError`` or
    ``CompileError``.
    """
    folder = model_folder(model)
    options = with_overrides(config or CompileConfig(), backend, dtype)
    shape = read_config(folder, hf_overrides, use=options.use)
    limit = shape.max_position_embeddings if max_model_len is None else max_model_len
    require(limit >= 1, f"max_model_len is {max_model_len}, expected at least 1", ConfigError)
    refuse_ranks(options, shape)
    cache = cache_of(options)
    ctx = context(options, shape)
    checkpoint = Checkpoint.open(folder)
    graphs = build_family(shape, dtype=ctx.backends[0].compute_dtype(ctx.config.dtype), names=checkpoint.names())
    check_matches(ctx.config.policy, (pair for graph in (graphs.main, graphs.mtp) if graph for pair in parameter_names(graph)))
    check_coverage(shape, graphs, checkpoint).require_complete(f"the checkpoint {folder}")
    check_stored(graphs, checkpoint)
    if check_weights:
        check_finite(checkpoint)
    store = WeightStore(checkpoint, {b.name: b for b in ctx.backends})
    main = _executor(graphs.main, ctx, store, ("last_logits",), cache)
    main.load()
    mtp = _executor(graphs.mtp, ctx, store, ("logits", "hidden"), cache) if graphs.mtp else None
    return Model(shape, ctx, main, MtpHead(mtp, shape) if mtp else None, folder=folder, max_model_len=limit)


def _executor(graph: Graph, ctx: Context, store: WeightStore, planned: tuple[str, ...], cache: CompileCache | None) -> Executor:
    return Executor(Driver(graph, ctx, planned=plain_variants(planned), cache=cache), store, planned=planned)


def refuse_ranks(config: CompileConfig, shape: ModelConfig) -> None:
    """``ConfigError`` for a mesh of more than one rank, with what is wrong with it for this model where something is: one process
    runs a whole model."""
    many = dict(shard_pass(shape, config.mesh).mesh)
    shown = ", ".join(f"{axis}={ranks}" for axis, ranks in many.items())
    found = f"mesh {shown} divides the model over several ranks, and running more than one rank is not supported yet"
    hint = "deltaloom.runtime.lockstep simulates all of them in one process; leave mesh out to run the model whole"
    require(not many, f"{found}; {hint}", ConfigError)


def build_graph(
    model: ModelReference,
    *,
    dtype: str = "float32",
    hf_overrides: Mapping[str, object] | None = None,
    use: Mapping[str, str] | None = None,
) -> ModelGraphs:
    """The layer graphs of a model from its config.json alone, without weights. ``model``: a folder, config file or bundled name;
    ``use``: as in ``CompileConfig``."""
    path = model if str(model).endswith(".json") else model_folder(model)
    return build_family(read_config(path, hf_overrides, use=use), dtype=dtype_named(dtype))


def with_overrides(config: CompileConfig, backend: str | Sequence[str] | None, dtype: str | None) -> CompileConfig:
    """``config`` with a backend (or an order of them) and a dtype in place of its own, where given."""
    if backend is not None:
        order = backend_order(backend)
        given = config.device != default_device(config.backends)
        config = replace(config, backends=order, device=config.device if given else default_device(order))
    return config if dtype is None else replace(config, dtype=dtype)


def check_coverage(shape: ModelConfig, graphs: ModelGraphs, checkpoint: Checkpoint) -> CoverageReport:
    """Compare the tensors that the graphs read with those of the checkpoint. A tied head's stored copy is accepted."""
    expected = {name: stored.shape for name, stored in checkpoint_tensors(graphs.main, graphs.mtp).items()}

    def ignorable(name: str) -> bool:
        return shape.tie_word_embeddings and name == "lm_head.weight"

    return coverage(expected, checkpoint.shapes(), ignorable)


def check_stored(graphs: ModelGraphs, checkpoint: Checkpoint) -> None:
    """Every tensor must be stored in the dtype its parameter says, or, for plain ones, in some float dtype."""
    for name, stored in checkpoint_tensors(graphs.main, graphs.mtp).items():
        found = checkpoint.info(name).dtype
        if stored.dtype is not None and found != stored.dtype.numpy:
            raise CheckpointError(f"tensor '{name}' is stored as {found}, expected {stored.dtype.long_name} for a quantised weight")
        if stored.dtype is None and found.name.startswith("float8"):
            raise CheckpointError(f"tensor '{name}' is stored as {found}, but config.json does not list it as quantised")
        if stored.dtype is None and found.kind in "iub" and not found.name.startswith("bfloat"):
            raise CheckpointError(f"tensor '{name}' is stored as {found}, expected a floating-point weight")
