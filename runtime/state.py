"""State between calls: fixed arrays, growing buffers, the padding mask and the number of tokens seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType, TensorType
from deltaloom.passes.emit import Signature, StateSlot
from deltaloom.passes.kernel import Appended, Backend, Tensor

FIRST_CAPACITY = 64
"""Entries that an append buffer has room for at first; it doubles when full."""


def room(capacity: int, needed: int) -> int:
    """Entries that a buffer with room for ``capacity`` has room for once it must hold ``needed``."""
    return capacity if capacity >= needed else max(FIRST_CAPACITY, needed, 2 * capacity)


def prompt_room(tokens: int, chunk: int) -> int:
    """Entries that buffers are given room for before a prompt that is run in steps of ``chunk`` tokens: of a longer one for all of
    it and some tokens to come, otherwise for the step."""
    return tokens + FIRST_CAPACITY if tokens > chunk else tokens


StateLayout = dict[str, tuple[tuple[StateSlot, ...], tuple[StateSlot, ...]]]
"""Fixed and append slots by prefix: what a state must have for a model to use it."""


def state_layout(signatures: Mapping[str, Signature]) -> StateLayout:
    """The layout of states for programs with these signatures."""
    return {prefix: (signature.fixed, signature.append) for prefix, signature in signatures.items()}


def require_state(state: object) -> None:
    """Raise ``RequestError`` for anything but a state."""
    require(
        isinstance(state, ModelState),
        f"state is of type {type(state).__name__}, expected what new_state() gives",
        RequestError,
    )


@dataclass
class Buffer:
    """An append state's storage: ``capacity`` entries along the append axis."""

    slot: StateSlot
    data: Tensor
    capacity: int


class ModelState:
    """The state of a batch of sequences that all have seen ``length`` tokens (padding on the left included).

    ``valid`` is None while no row has padding, else bool ``[batch, length]``. Made by ``Model.new_state``.
    """

    def __init__(self, batch: int, signatures: Mapping[str, Signature], backends: Mapping[str, Backend]) -> None:
        whole = isinstance(batch, Integral) and not isinstance(batch, bool)
        require(whole and batch >= 1, f"a state needs a whole number of sequences, at least 1; got batch={batch!r}", RequestError)
        batch = int(batch)
        self.batch = batch
        self.length = 0
        self.valid: Array | None = None
        self.broken = ""
        self._backends = backends
        self.fixed: dict[str, tuple[Tensor, ...]] = {}
        self.buffers: dict[str, list[Buffer]] = {}
        for prefix, signature in signatures.items():
            self.fixed[prefix] = tuple(backends[s.backend].zeros(self._shape(s.type, 0), _dtype(s)) for s in signature.fixed)
            self.buffers[prefix] = [self._buffer(slot, 0) for slot in signature.append]
        self._slots = {prefix: signature.fixed for prefix, signature in signatures.items()}
        self.layout: StateLayout = state_layout(signatures)

    def append(self, new: int) -> dict[str, tuple[Appended, ...]]:
        """The append states with room for ``new`` more entries."""
        needed = self.length + new
        lengths = {name: backend.length(self.length) for name, backend in self._backends.items()}
        for buffers in self.buffers.values():
            for index, buffer in enumerate(buffers):
                if buffer.capacity < needed:
                    buffers[index] = self._grown(buffer, needed)
        return {
            prefix: tuple(Appended(b.data, lengths[b.slot.backend]) for b in buffers) for prefix, buffers in self.buffers.items()
        }

    def arrays(self) -> dict[str, Array]:
        """Every state by full name as a NumPy copy; append states cut to ``length``."""
        found: dict[str, Array] = {}
        for prefix, slots in self._slots.items():
            for slot, tensor in zip(slots, self.fixed[prefix], strict=True):
                found[prefix + slot.name] = np.array(self._backends[slot.backend].to_host(tensor))
            for buffer in self.buffers[prefix]:
                filled = _cut(buffer.data, buffer.slot, 0, self.length)
                found[prefix + buffer.slot.name] = np.array(self._backends[buffer.slot.backend].to_host(filled))
        return found

    def fixed_names(self, prefix: str) -> list[str]:
        """The names of the states in ``fixed[prefix]``, relative to the prefix."""
        return [slot.name for slot in self._slots[prefix]]

    def select(self, rows: Sequence[int]) -> ModelState:
        """A new state with these rows of the batch, in this order; a row may be taken more than once."""
        bad = [row for row in rows if not isinstance(row, Integral) or not 0 <= row < self.batch]
        require(len(rows) > 0 and not bad, f"rows {list(rows)} do not fit a state of {self.batch} sequences", RequestError)
        other = object.__new__(ModelState)
        other.__dict__.update(self.__dict__)
        other.batch = len(rows)
        other.valid = None if self.valid is None else self.valid[list(rows)]
        other.fixed = {p: tuple(t[list(rows)] for t in tensors) for p, tensors in self.fixed.items()}
        other.buffers = {
            p: [Buffer(b.slot, b.data[list(rows)], b.capacity) for b in buffers] for p, buffers in self.buffers.items()
        }
        return other

    def copy(self) -> ModelState:
        """An independent snapshot."""
        return self.select(range(self.batch))

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens. Raises ``RequestError`` for recurrent states, which cannot be cut."""
        fixed = [prefix + slot.name for prefix, slots in self._slots.items() for slot in slots]
        require(
            not fixed,
            f"state '{fixed[0] if fixed else ''}' is recurrent and cannot be cut to {length} tokens; keep a copy() instead",
            RequestError,
        )
        require(0 <= length <= self.length, f"cannot cut a state of {self.length} tokens to {length}", RequestError)
        self.length = length
        self.valid = None if self.valid is None else self.valid[:, :length]

    @property
    def capacity(self) -> int:
        """Tokens that the buffers of append states have room for; 0 without any."""
        return max((b.capacity for buffers in self.buffers.values() for b in buffers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        fixed = sum(t.nbytes for tensors in self.fixed.values() for t in tensors)
        return int(fixed + sum(b.data.nbytes for buffers in self.buffers.values() for b in buffers))

    def _shape(self, type_: TensorType, past: int) -> tuple[int, ...]:
        return type_.substitute({"batch": self.batch, "past": past}).static_shape()

    def _buffer(self, slot: StateSlot, capacity: int) -> Buffer:
        return Buffer(slot, self._backends[slot.backend].zeros(self._shape(slot.type, capacity), _dtype(slot)), capacity)

    def _grown(self, buffer: Buffer, needed: int) -> Buffer:
        new = self._buffer(buffer.slot, room(buffer.capacity, needed))
        if self.length:
            _cut(new.data, buffer.slot, 0, self.length)[...] = _cut(buffer.data, buffer.slot, 0, self.length)
        return new


def _dtype(slot: StateSlot) -> DType:
    return slot.type.plain_dtype


def _cut(data: Tensor, slot: StateSlot, start: int, stop: int) -> Tensor:
    assert slot.append_axis is not None
    return data[(slice(None),) * slot.append_axis + (slice(start, stop),)]
