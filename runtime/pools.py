"""The states of many sequences: for each layer an array of slots or of blocks, allocated once.

Who has which slot or block is not known here: an allocator above decides. Slot 0 and block 0 are scratch for padding rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from deltaloom.graph.errors import ConfigError, RequestError, require
from deltaloom.graph.op import Array
from deltaloom.passes.emit import Program, Signature, StateSlot
from deltaloom.passes.kernel import Appended, Backend, Tensor

AXES = ("slots", "blocks")
"""Symbols of the first axis of a pool, which tell its kind."""


class StatePools:
    """Pools for serving programs of one model, or of a model and its MTP head: ``slots`` recurrent states and ``blocks`` of keys
    and values, the scratch ones included. Programs run on ``fixed`` and ``append``.

    ``poison``: new and freed slots and blocks hold NaN, so that whatever is read without having been written shows."""

    def __init__(
        self, programs: Sequence[Program], backends: Mapping[str, Backend], *, slots: int, blocks: int, poison: bool = False
    ) -> None:
        """Raises ``ConfigError`` for programs without serving layout, or of one model with different states."""
        for name, count in (("slots", slots), ("blocks", blocks)):
            require(count >= 2, f"{name} is {count}, expected at least 2: number 0 is scratch", ConfigError)
        self.slots = slots
        self.blocks = blocks
        self.fixed: dict[str, tuple[Tensor, ...]] = {}
        self.append: dict[str, tuple[Appended, ...]] = {}
        self._poison = poison
        self._backends = backends
        self._signatures: dict[str, Signature] = {}
        for program in programs:
            self._add(program)
        if poison:
            self.free_slots(range(slots))
            self.free_blocks(range(blocks))

    def free_slots(self, slots: Sequence[int]) -> None:
        """Note that nobody needs these slots any more: with ``poison`` they hold NaN from now on."""
        self._free("slots", slots)

    def free_blocks(self, blocks: Sequence[int]) -> None:
        """Note that nobody needs these blocks any more: with ``poison`` they hold NaN from now on."""
        self._free("blocks", blocks)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks, for a sequence that goes on from the middle of a block that others use too."""
        self._require_inside("blocks", [*sources, *targets])
        require(len(sources) == len(targets), f"{len(sources)} blocks cannot be copied to {len(targets)}", RequestError)
        for _, slot, pool in self._pools():
            if _axis(slot) == "blocks":
                pool[list(targets)] = pool[list(sources)]

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot over all layers."""
        return self._bytes("slots") // self.slots

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self._bytes("blocks") // self.blocks

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return self._bytes("slots") + self._bytes("blocks")

    def arrays(self) -> dict[str, Array]:
        """A copy of every pool by the full name of its state."""
        return {f"{p}{slot.name}": np.array(self._backends[slot.backend].to_host(pool)) for p, slot, pool in self._pools()}

    def _add(self, program: Program) -> None:
        """Allocate what ``program`` needs and is not there yet."""
        for instance in program.graph.instances():
            prefix, signature = instance.prefix, program.signatures["" if instance.graph is program.graph else instance.graph.name]
            known = self._signatures.get(prefix)
            if known is not None and known.fixed == signature.fixed:
                continue
            growing = [slot.name for slot in (*signature.fixed, *signature.append) if _axis(slot) is None]
            require(
                not growing,
                f"state '{prefix}{growing[0] if growing else ''}' of program '{program.graph.name}' is no pool; compile the "
                "program with the serving layout",
                ConfigError,
            )
            require(
                known is None or not known.fixed or not signature.fixed,
                f"two programs have different pools under '{prefix}'; give them one block size and one order of backends",
                ConfigError,
            )
            if known is None or signature.fixed:
                self._signatures[prefix] = signature
                self.fixed[prefix] = tuple(self._zeros(slot) for slot in signature.fixed)
                self.append[prefix] = ()

    def _zeros(self, slot: StateSlot) -> Tensor:
        shape = slot.type.substitute({"slots": self.slots, "blocks": self.blocks}).static_shape()
        return self._backends[slot.backend].zeros(shape, slot.type.plain_dtype)

    def _pools(self) -> Iterator[tuple[str, StateSlot, Tensor]]:
        for prefix, signature in self._signatures.items():
            for slot, pool in zip(signature.fixed, self.fixed[prefix], strict=True):
                yield prefix, slot, pool

    def _free(self, axis: str, numbers: Sequence[int]) -> None:
        self._require_inside(axis, numbers)
        if self._poison and len(numbers):
            for _, slot, pool in self._pools():
                if _axis(slot) == axis:
                    pool[list(numbers)] = float("nan")

    def _require_inside(self, axis: str, numbers: Sequence[int]) -> None:
        count = self.slots if axis == "slots" else self.blocks
        bad = [number for number in numbers if not 0 <= number < count]
        require(not bad, f"{axis} {bad} are not among the {count} of this pool", RequestError)

    def _bytes(self, axis: str) -> int:
        return sum(int(pool.nbytes) for _, slot, pool in self._pools() if _axis(slot) == axis)


def _axis(slot: StateSlot) -> str | None:
    """What the first axis of a pool counts; None for a state that is no pool."""
    first = str(slot.type.shape[0])
    return first if first in AXES and slot.append_axis is None else None
