"""Times kernels alone on a GPU: many calls in one CUDA graph, over inputs that the L2 cache cannot hold together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch

from deltaloom.graph.quantized import QuantizedArray

ROUNDS = 7
MOST_COPIES = 64
BEYOND = 2
"""Inputs together are so many times as large as the L2 cache."""


def graph_seconds(calls: Sequence[Callable[[], object]], rounds: int = ROUNDS) -> float:
    """Seconds of a call, the median over replays of a graph of all of them in turn. torch's ``RuntimeError`` for calls that cannot
    be recorded."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _events(graph.replay, rounds) / len(calls)


def kernel_seconds(run: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> tuple[float, str]:
    """Seconds of ``run`` on the arguments of each of ``sets`` in turn, and how it was timed: "graph", or "launched" where the
    kernel cannot be recorded; "host" on a CPU, by its clock. Small arguments are copied until the L2 cache cannot hold all."""
    device = next((tensor.device for arguments in sets for tensor in _tensors(arguments)), None)
    if device is None or device.type != "cuda":
        calls = [partial(run, *arguments) for arguments in sets]
        return min(_clock(call) for call in calls), "host"
    room = BEYOND * torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(tensor.nbytes for arguments in sets for tensor in _tensors(arguments))
    copies = min(MOST_COPIES, -(-room // max(size, 1)))
    every = [*sets, *([_copied(one) for one in arguments] for _ in range(copies - 1) for arguments in sets)]
    calls = [partial(run, *arguments) for arguments in every]
    try:
        return graph_seconds(calls), "graph"
    except RuntimeError:
        torch.cuda.synchronize(device)

    def launched() -> None:
        for call in calls:
            call()

    return _events(launched, ROUNDS) / len(calls), "launched"


def _events(run: Callable[[], object], rounds: int) -> float:
    """Seconds of a run between two events, the median after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return float(median(times))


def _clock(call: Callable[[], object]) -> float:
    call()
    started = perf_counter()
    call()
    return perf_counter() - started


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    parts = [part for one in arguments for part in ((one.data, one.scale) if isinstance(one, QuantizedArray) else (one,))]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _copied(argument: Any) -> Any:
    if isinstance(argument, QuantizedArray):
        return replace(argument, data=argument.data.clone(), scale=argument.scale.clone())
    return argument.clone() if isinstance(argument, torch.Tensor) else argument
