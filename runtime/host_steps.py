"""Decode steps of backends that record none, for measurements: the host chooses the tokens and prepares the next step."""

from __future__ import annotations

import resource
import sys
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np

from deltaloom.graph.errors import CompileError
from deltaloom.graph.op import Array
from deltaloom.passes.emit import Program
from deltaloom.passes.kernel import Backend
from deltaloom.runtime.resident import anonymous
from deltaloom.runtime.weights import WeightStore

HISTORY = 4
"""Steps whose tokens are kept."""


class HostSteps:
    """What ``RecordsSteps`` and ``DrawsWeights`` ask for, of any one backend."""

    def __init__(self, backend: Backend) -> None:
        """``CompileError`` without torch, which draws weights."""
        try:
            from deltaloom.backends.torch.host import torch_dtype
            from deltaloom.backends.torch.random_weights import RandomTensors
        except ImportError as error:
            raise CompileError(f"torch draws random weights and cannot be imported ({error}); install deltaloom[torch]") from error
        self._tensors, self._torch_dtype = RandomTensors, torch_dtype
        self.name = backend.name
        self._backend = backend
        self._rng = np.random.default_rng(0)

    def random_weights(self, program: Program, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, tuple[Any, ...]]:
        """Weights of ``program`` of drawn checkpoint tensors."""
        dtype = next(value.type.plain_dtype for name, value in program.graph.outputs if name == program.outputs[0])
        drawn = self._tensors(shapes, seed=seed, device="cpu", dtype=self._torch_dtype(dtype))
        store = WeightStore(_Drawn(drawn), {self.name: self._backend})
        owner = program.graph.name
        return {
            one.prefix: tuple(
                store.get(owner, one.prefix, one.graph, slot) for slot in program.signatures[program.function(one.graph)].weights
            )
            for one in program.graph.instances()
        }

    def draw(self, tensor: Any, scale: float) -> None:
        """Fill a pool with normal numbers."""
        numbers = self._rng.standard_normal(tuple(tensor.shape), np.float32) * np.float32(scale)
        tensor[...] = self._backend.from_host(numbers)

    def allocated(self) -> int:
        """Anonymous memory of the process."""
        return anonymous()

    def peak(self) -> int:
        """The most memory that the process ever had resident."""
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    def transformers_peer(self, *_: Any) -> Any:
        """``CompileError``: transformers is measured on the device that draws the weights."""
        raise CompileError(
            f"--against hf measures beside recorded steps, and the backend {self.name} records none; use --backend cuda"
        )

    def decode_step(
        self,
        program: Program,
        weights: Mapping[str, tuple[Any, ...]],
        fixed: Mapping[str, tuple[Any, ...]],
        append: Mapping[str, tuple[Any, ...]],
        *,
        batch: int,
        max_blocks: int,
        allowed: int | None,
        sampled: bool,
    ) -> HostStep:
        """A step of ``batch`` rows that take the likeliest token."""
        assert not sampled
        return HostStep(self._backend, program, weights, fixed, append, batch=batch, max_blocks=max_blocks, allowed=allowed)


class HostStep:
    """A decode step of ``batch`` sequences of at most ``max_blocks`` blocks; the calls are those of a recorded one."""

    def __init__(
        self,
        backend: Backend,
        program: Program,
        weights: Mapping[str, tuple[Any, ...]],
        fixed: Mapping[str, tuple[Any, ...]],
        append: Mapping[str, tuple[Any, ...]],
        *,
        batch: int,
        max_blocks: int,
        allowed: int | None,
    ) -> None:
        self.phases: dict[str, float] = {}
        self.inputs: dict[str, Array] = {
            name: np.zeros((1, batch) if name in ("token_ids", "positions") else (batch,), np.int64)
            for name in ("token_ids", "positions", "context_lengths", "read_slots", "write_slots")
        }
        self.inputs["block_tables"] = np.zeros((batch, max_blocks), np.int64)
        self._backend, self._program, self._weights, self._allowed = backend, program, weights, allowed
        self._fixed, self._append = dict(fixed), dict(append)
        self._place = program.outputs.index("last_logits")
        buffers = {prefix: (None,) * len(one.buffers) for prefix, one in program.by_prefix().items()}
        self._buffers = [buffers] if program.memory is not None else []
        self._kept: deque[list[int]] = deque(maxlen=HISTORY)
        self._count = 0
        self._broken = 0

    @property
    def arguments(self) -> list[Any]:
        """What the program gets before weights and states."""
        given = ((value, self.inputs[value.name]) for value in self._program.graph.inputs)
        return [self._backend.from_host(array.astype(value.type.plain_dtype.numpy)) for value, array in given]

    def set(self, name: str, values: Array) -> None:
        """Give an input values before the next step."""
        self.inputs[name] = np.array(values, np.int64).reshape(self.inputs[name].shape)

    def free(self, row: int) -> None:
        """Let nobody use a row from the next step on."""
        self.inputs["write_slots"][row], self.inputs["read_slots"][row] = 0, -1

    def run(self) -> int:
        """Take a step and give its number."""
        with np.errstate(over="ignore"):
            results = self._program.run(*self.arguments, self._weights, self._fixed, dict(self._append), *self._buffers)
        logits = np.asarray(self._backend.to_host(results[self._place]))[0].astype(np.float32)
        finite, used = np.isfinite(logits).all(axis=-1), self.inputs["write_slots"] > 0
        self._broken += int((used & ~finite).sum())
        best = np.where(np.isfinite(logits), logits, -np.inf)[:, : self._allowed].argmax(axis=-1)
        self._kept.append(np.where(finite, best, -1).tolist())
        self._count += 1
        self.inputs["token_ids"][0] = best
        self.inputs["positions"][0] += used
        self.inputs["context_lengths"] += used
        self.inputs["read_slots"] = np.where(used, self.inputs["write_slots"], -1)
        return self._count - 1

    def tokens(self, number: int) -> list[int]:
        """The tokens of one of the last steps; -1 for a row whose logits were not finite."""
        return self._kept[number - self._count]

    def broken(self) -> int:
        """How often the logits of a row in use were not finite."""
        return self._broken

    def seconds(self, steps: int) -> list[float]:
        """The seconds of each of ``steps`` steps, the choice of tokens included."""
        times = []
        for _ in range(steps):
            started = perf_counter()
            self.run()
            times.append(perf_counter() - started)
        return times


class _Drawn:
    """Drawn tensors as a source of weights."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Array:
        from deltaloom.backends.torch.host import to_array

        return to_array(self._tensors.read(name))
