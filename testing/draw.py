"""What ``cases`` rules draw from: Hypothesis gives sizes and choices, which it can shrink, a seeded generator the numbers."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from hypothesis import strategies as st

from deltaloom.graph.op import Array

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 15, 16, 17, 31, 33, 63, 64, 65, 70)
"""1, primes, and one above and below the tiles that kernels like."""
LARGE = 16.0


class HypothesisData(Protocol):
    """What ``st.data()`` gives."""

    def draw(self, strategy: st.SearchStrategy[Any], label: Any = None) -> Any:
        """One value of ``strategy``."""


class _Numbers:
    """The half that both draws share: arrays of numbers from one generator."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def choice(self, *options: Any) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        numbers: Array = self._rng.standard_normal(shape) * scale
        kind = self.choice("plain", "plain", "plain", "zeros", "equal rows", "large")
        if kind == "zeros":
            numbers = numbers * (self._rng.random(shape) < 0.5)
        if kind == "equal rows" and numbers.ndim:
            numbers = np.broadcast_to(numbers[:1], shape).copy()
        return numbers * LARGE if kind == "large" else numbers

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        return self._rng.uniform(low, high, shape)

    def integers(self, low: int, high: int, *shape: int) -> Array:
        return self._rng.integers(low, high + 1, shape)


class CaseDraw(_Numbers):
    """Draws for a test: ``CaseDraw(data)`` with ``data`` of ``st.data()``."""

    def __init__(self, data: HypothesisData) -> None:
        super().__init__(data.draw(st.integers(0, 2**32 - 1), label="seed"))
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return int(self._data.draw(st.integers(low, high)))

    def size(self, high: int = 9) -> int:
        return int(self._data.draw(st.sampled_from([size for size in SIZES if size <= high])))

    def choice(self, *options: Any) -> Any:
        return options[self._data.draw(st.integers(0, len(options) - 1))]


class SeededDraw(_Numbers):
    """Draws without Hypothesis: everything follows from the seed. ``sizes`` are those that ``size`` chooses from."""

    def __init__(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        super().__init__(seed)
        self._sizes = sizes

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))

    def size(self, high: int = 9) -> int:
        return int(self.choice(*[size for size in self._sizes if size <= high]))
