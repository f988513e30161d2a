"""The backends by name. Each is imported when it is first asked for, so that NumPy users never import torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from deltaloom.graph.errors import CompileError
from deltaloom.passes.kernel import Backend

if __name__ != "deltaloom.backends":
    raise ImportError("import deltaloom.backends, not backends: this folder is the source of deltaloom.backends")

TABLE: dict[str, str] = {
    "numpy": "deltaloom.backends.numpy.backend:NumpyBackend",
    "torch": "deltaloom.backends.torch.backend:TorchBackend",
    "inductor": "deltaloom.backends.torch.inductor:InductorBackend",
}
"""Name -> "module:Class" of the built-in backends; the class is called with ``device`` and ``threads``."""

NEEDS: dict[str, str] = {"torch": "torch", "inductor": "torch"}
"""Name -> the package that has to be installed for it."""


def backend(name: str, *, device: str | None = None, threads: int | None = None) -> Backend:
    """The backend ``name``. ``CompileError`` if there is none of that name, its package is not installed, or it cannot run on
    ``device``; ``ConfigError`` for a bad number of threads."""
    if name not in TABLE:
        raise CompileError(f"there is no backend '{name}'; known are {', '.join(TABLE)}")
    package = NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        raise CompileError(
            f"the backend '{name}' needs the package {package}, which is not installed; install it with "
            f"`pip install 'deltaloom[{package}]'`, or use --backend numpy"
        )
    module, _, attribute = TABLE[name].partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except ImportError as error:
        raise CompileError(f"the backend '{name}' cannot be imported: {error}; repair its package or use --backend numpy") from None
    made: Backend = found(device=device, threads=threads)
    return made
