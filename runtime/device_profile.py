"""Device profiles: how fast a device reads memory, multiplies, and starts a kernel; published, from a file, or measured and kept.

A file is TOML or JSON:

    name = "my machine"
    bandwidth = 38e9            # bytes a second, reading
    dispatch = 1e-6             # seconds to start a kernel; 0 if absent
    flops = { float32 = 160e9 } # operations a second, by dtype
"""

from __future__ import annotations

import json
import math
import os
import platform
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaloom import __version__
from deltaloom.graph.errors import ConfigError, require
from deltaloom.graph.types import LONG_NAMES, DType
from deltaloom.passes.cache import CompileCache
from deltaloom.passes.cache_key import CacheKey
from deltaloom.passes.cost import Work
from deltaloom.passes.table import near

METHOD = 1
"""Version of how devices are measured; profiles measured in another way are not used."""
KIND = "profile"
MOST_BYTES = 1 << 20
"""Of a profile's file."""
KEYS = ("name", "bandwidth", "dispatch", "flops", "source")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_CORETYPE")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: object) -> bool:
    return _number(value) and float(value) > 0  # type: ignore[arg-type]


@dataclass(frozen=True)
class DeviceProfile:
    """``bandwidth``: bytes a second that can be read; ``flops``: operations a second by dtype ("float32"); ``dispatch``: seconds to
    start one kernel. ``source`` says where the figures come from. ``ConfigError`` for figures that cannot be."""

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    dispatch: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        where = f"the device profile '{self.name}'"
        good = _positive(self.bandwidth)
        require(good, f"{where} has bandwidth {self.bandwidth!r}, expected bytes a second above 0", ConfigError)
        good = _number(self.dispatch) and self.dispatch >= 0
        require(good, f"{where} has dispatch {self.dispatch!r}, expected seconds, at least 0", ConfigError)
        require(bool(self.flops), f"{where} has no flops; give at least flops.float32, in operations a second", ConfigError)
        for dtype, speed in self.flops.items():
            require(dtype in LONG_NAMES, f"{where} has flops for '{dtype}'{near(dtype, tuple(LONG_NAMES))}", ConfigError)
            require(_positive(speed), f"{where} has flops.{dtype} = {speed!r}, expected operations a second above 0", ConfigError)

    def peak(self, dtype: DType) -> float:
        """Operations a second in ``dtype``; ``ConfigError`` where the profile does not say."""
        known = ", ".join(self.flops)
        found = self.flops.get(dtype.long_name)
        if found is None:
            raise ConfigError(f"the device profile '{self.name}' has no flops for {dtype.long_name}, only for {known}; add it")
        return found

    def seconds(self, work: Work, dtype: DType) -> float:
        """The least time that ``work`` takes: the longer of its operations and its bytes."""
        return max(work.flops / self.peak(dtype), work.bytes / self.bandwidth)


KNOWN: Mapping[str, DeviceProfile] = {
    name: DeviceProfile(
        f"NVIDIA {name.upper()}",
        bandwidth,
        {"float32": 67e12, "bfloat16": 790e12, "float16": 790e12, "float8_e4m3fn": 1460e12},
        dispatch=1.2e-6,
        source="published: measured read rate, matrix products and empty kernel in a CUDA graph; float32 by the data sheet",
    )
    for name, bandwidth in (("h100", 3.0e12), ("h200", 4.58e12))
}
"""Devices by name. They cannot be measured from elsewhere, so these figures are what others measured on them."""


def named_profile(text: str) -> DeviceProfile:
    """A known device's profile, or that of a file. ``ConfigError`` for a name that is neither, or a file that is no profile."""
    if text.lower() in KNOWN:
        return KNOWN[text.lower()]
    return read_profile(Path(text))


def read_profile(path: Path) -> DeviceProfile:
    """The profile in a TOML (``.toml``) or JSON file. ``ConfigError`` with its name if it cannot be read or is no profile."""
    known = f"known devices are {', '.join(KNOWN)}"
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        require(len(content) <= MOST_BYTES, f"{path} is longer than {MOST_BYTES} bytes and so no device profile", ConfigError)
        found = tomllib.loads(content.decode()) if path.suffix == ".toml" else json.loads(content)
    except FileNotFoundError:
        raise ConfigError(f"there is no device profile '{path}': no such file, and {known}") from None
    except (OSError, ValueError, RecursionError) as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"the device profile {path} cannot be read as {kind}: {reason}") from None
    return profile_of(found, str(path))


def profile_of(content: Any, source: str) -> DeviceProfile:
    """A profile from the fields of a file or an entry. ``ConfigError`` for one that is missing, unknown or of another kind."""
    wanted = f"expected {', '.join(KEYS)}"
    require(isinstance(content, dict), f"{source} holds {type(content).__name__}, {wanted}", ConfigError)
    for key in content:
        require(key in KEYS, f"{source} has an unknown field '{key}'{near(key, KEYS)}", ConfigError)
    for key in ("bandwidth", "flops"):
        require(key in content, f"{source} has no field '{key}', {wanted}", ConfigError)
    flops, name, stated = content["flops"], content.get("name", source), content.get("source", source)
    require(isinstance(flops, dict), f"{source}: flops is {flops!r}, expected a table of dtype = operations a second", ConfigError)
    for key, text in (("name", name), ("source", stated)):
        require(isinstance(text, str), f"{source}: {key} is {text!r}, expected a text", ConfigError)
    try:
        return DeviceProfile(name, content["bandwidth"], flops, content.get("dispatch", 0.0), stated)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


class Profiles:
    """Measured profiles, kept in the private cache folder under the facts of the machine that they were measured on."""

    def __init__(self, folder: Path, *, backend: str, device: str, threads: int | None) -> None:
        """``ConfigError`` for a folder that other users can get at."""
        self._cache = CompileCache(folder, instead="measuring")
        self._key = CacheKey(machine_facts(backend, device, threads))

    def read(self) -> DeviceProfile | None:
        """The kept profile of this machine; None without one, with a warning if there is one that cannot be used."""
        parts = self._cache.read(self._key, KIND)
        if parts is None:
            return None
        try:
            return profile_of(json.loads(parts[KIND]), "its content")
        except (ConfigError, KeyError, ValueError) as error:
            self._cache.reject(self._key, KIND, error)
            return None

    def keep(self, profile: DeviceProfile) -> bool:
        """Keep a measured profile; False, with a warning, where that cannot be done."""
        return self._cache.write(self._key, KIND, {KIND: json.dumps(asdict(profile) | {"flops": dict(profile.flops)})})


def machine_facts(backend: str, device: str, threads: int | None) -> dict[str, str]:
    """What a measured profile depends on."""
    import numpy as np

    built = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {}) if isinstance(built, dict) else {}
    return {
        "method": str(METHOD),
        "deltaloom": __version__,
        "backend": backend,
        "device": f"{device} {_gpus()}" if device != "cpu" else device,
        "threads": f"{threads or 'all'} of {_usable_cores()}",
        "cpu": _cpu_model(),
        "machine": f"{platform.machine()} {platform.system()} {platform.node()}",
        "python": platform.python_version(),
        "numpy": f"{np.__version__} {blas.get('name', '')} {blas.get('version', '')}",
        "package": _package(backend),
        "environment": json.dumps({name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}),
    }


def _package(backend: str) -> str:
    """The versions of what a backend computes with, where that is not NumPy."""
    from importlib.metadata import PackageNotFoundError, version

    from deltaloom.backends import NEEDS

    found = []
    for name in NEEDS.get(backend, ()):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpus() -> str:
    """The NVIDIA cards that the driver lists."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return ", ".join(found)
