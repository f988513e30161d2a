"""One compile configuration: from Python, from a TOML file's ``[compile]`` table, or from flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from deltaloom.graph import plugins
from deltaloom.graph.errors import ConfigError, require
from deltaloom.passes.quantise_policy import Policy, quantise_policy
from deltaloom.passes.shard.plan import check_mesh
from deltaloom.passes.table import PROGRAM, SHARED, Step, check_pipelines, near, step_name, without

MOST_THREADS = 4096
CACHE_DEFAULT, CACHE_OFF = "default", "off"


def default_device(backends: Sequence[str]) -> str:
    """The device where none is given: the backend cuda runs on nothing but a GPU, all others on the CPU too."""
    return "cuda" if tuple(backends[:1]) == ("cuda",) else "cpu"


@dataclass(frozen=True)
class CompileConfig:
    """How a model is compiled.

    ``backends``: the first that accepts an op runs it; ``kernels`` overrides that order for single ops. ``dtype``: 'auto' is
    float32 on a CPU and the checkpoint's dtype on an accelerator. ``device``: 'cpu' or 'cuda'; what is not given becomes
    'cuda' where the first backend is cuda. ``threads``: of the CPU, None is all. ``prefill_chunk``: tokens a
    prefill step at most.

    ``pipeline`` and ``program``: the passes that run once on the shared graph, then for each program (``deltaloom.passes.table``),
    less those that ``skip`` names. ``fuel``: after so many rewrites, rules change nothing more; None is no limit. ``mesh``: ranks
    along each axis of a partition, ``{"tp": 2}``.

    ``quantise``: a scheme for the weights of all products ('bf16', 'int8', 'int4', 'fp8'), or a table of name pattern = scheme, of
    which the first that matches decides (``deltaloom.passes.quantise_policy``). ``keep_quantized``: weights stored quantised stay
    so.

    ``use``: whose backend, model type or kernels are used where plugins offer some too: ``{"backends.numpy": "mylab"}`` replaces a
    backend, ``{"kernels.numpy": "mylab"}`` prefers a plugin's kernels to the backend's; 'deltaloom' stands for what is built in.

    ``cache``: where compiled graphs are kept: 'off', 'default' (``~/.cache/deltaloom``) or a folder. ``dump``: a folder for the
    graph after every pass. Raises ``ConfigError`` or ``CompileError`` for values that cannot work, pipelines included, and
    ``PluginError`` for plugins that ``use`` or a pipeline names and that cannot be used."""

    backends: tuple[str, ...] = ("numpy",)
    dtype: str = "auto"
    device: str = ""
    threads: int | None = None
    prefill_chunk: int = 512
    kernels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pipeline: tuple[Step, ...] = SHARED
    program: tuple[Step, ...] = PROGRAM
    skip: tuple[str, ...] = ()
    fuel: int | None = None
    mesh: Mapping[str, int] = field(default_factory=dict)
    quantise: str | Mapping[str, str] = field(default_factory=dict)
    keep_quantized: bool = False
    use: Mapping[str, str] = field(default_factory=dict)
    cache: str = CACHE_OFF
    dump: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.backends), "backends is empty; name at least one, for example numpy", ConfigError)
        if not self.device:
            object.__setattr__(self, "device", default_device(self.backends))
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
        require(self.fuel is None or self.fuel >= 0, f"fuel is {self.fuel}, expected at least 0", ConfigError)
        require(bool(self.cache), "cache is empty; give 'off', 'default' or a folder", ConfigError)
        quantise_policy(self.quantise)
        plugins.check_use(self.use)
        self._check_pipelines()

    def _check_pipelines(self) -> None:
        steps = (*self.pipeline, *self.program)
        names = [step_name(step) for step in without(steps, self.skip)]
        for key, wanted, name in (
            ("mesh", bool(check_mesh(self.mesh)), "shard"),
            ("quantise", bool(self.quantise), "quantise"),
            ("keep_quantized", self.keep_quantized, "quantise"),
        ):
            missing = f"{key} is given, but the pass '{name}', which does it, is not in the pipeline; add it"
            require(not wanted or name in names, missing, ConfigError)
        if (self.pipeline, self.program, self.skip) == (SHARED, PROGRAM, ()):
            return
        names = [step_name(step) for step in steps]
        for name in self.skip:
            require(name in names, f"skip names '{name}', which is not in the pipeline{near(name, names)}", ConfigError)
        check_pipelines(*self.steps)

    @property
    def policy(self) -> Policy:
        """``quantise`` as pairs of pattern and scheme."""
        return quantise_policy(self.quantise)

    @property
    def steps(self) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
        """The steps that run: of the shared graph, and of each program."""
        return without(self.pipeline, self.skip), without(self.program, self.skip)


def backend_order(names: str | Sequence[str]) -> tuple[str, ...]:
    """Backends in order of preference: a list of names, or one text with commas between them."""
    return tuple(part.strip() for part in names.split(",")) if isinstance(names, str) else tuple(names)


_KINDS: dict[str, tuple[type, str]] = {
    "dtype": (str, "a string"),
    "device": (str, "a string"),
    "threads": (int, "a whole number"),
    "prefill_chunk": (int, "a whole number"),
    "fuel": (int, "a whole number"),
    "keep_quantized": (bool, "true or false"),
    "cache": (str, "'off', 'default' or a folder"),
    "dump": (str, "a folder"),
}
_LISTS = ("backends", "skip")
_PIPELINES = ("pipeline", "program")


def compile_config(table: Mapping[str, Any], origin: str = "the configuration") -> CompileConfig:
    """A ``CompileConfig`` from a plain mapping (a TOML table); ``ConfigError`` names unknown keys and wrong types."""
    known = [f.name for f in fields(CompileConfig)]
    values: dict[str, Any] = {}
    for key, value in table.items():
        require(key in known, f"{origin} has an unknown key '{key}'{near(key, known)}", ConfigError)
        if key in _LISTS:
            values[key] = _names(value, key, origin, empty=key != "backends")
        elif key in _PIPELINES:
            values[key] = _steps(value, key, origin)
        elif key == "kernels":
            require(isinstance(value, Mapping), f"{origin}: kernels must be a table of op = [backends]", ConfigError)
            values[key] = {op: _names(order, f"kernels.{op}", origin) for op, order in value.items()}
        elif key == "use":
            texts = isinstance(value, Mapping) and all(isinstance(owner, str) for owner in value.values())
            require(texts, f'{origin}: use is {value!r}, expected a table such as {{ "backends.numpy" = "mylab" }}', ConfigError)
            values[key] = dict(value)
        elif key == "mesh":
            whole = isinstance(value, Mapping) and all(type(ranks) is int for ranks in value.values())
            require(whole, f"{origin}: mesh is {value!r}, expected a table of axis = ranks", ConfigError)
            values[key] = dict(value)
        elif key == "quantise":
            quantise_policy(value, f"{origin}: quantise")
            values[key] = value
        elif value is not None:
            kind, wanted = _KINDS[key]
            good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            require(good, f"{origin}: {key} is {value!r}, expected {wanted}", ConfigError)
            values[key] = value
    return CompileConfig(**values)


def _names(value: object, key: str, origin: str, *, empty: bool = False) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    good = isinstance(names, list | tuple) and (empty or names) and all(isinstance(name, str) for name in names)
    require(bool(good), f"{origin}: {key} is {value!r}, expected a name or a list of names", ConfigError)
    return tuple(names)  # type: ignore[arg-type]


def _steps(value: object, key: str, origin: str) -> tuple[Step, ...]:
    """The steps of a pipeline; a table among them has its pass under ``pass``."""
    good = isinstance(value, list | tuple) and all(isinstance(step, str | Mapping) for step in value)
    require(good, f"{origin}: {key} is {value!r}, expected a list of passes: names, or tables with pass and options", ConfigError)
    steps: tuple[Step, ...] = tuple(value)  # type: ignore[arg-type]
    for step in steps:
        named = isinstance(step, str) or isinstance(step.get("pass"), str)
        require(named, f'{origin}: the step {step} of {key} does not name its pass; write {{ pass = "fuse", … }}', ConfigError)
    return steps
