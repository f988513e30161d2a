"""The backends by name, plugins' too. Each is imported when it is first asked for, so that NumPy users never import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec

from deltaloom.graph import plugins
from deltaloom.graph.errors import CompileError
from deltaloom.passes.kernel import Backend

if __name__ != "deltaloom.backends":
    raise ImportError("import deltaloom.backends, not backends: this folder is the source of deltaloom.backends")

TABLE: dict[str, str] = {
    "numpy": "deltaloom.backends.numpy.backend:NumpyBackend",
    "torch": "deltaloom.backends.torch.backend:TorchBackend",
    "inductor": "deltaloom.backends.torch.inductor:InductorBackend",
    "cuda": "deltaloom.backends.cuda.backend:CudaBackend",
    "onnx": "deltaloom.backends.onnx.backend:OnnxBackend",
}
"""Name -> "module:Class" of the built-in backends; the class is called with ``device`` and ``threads``."""

NEEDS: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "inductor": ("torch",),
    "cuda": ("torch", "triton"),
    "onnx": ("onnx", "onnxruntime"),
}
"""Name -> the packages that have to be installed for it; the first is called like the extra that brings them."""


def backend(name: str, *, device: str | None = None, threads: int | None = None, use: Mapping[str, str] | None = None) -> Backend:
    """The backend ``name``, built in or of a plugin; ``use`` says whose (``CompileConfig.use``). ``CompileError`` if there is none
    of that name, its package is not installed, or it cannot run on ``device``; ``PluginError`` if its plugin is broken, or
    several plugins offer it; ``ConfigError`` for a bad number of threads."""
    offer = plugins.find("backends", name, built_in=name in TABLE, use=use)
    if offer is not None:
        made: Backend = backend_class(offer)(device=device, threads=threads)
        return made
    if name not in TABLE:
        raise CompileError(unknown(name))
    needed = NEEDS.get(name, ())
    for package in needed:
        if find_spec(package) is None:
            raise CompileError(
                f"the backend '{name}' needs the package {package}, which is not installed; install it with "
                f"`pip install 'deltaloom[{needed[0]}]'`, or use --backend numpy"
            )
    module, _, attribute = TABLE[name].partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise CompileError(f"the backend '{name}' cannot be imported: {error}; repair its package or use --backend numpy") from None
    made = found(device=device, threads=threads)
    return made


def names() -> tuple[str, ...]:
    """Every backend that there is: those built in, then those of plugins, which are loaded for it."""
    return tuple(dict.fromkeys([*TABLE, *(offer.name for offer in plugins.offers("backends"))]))


def unknown(name: str) -> str:
    """What to say of a backend that nobody has."""
    return f"there is no backend '{name}'; known are {', '.join(names())}{plugins.shortfall()}"


def backend_class(offer: plugins.Offer) -> Callable[..., Backend]:
    """The class of a plugin's backend. ``PluginError`` if it cannot be imported or is no such class."""

    def fault(found: object) -> str:
        if not callable(found):
            return f"it is {found!r}, expected a class that is called with device and threads"
        own = getattr(found, "name", offer.name)
        return "" if own == offer.name else f"the class calls itself '{own}'; its name has to be '{offer.name}'"

    found = offer.load(fault)
    assert callable(found)
    return found
