"""Measures a device: what it reads, multiplies and starts at most, through programs of the backend that a model runs on.

Every figure is the best of several short runs: on a shared machine the best is nearest the limit. Still, a busy machine gives too
little; the profile says how busy it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, dtype_named, f32
from deltaloom.passes.config import CACHE_OFF, CompileConfig
from deltaloom.passes.pipeline import Context
from deltaloom.runtime.compile import compile
from deltaloom.runtime.device_profile import DeviceProfile, Profiles

PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows, columns and depth of the product that shows the peak."""
STREAM = 256 << 20
"""Bytes that are read to find the bandwidth; more than any cache holds."""
WINDOW = 32 << 20
"""Bytes of one timed run of a thread on the CPU: some milliseconds, so that some runs keep their core throughout."""
DEPTH = 8
"""Products one after the other on an accelerator, so that starting and waiting do not count."""
CHAIN = (8, 72)
"""Numbers of additions in two programs, of which the second takes longer by what starting the rest costs."""
RUNS = 7


def device_profile(ctx: Context, *, folder: Path | None, again: bool = False) -> DeviceProfile:
    """The profile of the first backend of ``ctx`` (its dtype resolved) on this machine: the one kept in ``folder``, or a new one,
    which is kept there. ``again`` measures in any case; ``folder`` None keeps nothing. Takes some seconds where it measures."""
    home, dtype = ctx.backends[0], dtype_named(ctx.config.dtype)
    kept = None if folder is None else Profiles(folder, backend=home.name, device=home.device, threads=ctx.config.threads)
    known = None if kept is None or again else kept.read()
    wanted = dict.fromkeys((f32, dtype))
    if known is not None and all(one.long_name in known.flops for one in wanted):
        return known
    found = measured_profile(ctx.config, tuple(wanted))
    if known is not None:
        found = replace(found, flops={**known.flops, **found.flops})
    if kept is not None:
        kept.keep(found)
    return found


def measured_profile(config: CompileConfig, dtypes: tuple[DType, ...]) -> DeviceProfile:
    """A new measurement on the backends, device and threads of ``config``."""
    plain = CompileConfig(config.backends, device=config.device, threads=config.threads, cache=CACHE_OFF)
    kind = "cpu" if config.device == "cpu" else "cuda"
    flops = {dtype.long_name: product_speed(plain, dtype, PRODUCT[kind], 1 if kind == "cpu" else DEPTH) for dtype in dtypes}
    bandwidth = product_bandwidth(plain, 1 if kind == "cpu" else DEPTH)
    if kind == "cpu":
        bandwidth = max(bandwidth, host_bandwidth(plain.threads or _cores()))
    threads = "" if plain.threads is None else ", 1 thread" if plain.threads == 1 else f", {plain.threads} threads"
    name = f"{config.backends[0]} on {config.device}{threads}"
    load = f" at load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return DeviceProfile(name, bandwidth, flops, dispatch_seconds(plain), f"measured{load}")


def product_speed(config: CompileConfig, dtype: DType, size: int, depth: int) -> float:
    """Operations a second of a square product of ``size``, ``depth`` of them in a row."""
    numbers = np.full((1, size, size), 2.0**-6, np.float32).astype(dtype.numpy)
    graph = _products(dtype, rows=size, width=size, depth=depth)
    return depth * 2 * size**3 / _best(_runner(config, dtype, graph, numbers, numbers[0]))


def product_bandwidth(config: CompileConfig, depth: int) -> float:
    """Bytes a second at which the product of one row with a weight of ``STREAM`` bytes reads it."""
    width = int((STREAM // f32.itemsize) ** 0.5)
    weight = np.full((width, width), 1 / width, np.float32)
    graph = _products(f32, rows=1, width=width, depth=depth)
    return depth * weight.nbytes / _best(_runner(config, f32, graph, np.ones((1, 1, width), np.float32), weight))


def host_bandwidth(threads: int) -> float:
    """Bytes a second that up to ``threads`` threads read from the host's memory, as sums of squares. Reached in a quarter of the
    windows: the best alone may have been in a cache."""
    numbers = np.ones(STREAM // f32.itemsize, np.float32)
    window = WINDOW // f32.itemsize
    rates = []
    for count in {1, threads}:
        with ThreadPoolExecutor(count) as pool:
            for start in range(0, len(numbers) - window + 1, window):
                parts = np.array_split(numbers[start : start + window], count)
                begun = perf_counter()
                list(pool.map(lambda part: np.dot(part, part), parts))
                rates.append(WINDOW / (perf_counter() - begun))
    return sorted(rates)[-len(rates) // 4]


def dispatch_seconds(config: CompileConfig) -> float:
    """Seconds that one more kernel takes in a program where it has nothing to do."""
    numbers = np.ones((1, 1, 16), np.float32)
    short, long = (_best(_runner(config, f32, _additions(count), numbers, None), runs=30) for count in CHAIN)
    return max(0.0, (long - short) / (CHAIN[1] - CHAIN[0]))


def _products(dtype: DType, *, rows: int, width: int, depth: int) -> Graph:
    builder = GraphBuilder("products")
    x, weight = builder.input("x", dtype[1, rows, width]), builder.param("weight", [width, width], dtype)
    for number in range(depth):
        x = builder.linear(x, weight, name=f"y{number}")
    builder.output("out", x)
    return builder.build()


def _additions(count: int) -> Graph:
    builder = GraphBuilder("additions")
    x = y = builder.input("x", f32[1, 1, 16])
    for number in range(count):
        y = builder.add(y, x, name=f"y{number}")
    builder.output("out", y)
    return builder.build()


def _runner(config: CompileConfig, dtype: DType, graph: Graph, x: Array, weight: Array | None) -> Callable[[], object]:
    """A function that runs ``graph`` on the backend and waits for its result."""
    compiled = compile(graph, replace(config, dtype=dtype.long_name))
    model = compiled.bind({} if weight is None else {"weight": weight})
    state = model.new_state(1)

    def run() -> object:
        return model.run({"x": x}, state, None, ("out",))

    run()
    return run


def _best(run: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds of the fastest of ``runs``, of which one does not count."""
    run()
    best = float("inf")
    for _ in range(runs):
        begun = perf_counter()
        run()
        best = min(best, perf_counter() - begun)
    return best


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
