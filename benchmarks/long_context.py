"""Prefill of long prompts: time of each kind of op by prompt length, and the memory it takes beyond the weights.

    python benchmarks/long_context.py [CHECKPOINT] [--backend numpy] [--lengths 2048,4096,8192,16384,32768] [--json FILE]

One prompt a length, in chunks. Time of the recurrent layers should grow linearly, of attention quadratically. Memory is the
peak of RssAnon (Linux) over its value before the prompt: state, buffers and scratch together. Prints a Markdown table.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from protocol import lengths

import deltaloom
import deltaloom.runtime.compile
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.kernel import Backend, Kernel
from deltaloom.runtime.resident import Peak

GROUPS = {
    "delta-net": ("gated_delta_net", "gated_delta_rule", "causal_conv1d", "delta_gates", "l2_norm", "gated_rms_norm"),
    "attention": ("gated_attention", "attention", "qkv_norm_rope", "rope", "rotary_embedding"),
    "experts": ("shared_moe", "moe_experts", "gated_router", "router_topk"),
    "linear": ("linear",),
}


class Timed:
    """A backend whose kernels add their time to ``seconds`` by op."""

    def __init__(self, inner: Backend, seconds: dict[str, float]) -> None:
        self._inner = inner
        self._kernels = [replace(k, run=_timed(k, seconds), title=k.name.partition(".")[2]) for k in inner.kernels()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def kernels(self) -> Sequence[Kernel]:
        return self._kernels


def _timed(kernel: Kernel, seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*arguments: Any, **buffers: Any) -> Any:
        start = time.perf_counter()
        result = kernel.run(*arguments, **buffers)
        seconds[kernel.op] += time.perf_counter() - start
        return result

    return run


def measure(arguments: argparse.Namespace) -> list[dict[str, float]]:
    seconds: dict[str, float] = defaultdict(float)
    place = deltaloom.runtime.compile
    plain = vars(place)["make_backend"]
    vars(place)["make_backend"] = lambda *args, **options: Timed(plain(*args, **options), seconds)
    config = CompileConfig(backends=(arguments.backend,), threads=arguments.threads)
    model = deltaloom.load(arguments.checkpoint, config=config, max_model_len=max(arguments.lengths))
    generator = np.random.default_rng(1)
    model.forward(generator.integers(2, model.config.vocab_size, (1, 600)), logits="last")
    rows = []
    for length in arguments.lengths:
        prompt = generator.integers(2, model.config.vocab_size, (1, length))
        seconds.clear()
        with Peak() as peak:
            start = time.perf_counter()
            model.forward(prompt, logits="last")
            total = time.perf_counter() - start
        row = {"tokens": length, "seconds": total, "extra_mb": (peak.most - peak.start) / 1e6}
        rows.append(row | {group: sum(seconds[op] for op in names) for group, names in GROUPS.items()})
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """Seconds by group with µs a token behind them, and memory."""
    lines = ["| tokens | total s | " + " | ".join(f"{g} s (µs a token)" for g in GROUPS) + " | extra MB |"]
    lines.append("| --- |" * 1 + " --- |" * (len(GROUPS) + 2))
    for row in rows:
        cells = [f"{row[g]:.2f} ({1e6 * row[g] / row['tokens']:.0f})" for g in GROUPS]
        lines.append(f"| {row['tokens']:.0f} | {row['seconds']:.2f} | " + " | ".join(cells) + f" | {row['extra_mb']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", nargs="?", default="tiny-next")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--lengths", type=lengths, default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = measure(arguments)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
