"""A fault in a folder of its own: one node or one rewrite with the numbers that show it, which replays without the model.

The folder holds ``repro.json`` (what was found, with what), ``graph.json`` (a few nodes) and ``inputs.safetensors``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np

import deltaloom.passes.fuse
from deltaloom.backends import backend as make_backend
from deltaloom.graph.dims import Expr
from deltaloom.graph.errors import CompileError, ConfigError, DeltaloomError, require
from deltaloom.graph.interpret import interpret
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import SCALE_SUFFIX, QuantizedArray
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.types import QuantType
from deltaloom.models.safetensors_file import SafetensorsFile, write_safetensors
from deltaloom.passes.kernel import kernels_for
from deltaloom.passes.rewrite.engine import apply_rules
from deltaloom.passes.rewrite.rule import rules
from deltaloom.runtime.node_check import Difference, HostValue, call_kernel, difference

FORMAT, VERSION = "deltaloom.repro", 1
FACTS, GRAPH, INPUTS = "repro.json", "graph.json", "inputs.safetensors"
Kind = Literal["kernel", "rewrite"]


@dataclass(frozen=True)
class Repro:
    """A fault that can be tried again. A *kernel* does not compute what its one node means; a *rewrite* (``rule``) changes what
    ``graph`` computes. ``values`` are the inputs, parameters and states of ``graph`` by name."""

    kind: Kind
    graph: Graph
    values: Mapping[str, HostValue]
    sentence: str
    backend: str = ""
    device: str = "cpu"
    threads: int | None = None
    kernel: str = ""
    rule: str = ""

    def try_again(self) -> Difference | None:
        """How far the result is off now; None if it is right. ``CompileError`` if it cannot be run on its numbers; raises what
        looking up the kernel or the rule raises."""
        try:
            return self._kernel_fault() if self.kind == "kernel" else self._rewrite_fault()
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            tried = f"the kernel {self.kernel}" if self.kind == "kernel" else f"rule {self.rule}"
            raise CompileError(f"{tried} cannot be run on these numbers: {type(error).__name__}: {error}") from error

    def _kernel_fault(self) -> Difference | None:
        (node,) = self.graph.nodes
        where = make_backend(self.backend, device=self.device, threads=self.threads)
        named = [one for one in kernels_for(where, node.op.name) if one.name == self.kernel]
        require(bool(named), f"backend {self.backend} has no kernel '{self.kernel}' for op {node.op.name} now", ConfigError)
        call = call_kernel(named[0], node, [self.values[value.name] for value in node.inputs], where)
        return next(iter(call.faults().values()), None)

    def _rewrite_fault(self) -> Difference | None:
        changed, _ = apply_rules(self.graph, [rules.get(self.rule)()])
        wanted, made = (self._results(graph) for graph in (self.graph, changed))
        found = (difference(made[name], wanted[name]) for name in wanted)
        return next((one for one in found if one.parts), None)

    def _results(self, graph: Graph) -> dict[str, Array]:
        given = {value.name: self.values[value.name] for value in graph.inputs}
        return interpret(graph, given, self.values.__getitem__, {}).outputs  # type: ignore[arg-type]


def write_repro(repro: Repro, folder: Path) -> None:
    """Write ``repro`` to ``folder``, which must not exist yet; it appears whole or not at all. ``ConfigError`` otherwise."""
    require(not os.path.lexists(folder), f"{folder} exists already; give a folder that does not (--repro)", ConfigError)
    arrays: dict[str, Array] = {}
    for name, value in repro.values.items():
        if isinstance(value, QuantizedArray):
            arrays |= {name: value.data, name + SCALE_SUFFIX: value.scale}
        else:
            arrays[name] = value
    facts = {key: getattr(repro, key) for key in ("kind", "sentence", "backend", "device", "threads", "kernel", "rule")}
    facts = {"format": FORMAT, "version": VERSION, **facts, "versions": versions(), "replay": f"deltaloom repro {folder.name}"}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        (made / GRAPH).write_text(to_json(repro.graph), encoding="utf-8")
        write_safetensors(made / INPUTS, arrays)
        (made / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        made.chmod(0o755)
        made.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def read_repro(folder: Path) -> Repro:
    """What ``write_repro`` wrote. ``ConfigError`` for a folder that is none, or whose files do not fit together."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        text = (folder / GRAPH).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        message = f"{folder} is no folder of a repro: it has no {Path(error.filename).name}"
        raise ConfigError(message) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} cannot be read as a repro: {error}") from None
    known = isinstance(facts, dict) and facts.get("format") == FORMAT and facts.get("version") == VERSION
    require(known, f"{folder / FACTS} does not say {FORMAT} version {VERSION}; it is of another program or version", ConfigError)
    kind = facts.get("kind")
    require(kind in ("kernel", "rewrite"), f"{folder / FACTS}: kind is {kind!r}, expected 'kernel' or 'rewrite'", ConfigError)
    texts = {key: facts.get(key) for key in ("sentence", "backend", "device", "kernel", "rule")}
    wrong = next((key for key, value in texts.items() if not isinstance(value, str)), None)
    require(wrong is None, f"{folder / FACTS}: {wrong} is {texts.get(wrong or '')!r}, expected a string", ConfigError)
    threads = facts.get("threads")
    require(threads is None or type(threads) is int, f"{folder / FACTS}: threads is {threads!r}, expected a number", ConfigError)
    try:
        graph = from_json(text)
        values = _values(folder / INPUTS, graph)
    except DeltaloomError as error:
        raise ConfigError(f"{folder} cannot be read as a repro: {error}") from None
    count = len(graph.nodes)
    require(kind == "rewrite" or count == 1, f"{folder / GRAPH} has {count} nodes, expected the one of a kernel", ConfigError)
    return Repro(kind, graph, values, threads=threads, **texts)


def _values(path: Path, graph: Graph) -> dict[str, HostValue]:
    """The numbers for everything that a graph is given, of the types that it says."""
    file = SafetensorsFile.open(path)
    try:
        found: dict[str, HostValue] = {}
        for value in (*graph.inputs, *graph.params):
            array = np.array(file.tensor(value.name))
            if isinstance(value.type.dtype, QuantType):
                found[value.name] = _quantized(path, value, array, np.array(file.tensor(value.name + SCALE_SUFFIX)))
                continue
            fits = array.ndim == value.type.rank and array.dtype == value.type.dtype.numpy
            fits = fits and all(isinstance(dim, Expr) or dim == n for dim, n in zip(value.type.shape, array.shape))
            require(fits, f"{path}: {value.name} is {array.dtype} {list(array.shape)}, expected {value.type}", ConfigError)
            found[value.name] = array
        return found
    finally:
        file.close()


def _quantized(path: Path, value: Value, data: Array, scale: Array) -> QuantizedArray:
    """Codes and scales of a quantised value, of the shapes and dtypes that its type gives."""
    form, shape = value.type.dtype, value.type.static_shape()
    assert isinstance(form, QuantType)
    fits = data.shape == form.data_shape(shape) and data.dtype == form.stored.numpy
    fits = fits and scale.shape == form.scale_shape(shape) and scale.dtype == form.scale.numpy
    found = f"codes {data.dtype} {list(data.shape)}, scales {scale.dtype} {list(scale.shape)}"
    require(fits, f"{path}: {value.name} has {found}, which do not fit {value.type}", ConfigError)
    return QuantizedArray(data, scale, form, shape)


def versions() -> dict[str, str]:
    """What the numbers may depend on."""
    found = {"deltaloom": deltaloom.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in ("numpy", "torch", "onnxruntime"):
        try:
            found[name] = str(import_module(name).__version__)
        except ImportError:
            continue
    return found


def facts_of(repro: Repro) -> dict[str, Any]:
    """A repro in numbers, for ``--json``."""
    sizes = {value.name: str(value.type) for value in (*repro.graph.inputs, *repro.graph.params)}
    own = {key: value for key, value in vars(repro).items() if key not in ("graph", "values")}
    return {**own, "nodes": len(repro.graph.nodes), "inputs": sizes}


def difference_facts(found: Difference | None) -> dict[str, Any] | None:
    """A difference for ``--json``: infinity is no number there."""
    if found is None:
        return None
    return {key: value if not isinstance(value, float) or np.isfinite(value) else None for key, value in asdict(found).items()}
