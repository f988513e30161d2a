"""Times recorded decode steps of the cuda backend on random weights of any config: ``gpu_decode.py CONFIG --layers 8 --batch 1,8``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from deltaloom.backends.cuda.step import DecodeStep
from deltaloom.backends.torch.random_weights import RandomTensors
from deltaloom.backends.torch.weights import weights_of
from deltaloom.models.build import build_graph
from deltaloom.models.config import read_config
from deltaloom.models.inventory import checkpoint_tensors
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver
from deltaloom.passes.serving_layout import BLOCK_SIZE, ServingVariant
from deltaloom.runtime.compile import context
from deltaloom.runtime.explanation import kernel_rows
from deltaloom.runtime.pools import StatePools


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--quant", default="bf16")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    began = time.perf_counter()
    shape = read_config(arguments.config, {"num_hidden_layers": arguments.layers} if arguments.layers else None)
    quantise = {"*": "fp8"} if arguments.quant == "fp8" else {}
    config = CompileConfig(backends=("cuda",), device=arguments.device, dtype=arguments.dtype, quantise=quantise)
    ctx = context(config, shape)
    graph = build_graph(shape, dtype=ctx.backends[0].compute_dtype(arguments.dtype)).main
    variant = ServingVariant("decode", ("last_logits",))
    program = Driver(graph, ctx, planned=(variant,)).program(variant)
    kernels = {f"{row.op}: {row.kernel}" for row in kernel_rows(program)}
    print("\n".join(sorted(kernels)), flush=True)
    print(f"compiled in {time.perf_counter() - began:.1f} s", flush=True)
    shapes = {name: stored.shape for name, stored in checkpoint_tensors(graph).items()}
    tensors = RandomTensors(shapes, seed=1, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    weights = weights_of(program, tensors.read, {})
    if arguments.device == "cuda":
        torch.cuda.synchronize()
        print(f"weights after {time.perf_counter() - began:.1f} s, {torch.cuda.memory_allocated() / 2**30:.1f} GiB", flush=True)
    for batch in map(int, arguments.batch.split(",")):
        needed = -(-(arguments.context + arguments.steps + 8) // BLOCK_SIZE)
        pools = StatePools([program], {b.name: b for b in ctx.backends}, slots=batch + 1, blocks=batch * needed + 1)
        for pool in (pool for group in pools.fixed.values() for pool in group):
            pool.normal_(std=0.1)
        step = DecodeStep(
            program, weights, pools.fixed, pools.append, batch=batch, max_blocks=needed, device=torch.device(arguments.device)
        )
        started = time.perf_counter()
        if arguments.device == "cuda":
            step.record()
        rng = np.random.default_rng(batch)
        order = 1 + rng.permutation(batch * needed).reshape(batch, needed)
        slots = torch.arange(1, batch + 1, dtype=torch.int32, device=arguments.device)

        def fill() -> None:
            step.inputs["token_ids"].copy_(torch.from_numpy(rng.integers(0, shape.vocab_size, (1, batch))))
            step.inputs["positions"].fill_(arguments.context)
            step.inputs["context_lengths"].fill_(arguments.context)
            step.inputs["block_tables"].copy_(torch.from_numpy(order))
            step.inputs["read_slots"].copy_(slots)
            step.inputs["write_slots"].copy_(slots)

        if arguments.check:
            fill()
            check(arguments, shape, quantise, pools, step)
        fill()
        if arguments.device != "cuda":
            print([step.tokens(step.run()) for _ in range(3)], step.inputs["positions"].tolist())
            continue
        made = time.perf_counter() - started
        seconds(step, 5)
        times = seconds(step, arguments.steps)
        row = {
            "batch": batch,
            "context": arguments.context,
            "quant": arguments.quant,
            "layers": shape.num_hidden_layers,
            "step_us": statistics.median(times) * 1e6,
            "step_us_min": min(times) * 1e6,
            "us_per_layer": statistics.median(times) * 1e6 / shape.num_hidden_layers,
            "record_s": made,
            "finite": bool(step.logits.isfinite().all()),
            "logit_std": float(step.logits.float().std()),
        }
        print(json.dumps(row), flush=True)
        if arguments.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                for _ in range(3):
                    step.run()
                torch.cuda.synchronize()
            events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
            total = sum(e.count for e in events)
            print(f"  kernels a step {total / 3:.0f}")
            for event in events[:22]:
                mean = event.device_time_total / event.count
                print(f"  {event.device_time_total / 3:9.1f} us a step, {event.count // 3:4d} x {mean:8.2f} us  {event.key[:90]}")
        del step, pools
        torch.cuda.empty_cache()


def seconds(step: DecodeStep, steps: int) -> list[float]:
    """The time of each of ``steps`` steps on the device."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(steps)]
    for start, stop in events:
        start.record()
        step.run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1000 for start, stop in events]


def check(arguments, shape, quantise, pools, step) -> None:
    """One step's logits against torch in float32 on the same weights and states, beside what torch in the model's dtype gives."""
    given = {name: tensor.clone() for name, tensor in step.inputs.items()}
    kept = {prefix: tuple(pool.clone() for pool in group) for prefix, group in pools.fixed.items()}
    found = {}
    for dtype in ("float32", arguments.dtype):
        config = CompileConfig(backends=("torch",), device=arguments.device, dtype=dtype, quantise=quantise)
        ctx = context(config, shape)
        graph = build_graph(shape, dtype=ctx.backends[0].compute_dtype(dtype)).main
        variant = ServingVariant("decode", ("last_logits",))
        program = Driver(graph, ctx, planned=(variant,)).program(variant)
        shapes = {name: stored.shape for name, stored in checkpoint_tensors(graph).items()}
        tensors = RandomTensors(shapes, seed=1, device=arguments.device, dtype=getattr(torch, arguments.dtype))
        weights = weights_of(program, tensors.read, {})
        slots = {prefix: signature.fixed for prefix, signature in program.by_prefix().items()}
        fixed = {
            prefix: tuple(
                pool.to(getattr(torch, slot.type.plain_dtype.long_name), copy=True) for pool, slot in zip(group, slots[prefix])
            )
            for prefix, group in kept.items()
        }
        inputs = [given[value.name] for value in program.graph.inputs]
        (found[dtype],) = program.run(*inputs, weights, fixed, {prefix: () for prefix in fixed})
        del weights, fixed
    step.run()
    exact = found["float32"][0].double()
    for name, logits in (("torch", found[arguments.dtype][0]), ("cuda", step.logits)):
        error = ((logits.double() - exact).norm() / exact.norm()).item()
        top = (logits.argmax(-1) == exact.argmax(-1)).float().mean().item()
        print(f"  check {name} {arguments.dtype}: relative RMS {error:.3e}, top-1 agreement {top:.3f}", flush=True)
    for prefix, group in pools.fixed.items():
        for pool, before in zip(group, kept[prefix]):
            pool.copy_(before)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
