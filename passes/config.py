"""One compile configuration: from Python, from a TOML file's ``[compile]`` table, or from flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from deltaloom.graph.errors import ConfigError, require

MOST_THREADS = 4096


@dataclass(frozen=True)
class CompileConfig:
    """How a model is compiled. ``backends``: first that accepts an op wins; ``kernels`` overrides that order for single ops;
    ``dtype``: 'auto' is float32 on a CPU and the checkpoint's dtype on an accelerator; ``threads``: of the CPU, None is all;
    ``prefill_chunk``: tokens a prefill step at most; ``dump``: a folder for the graph after every pass."""

    backends: tuple[str, ...] = ("numpy",)
    dtype: str = "auto"
    device: str = "cpu"
    threads: int | None = None
    prefill_chunk: int = 512
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dump: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.backends), "backends is empty; name at least one, for example numpy", ConfigError)
        require(all(self.backends), f"backends is {list(self.backends)}; a name in it is empty", ConfigError)
        repeated = sorted({b for b in self.backends if self.backends.count(b) > 1})
        require(not repeated, f"backends names {', '.join(repeated)} twice", ConfigError)
        require(self.prefill_chunk >= 1, f"prefill_chunk is {self.prefill_chunk}, expected at least 1", ConfigError)
        for op, order in self.kernels.items():
            strange = [name for name in order if name not in self.backends]
            has = ", ".join(self.backends)
            found = f"kernels.{op} names {', '.join(strange)}, which backends ({has}) does not; add it there, in last place"
            require(not strange, found, ConfigError)
        require(
            self.threads is None or 1 <= self.threads <= MOST_THREADS,
            f"threads is {self.threads}, expected 1 to {MOST_THREADS}",
            ConfigError,
        )


def backend_order(names: str | Sequence[str]) -> tuple[str, ...]:
    """Backends in order of preference: a list of names, or one text with commas between them."""
    return tuple(part.strip() for part in names.split(",")) if isinstance(names, str) else tuple(names)


_KINDS: dict[str, tuple[type, str]] = {
    "dtype": (str, "a string"),
    "device": (str, "a string"),
    "threads": (int, "a whole number"),
    "prefill_chunk": (int, "a whole number"),
    "dump": (str, "a folder"),
}


def compile_config(table: Mapping[str, Any], origin: str = "the configuration") -> CompileConfig:
    """A ``CompileConfig`` from a plain mapping (a TOML table); ``ConfigError`` names unknown keys and wrong types."""
    known = [f.name for f in fields(CompileConfig)]
    values: dict[str, Any] = {}
    for key, value in table.items():
        require(key in known, f"{origin} has an unknown key '{key}'; known are {', '.join(known)}", ConfigError)
        if key == "backends":
            values[key] = _names(value, key, origin)
        elif key == "kernels":
            require(isinstance(value, Mapping), f"{origin}: kernels must be a table of op = [backends]", ConfigError)
            values[key] = {op: _names(order, f"kernels.{op}", origin) for op, order in value.items()}
        elif value is not None:
            kind, wanted = _KINDS[key]
            good = isinstance(value, kind) and not isinstance(value, bool)
            require(good, f"{origin}: {key} is {value!r}, expected {wanted}", ConfigError)
            values[key] = value
    return CompileConfig(**values)


def _names(value: object, key: str, origin: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    good = isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names)
    require(bool(good), f"{origin}: {key} is {value!r}, expected a name or a list of names", ConfigError)
    return tuple(names)  # type: ignore[arg-type]
