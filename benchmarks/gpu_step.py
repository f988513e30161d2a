"""Looks at one decode step of the cuda backend on random weights: its error beside torch's, and its kernels by time.

    python benchmarks/gpu_step.py CONFIG --layers 8 --batch 1,8 --profile --check

The error is that of the logits against torch in float32 on the same weights and states, beside what torch makes in the model's
dtype, on the same inputs. Routing differs where two experts are nearly as likely, which random weights make common; so each is
measured a second time with the experts that the float32 run chose. Times are those of ``deltaloom bench latency``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltaloom.backends.cuda.step import DecodeStep
from deltaloom.backends.torch.random_weights import RandomTensors
from deltaloom.backends.torch.weights import weights_of
from deltaloom.graph.ir import Node
from deltaloom.models.inventory import checkpoint_tensors
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver
from deltaloom.passes.emit import Program
from deltaloom.passes.serving_layout import BLOCK_SIZE, ServingVariant
from deltaloom.runtime.observe import Changed, observe_program
from deltaloom.runtime.pools import StatePools
from deltaloom.runtime.subject import OUTPUTS, Subject, read_subject

ROUTERS = ("router_topk", "gated_router")
SHOWN = 20
"""Kernels that are listed."""

Made = tuple[Subject, Program, dict[str, tuple[Any, ...]]]


def made(arguments: argparse.Namespace, backend: str, dtype: str) -> Made:
    """The decode program of a backend with its weights; the same tensors for every backend and dtype."""
    overrides = {"num_hidden_layers": arguments.layers} if arguments.layers else None
    config = CompileConfig(backends=(backend,), device=arguments.device, dtype=dtype, quantise=arguments.quantise or {})
    subject = read_subject(str(arguments.config), overrides, config)
    variant = ServingVariant("decode", OUTPUTS)
    program = Driver(subject.graphs.main, subject.context, planned=(variant,)).program(variant)
    shapes = {name: stored.shape for name, stored in checkpoint_tensors(subject.graphs.main).items()}
    tensors = RandomTensors(shapes, seed=arguments.seed, device=arguments.device, dtype=getattr(torch, arguments.dtype))
    return subject, program, weights_of(program, tensors.read)


class Routing:
    """The experts that one run chose, which later runs are made to choose too; each weighs them by its own logits."""

    def __init__(self) -> None:
        self.chosen: list[torch.Tensor] = []
        self._next = 0

    def note(self, node: Node, arguments: Sequence[Any], found: tuple[Any, ...]) -> tuple[Any, ...]:
        """Remember what a router chose."""
        if node.op.name in ROUTERS:
            self.chosen.append(found[1])
        return found

    def force(self, node: Node, arguments: Sequence[Any], found: tuple[Any, ...]) -> tuple[Any, ...]:
        """Let a router choose what was noted of the same one, in the order of the layers."""
        if node.op.name not in ROUTERS:
            return found
        ids = self.chosen[self._next % len(self.chosen)]
        self._next += 1
        logits = arguments[0] if node.op.name == "router_topk" else arguments[0][..., :-1]
        weights = torch.softmax(logits.float(), -1).gather(-1, ids.long())
        if node.op.attributes()["normalize"]:
            weights = weights / weights.sum(-1, keepdim=True)
        return (weights.to(found[0].dtype), ids.to(found[1].dtype), *found[2:])


def logits_by(
    found: Made, inputs: dict[str, torch.Tensor], pools: dict[str, tuple[torch.Tensor, ...]], changed: Changed
) -> torch.Tensor:
    """The logits of one step on copies of the states, in the program's dtypes, node by node."""
    subject, program, weights = found
    slots = {prefix: signature.fixed for prefix, signature in program.by_prefix().items()}
    fixed = {
        prefix: tuple(
            pool.to(getattr(torch, slot.type.plain_dtype.long_name), copy=True)
            for pool, slot in zip(group, slots[prefix], strict=True)
        )
        for prefix, group in pools.items()
    }
    given = [inputs[value.name].clone() for value in program.graph.inputs]
    arguments = (*given, weights, fixed, dict.fromkeys(fixed, ()))
    logits: torch.Tensor = observe_program(program, subject.context, arguments, lambda *_: None, changed=changed)[0]
    return logits[0].double()


def check(arguments: argparse.Namespace, ours: Made, inputs: dict[str, torch.Tensor], pools: StatePools) -> dict[str, float]:
    """Print relative errors (RMS) and how often the likeliest token is the same; gives the errors."""
    routing, free = Routing(), lambda node, given, found: found
    exact = logits_by(made(arguments, "torch", "float32"), inputs, pools.fixed, routing.note)
    plain = made(arguments, "torch", arguments.dtype)
    errors = {}
    for how, changed in (("own routing", free), ("float32's routing", routing.force)):
        for name, program in (("torch", plain), ("cuda", ours)):
            logits = logits_by(program, inputs, pools.fixed, changed)
            error = errors[f"{name}, {how}"] = float((logits - exact).norm() / exact.norm())
            same = 100 * float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
            print(
                f"  {name} in {arguments.dtype}, {how}: relative error {error:.2e}, likeliest token the same in {same:.1f} %",
                flush=True,
            )
    return errors


def profile(step: DecodeStep, steps: int = 3) -> None:
    """Print the kernels of a step, those that take longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step.run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda event: -event.device_time_total)
    print(f"  {sum(event.count for event in events) / steps:.0f} kernels")
    for event in events[:SHOWN]:
        total, mean = event.device_time_total / steps, event.device_time_total / event.count
        print(f"  {total:9.1f} us = {event.count // steps:4d} x {mean:8.2f} us  {event.key[:90]}")


@torch.inference_mode()
def main() -> None:
    """Look at a step for each batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--quantise", default="")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="of the weights, states and tokens")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    ours = made(arguments, "cuda", arguments.dtype)
    subject, program, weights = ours
    for batch in map(int, arguments.batch.split(",")):
        needed = -(-(arguments.context + 16) // BLOCK_SIZE)
        backends = {one.name: one for one in subject.context.backends}
        pools = StatePools([program], backends, slots=batch + 1, blocks=batch * needed + 1)
        torch.manual_seed(arguments.seed)
        for pool in (pool for group in pools.fixed.values() for pool in group):
            pool.normal_(std=0.1)
        device = torch.device(arguments.device)
        step = DecodeStep(program, weights, pools.fixed, pools.append, batch=batch, max_blocks=needed, device=device)
        step.record()
        rng = np.random.default_rng((arguments.seed, batch))
        slots = np.arange(1, batch + 1)
        step.set("token_ids", rng.integers(0, subject.shape.vocab_size, batch))
        step.set("block_tables", 1 + rng.permutation(batch * needed))
        for name, values in (("positions", arguments.context), ("context_lengths", arguments.context)):
            step.set(name, np.full(batch, values))
        for name in ("read_slots", "write_slots"):
            step.set(name, slots)
        print(f"{batch} sequences at {arguments.context} tokens", flush=True)
        if arguments.check:
            check(arguments, ours, step.inputs, pools)
        if arguments.profile:
            profile(step)


if __name__ == "__main__":
    main()
