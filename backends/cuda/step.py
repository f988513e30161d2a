"""A decode step that stays on the device: one recorded CUDA graph for a number of sequences, whose end prepares its next run.

The step reads and writes fixed tensors: the last token, position, context length and slots of each sequence, and its block table.
After the program it chooses a token, writes it where the next step reads, and moves positions on. So between two steps the host
does nothing, and it may look at the tokens at any later time.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch

from deltaloom.backends.cuda.choice import advance
from deltaloom.graph.errors import CompileError, require
from deltaloom.graph.op import Array
from deltaloom.ops.sampling_ops import PhiloxUniform, SampleToken
from deltaloom.passes.emit import Program

WARM = 2
"""Runs before a step is recorded: kernels are compiled and chosen then."""

IDLE: dict[str, int] = {"read_slots": -1, "top_k": 0, "top_p": 1, "temperature": 1, "greedy": 1}
"""What the inputs of a row hold that nobody uses; all others hold 0."""


class DecodeStep:
    """``run()`` takes one step of ``batch`` sequences of at most ``max_blocks`` blocks. ``set`` changes what the next step reads.
    Rows that are used write a slot above 0; all others stay where they are."""

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, tuple[Any, ...]],
        fixed: Mapping[str, tuple[Any, ...]],
        append: Mapping[str, tuple[Any, ...]],
        *,
        batch: int,
        max_blocks: int,
        device: torch.device,
        allowed: int | None = None,
        sampled: bool = False,
        history: int = 4,
    ) -> None:
        """``fixed`` and ``append`` are those of the pools; only ids below ``allowed`` are chosen; with ``sampled`` rows may be
        drawn, else the likeliest token is taken; the tokens of the last ``history`` steps are kept. ``CompileError`` for a program
        that is not a serving program of one token a sequence with the output ``last_logits``."""
        names = [value.name for value in program.graph.inputs]
        known = ("token_ids", "positions", "block_tables", "context_lengths", "read_slots", "write_slots")
        found = f"program '{program.graph.name}' takes {', '.join(names)} and gives {', '.join(program.outputs)}"
        fits = set(known).issuperset(names) and "last_logits" in program.outputs
        require(fits, f"{found}; a recorded step is made of the serving program decode with the output last_logits", CompileError)
        self.batch = batch
        self.history = history
        self.inputs: dict[str, torch.Tensor] = {}
        for name in known:
            long = name in ("token_ids", "positions")
            shape = (1, batch) if long else (batch, max_blocks) if name == "block_tables" else (batch,)
            self.inputs[name] = torch.zeros(shape, dtype=torch.int64 if long else torch.int32, device=device)
        if sampled:
            for name in ("seed", "sample_index", "top_k", "greedy"):
                self.inputs[name] = torch.zeros(batch, dtype=torch.int64, device=device)
            for name in ("temperature", "top_p", "min_p"):
                self.inputs[name] = torch.zeros(batch, dtype=torch.float64, device=device)
        self.logits = torch.empty(0)
        self._sampled = sampled
        self._allowed = allowed
        self._device = device
        self._tokens, self._broken = torch.zeros(2, batch, dtype=torch.int64, device=device)
        self.phases: dict[str, float] = {}
        """Seconds of recording: compiling and choosing kernels, then capturing."""
        on_gpu = device.type == "cuda"
        self._kept = torch.zeros(history, batch, dtype=torch.int64, pin_memory=on_gpu)
        self._arrived: list[Any] = [torch.cuda.Event() for _ in range(history)] if on_gpu else []  # type: ignore[no-untyped-call]
        self._count = 0
        self._program, self._weights, self._fixed, self._append = program, weights, fixed, append
        self._place = program.outputs.index("last_logits")
        self.arguments = [self.inputs[name] for name in names]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.reset()

    def reset(self) -> None:
        """Let nobody use any row, and forget which logits were not finite."""
        self._broken.zero_()
        for name, tensor in self.inputs.items():
            tensor.fill_(IDLE.get(name, 0))

    def set(self, name: str, values: Array) -> None:
        """Give the input ``name`` these values, in its shape, before the next step."""
        tensor = self.inputs[name]
        tensor.copy_(torch.from_numpy(np.array(values).reshape(tensor.shape)))

    def free(self, row: int) -> None:
        """Let nobody use ``row`` from the next step on."""
        for name, tensor in self.inputs.items():
            (tensor[0] if name in ("token_ids", "positions") else tensor)[row] = IDLE.get(name, 0)

    def record(self) -> None:
        """Record the step, while nobody uses any row. On a CPU, under Triton's interpreter, steps are not recorded.
        ``CompileError`` for a program with kernels that cannot be."""
        if self._device.type != "cuda":
            return
        started = perf_counter()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._step()
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        compiled = perf_counter()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except RuntimeError as error:
            raise CompileError(f"{self._found()} ({str(error).splitlines()[0]})") from error
        self._graph = graph
        self.reset()
        torch.cuda.synchronize(self._device)
        self.phases = {"kernels": compiled - started, "capture": perf_counter() - compiled}

    def run(self) -> int:
        """Start one step and give its number; its tokens are on their way to the host when this returns."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()
        place = self._count % self.history
        self._kept[place].copy_(self._tokens, non_blocking=True)
        if self._arrived:
            self._arrived[place].record()
        self._count += 1
        return self._count - 1

    def tokens(self, number: int) -> list[int]:
        """The tokens of step ``number``, one of the last ``history``, waited for; -1 where logits were not finite."""
        place = number % self.history
        if self._arrived:
            self._arrived[place].synchronize()
        found: list[int] = self._kept[place].tolist()
        return found

    def broken(self) -> int:
        """How often the logits of a row in use were not finite since ``reset``, counted on the device; waits for all steps."""
        return int(self._broken.sum())

    def seconds(self, steps: int) -> list[float]:
        """The seconds of each of ``steps`` steps: on the device, between two events, or on a CPU as its clock has it."""
        if self._graph is None:
            times = []
            for _ in range(steps):
                started = perf_counter()
                self.run()
                times.append(perf_counter() - started)
            return times
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]  # type: ignore[no-untyped-call]
        events[0].record()
        for event in events[1:]:
            self.run()
            event.record()
        torch.cuda.synchronize(self._device)
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(events)]

    def _found(self) -> str:
        kernels = {node.placement.kernel for one in self._program.graph.instances() for node in one.graph.nodes if node.placement}
        others = ", ".join(sorted(name for name in kernels if ".torch_" in name or name.endswith(".portable")))
        return (
            f"the decode step cannot be recorded as a CUDA graph; kernels that are not the cuda backend's own: {others or 'none'}"
        )

    @torch.inference_mode()
    def _step(self) -> None:
        results = self._program.run(*self.arguments, self._weights, dict(self._fixed), dict(self._append))
        self.logits = results[self._place][0]
        advance(self.logits, self._allowed, self._drawn() if self._sampled else None, self._tokens, self._broken, self.inputs)

    def _drawn(self) -> torch.Tensor:
        """The tokens of all rows where some are drawn, for the position after that of the step."""
        given, logits = self.inputs, self.logits[:, : self._allowed]
        uniform = PhiloxUniform().torch(torch, given["seed"], given["sample_index"], given["positions"][0] + 1)
        filters = (given[name] for name in ("temperature", "top_k", "top_p", "min_p"))
        drawn = SampleToken().torch(torch, torch.nan_to_num(logits), uniform, *filters)
        found: torch.Tensor = torch.where(given["greedy"] > 0, torch.argmax(logits, dim=-1), drawn.to(torch.int64))
        return found
