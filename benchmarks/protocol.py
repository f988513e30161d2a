"""What every engine's benchmark shares, so that figures are comparable: flags, timing and the names of the results.

`prefill_N` is tokens per second for a prompt of N tokens, `decode_at_N` tokens per second after N tokens; each is the
median of the runs after a warm-up, with the best run as `…_best` and the processor time a token as `…_cpu_ms`: on a
shared machine the median is what a user sees and the best is nearer the limit.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DECODE_WARM_UP = 3


@dataclass(frozen=True)
class Runs:
    """Seconds of each run: on the wall, and of the processor over all threads."""

    wall: list[float]
    processor: list[float]

    def figures(self, key: str, tokens: int) -> dict[str, object]:
        """Tokens per second (median and best) and processor milliseconds a token, for runs of ``tokens`` tokens."""
        return {
            key: round(tokens / statistics.median(self.wall), 2),
            f"{key}_best": round(tokens / min(self.wall), 2),
            f"{key}_cpu_ms": round(1e3 * statistics.median(self.processor) / tokens, 3),
        }


def timed(run: Callable[[], None], *, repeats: int, warm_up: int) -> Runs:
    """Time ``repeats`` runs after ``warm_up`` ones that do not count."""
    runs = Runs([], [])
    for number in range(warm_up + repeats):
        wall, processor = time.perf_counter(), time.process_time()
        run()
        if number >= warm_up:
            runs.wall.append(time.perf_counter() - wall)
            runs.processor.append(time.process_time() - processor)
    return runs


def lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def flags(description: str) -> argparse.ArgumentParser:
    """The flags that every engine takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=lengths, default=[128, 512], help="prompt lengths, with commas")
    parser.add_argument("--contexts", type=lengths, default=[128], help="lengths after which to decode, with commas")
    parser.add_argument("--tokens", type=int, default=32, help="how many tokens to decode")
    parser.add_argument("--repeats", type=int, default=3, help="how many prompts to time")
    return parser


def limit_threads(threads: int) -> None:
    """Hold every numeric library to ``threads``; call it before the first of them is imported."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
        os.environ[variable] = str(threads)


def blas() -> str:
    """The BLAS kernels that NumPy runs, where threadpoolctl is installed to tell: they move figures by more than noise."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "unknown (install threadpoolctl)"
    pools = [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]
    return ", ".join(f"{pool['internal_api']} {pool.get('version')} {pool.get('architecture')}" for pool in pools)


def circumstances(arguments: argparse.Namespace, engine: str, load_seconds: float) -> dict[str, object]:
    """What a figure cannot be read without."""
    return {
        "engine": engine,
        "checkpoint": arguments.checkpoint.name,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "blas": blas(),
        "load_s": round(load_seconds, 2),
        "machine_load": round(os.getloadavg()[0], 2),
    }


def peak_mb() -> int:
    """The most memory that this process has had resident so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)
