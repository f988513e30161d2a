"""Times kernels of the cuda backend at the 80B's geometry by graph replays over inputs larger than the L2 cache."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch.nn.functional import linear as torch_linear

from deltaloom.backends.cuda import delta_net, linear, moe
from deltaloom.backends.cuda.timing import graph_seconds
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, f8_e4m3, f32
from deltaloom.ops.fused_moe import SharedMoE
from deltaloom.ops.linear import Linear
from deltaloom.ops.packed_delta_net import PackedGatedDeltaNet

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BANDWIDTH = 4.58e12
FORM = QuantType(f8_e4m3, (128, 128), f32)


def micros(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds a call, of a graph of all of them in turn; on a CPU each only runs."""
    if DEVICE == "cpu":
        calls[0]()
        return 0.0
    return graph_seconds(calls) * 1e6


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16).mul_(scale)


def weight(*shape: int, fp8: bool) -> torch.Tensor | QuantizedArray:
    made = random(*shape, scale=shape[-1] ** -0.5)
    if not fp8:
        return made
    scale = torch.full(FORM.scale_shape(shape), 0.01, device=DEVICE)
    return QuantizedArray((made * 100).to(torch.float8_e4m3fn), scale, FORM, shape)


def patched(module: object, values: Mapping[str, object], run: Callable[[], float]) -> float:
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        return run()
    except Exception as error:  # a variant that does not fit the device
        print(f"   {type(error).__name__} {str(error)[:80]}")
        return float("nan")
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def show(name: str, floor: float, time: float, note: object = "") -> None:
    print(f"{name:34s} {time:8.1f} us  floor {floor:7.1f}  {100 * floor / time if time else 0:4.0f}%  {note}", flush=True)


def experts(tokens: int, fp8: bool, variants: Sequence[Mapping[str, object]], scale: int) -> None:
    count, width, inner, k, copies = 512 // scale, 2048 // scale, 512 // scale, 10, 2 if tokens > 8 else 4
    sets = []
    for _ in range(copies):
        sets.append(
            [
                weight(*shape, fp8=fp8)
                for shape in ((count, 2 * inner, width), (count, width, inner), (2 * inner, width), (width, inner))
            ]
        )
    ids = [torch.rand(tokens, count, device=DEVICE).topk(k).indices.int()[None] for _ in range(copies)]
    x, shares, gate = (
        random(1, tokens, width),
        torch.full((1, tokens, k), 0.1, device=DEVICE, dtype=torch.bfloat16),
        random(1, tokens, 1),
    )
    hit = statistics.mean(len(torch.unique(i)) for i in ids) + 1
    floor = hit * 3 * width * inner * (1 if fp8 else 2) / BANDWIDTH * 1e6
    calls = [partial(moe.shared_moe, SharedMoE(), x, shares, i, gate, *s) for s, i in zip(sets, ids)]
    for values in variants:
        show(f"shared_moe {'fp8' if fp8 else 'bf16'} tokens={tokens}", floor, patched(moe, values, lambda: micros(calls)), values)


def products(tokens: int, out: int, width: int, fp8: bool, variants: Sequence[Mapping[str, object]]) -> None:
    copies = max(3, 150_000_000 // (out * width * 2))
    sets = [weight(out, width, fp8=fp8) for _ in range(copies)]
    x = random(1, tokens, width)
    floor = out * width * (1 if fp8 else 2) / BANDWIDTH * 1e6
    name = f"linear {'fp8' if fp8 else 'bf16'} {tokens}x{width}->{out}"
    if not fp8:
        show(name, floor, micros([partial(torch_linear, x, w) for w in sets if isinstance(w, torch.Tensor)]), "cuBLAS")
    for values in variants:
        show(name, floor, patched(linear, values, lambda: micros([partial(linear.linear, Linear(), x, w) for w in sets])), values)


def recurrence(tokens: int, variants: Sequence[Mapping[str, object]]) -> None:
    op = PackedGatedDeltaNet(16, 32, 128, 128, scale=128**-0.5, eps=1e-6)
    copies = max(2, 64 // tokens)
    delta = torch.randn(copies * tokens + 1, 32, 128, 128, device=DEVICE)
    conv = random(copies * tokens + 1, 8192, 3)
    x, taps, rate, bias, norm = random(1, tokens, 12352), random(8192, 1, 4), random(32), random(32), random(128)
    slots = [torch.arange(1 + c * tokens, 1 + (c + 1) * tokens, device=DEVICE, dtype=torch.int32) for c in range(copies)]
    calls = [partial(delta_net.packed_gated_delta_net, op, x, taps, rate, bias, norm, conv, delta, s, s) for s in slots]
    floor = tokens * 32 * 128 * 128 * 8 / BANDWIDTH * 1e6
    for values in variants:
        show(f"packed_gated_delta_net tokens={tokens}", floor, patched(delta_net, values, lambda: micros(calls)), values)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("which", nargs="*", default=["moe", "delta", "linear"])
    which = parser.parse_args().which
    if "delta" in which:
        for tokens in (1, 8, 64, 256):
            recurrence(tokens, [{}])
    if "linear" in which:
        for out, width in ((12352, 2048), (2048, 4096), (513, 2048)):
            products(1, out, width, False, [{}])
            products(8, out, width, False, [{}, {"SMALL": 1 << 40}])
        for tokens in (1, 8):
            products(tokens, 12288, 2048, True, [{}])
            products(tokens, 2048, 4096, True, [{}])
    if "moe" in which:
        for tokens in (1, 8, 64):
            for fp8 in (False, True):
                experts(tokens, fp8, [{}], 1)


if __name__ == "__main__":
    main()
