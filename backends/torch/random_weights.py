"""Checkpoint tensors of any size, drawn on the device: seeded by name, and scaled so that activations stay near 1."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import torch


class RandomTensors:
    """``read(name)`` draws the tensor ``name`` of one of ``shapes``, the same for the same seed on the same kind of device.
    Matrices have a standard deviation of in ** -0.5, norms scatter around what leaves a norm as it is, decays as the published
    models initialise them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, seed: int, device: str, dtype: torch.dtype) -> None:
        self._shapes = shapes
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._generator = torch.Generator(device)

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name``, drawn anew at each call."""
        self._generator.manual_seed(crc32(name.encode()) ^ self._seed)
        return self._drawn(name, self._shapes[name]).to(self._dtype)

    def _drawn(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("A_log"):
            return self._uniform(shape, 1.0, 16.0).log_()
        if name.endswith("dt_bias"):
            return self._uniform(shape, 0.5, 1.5)
        if len(shape) == 1:
            centre = 1.0 if name.endswith("linear_attn.norm.weight") else 0.0
            return torch.randn(shape, generator=self._generator, device=self._device).mul_(0.1).add_(centre)
        width = 1 if "embed_tokens" in name else shape[-1]
        numbers = torch.randn(shape, generator=self._generator, device=self._device, dtype=self._dtype)
        return numbers.mul_(width**-0.5)

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator, device=self._device).mul_(high - low).add_(low)
