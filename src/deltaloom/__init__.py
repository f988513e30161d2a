"""deltaloom: a compute-graph compiler and runtime for hybrid delta-rule language models.

The public names are imported when they are first used, so that ``import deltaloom`` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltaloom.graph.errors import DeltaloomError
    from deltaloom.graph.plugin import Plugin
    from deltaloom.passes.config import CompileConfig
    from deltaloom.runtime.auto import AutoModelForCausalLM, AutoTokenizer
    from deltaloom.runtime.bisect import bisect
    from deltaloom.runtime.compare import compare
    from deltaloom.runtime.compile import CompiledModel, compile
    from deltaloom.runtime.llm import LLM
    from deltaloom.runtime.load import build_graph, load
    from deltaloom.runtime.onnx_export import export_onnx
    from deltaloom.runtime.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "CompileConfig",
    "CompiledModel",
    "DeltaloomError",
    "Plugin",
    "SamplingParams",
    "bisect",
    "build_graph",
    "compare",
    "compile",
    "export_onnx",
    "load",
]

_MODULES = {
    "LLM": "deltaloom.runtime.llm",
    "AutoModelForCausalLM": "deltaloom.runtime.auto",
    "AutoTokenizer": "deltaloom.runtime.auto",
    "CompileConfig": "deltaloom.passes.config",
    "CompiledModel": "deltaloom.runtime.compile",
    "DeltaloomError": "deltaloom.graph.errors",
    "Plugin": "deltaloom.graph.plugin",
    "SamplingParams": "deltaloom.runtime.params",
    "bisect": "deltaloom.runtime.bisect",
    "build_graph": "deltaloom.runtime.load",
    "compare": "deltaloom.runtime.compare",
    "compile": "deltaloom.runtime.compile",
    "export_onnx": "deltaloom.runtime.onnx_export",
    "load": "deltaloom.runtime.load",
}


def __getattr__(name: str) -> object:
    """Import a public name from the module that defines it, once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'deltaloom' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
