"""Arrays of mapped files on their way to a device: threads fill a few pinned buffers from the files, and the device copies from
those meanwhile. So a load takes as long as the disk, and the host holds ``BUFFERS`` buffers at most."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from deltaloom.backends.torch.host import to_tensor
from deltaloom.graph.op import Array

BUFFERS = 8
CHUNK = 8 << 20
"""Bytes of a buffer."""


class Upload:
    """``tensor(array)`` gives a tensor on the device that is filled from now on; ``arrived()`` waits for all of them."""

    def __init__(self, device: torch.device, *, chunk: int = CHUNK) -> None:
        self._device = device
        self._chunk = chunk
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(BUFFERS, thread_name_prefix="deltaloom-upload")
        self._free: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put((torch.empty(chunk, dtype=torch.uint8, pin_memory=self._stream is not None), None))
        self._under_way: list[Future[None]] = []

    def tensor(self, array: Array) -> torch.Tensor:
        """A tensor of the shape and dtype of ``array``, whose content is there after ``arrived``."""
        if not array.flags.c_contiguous or not array.dtype.isnative or not array.size:
            return to_tensor(array).to(self._device)
        source = array.reshape(-1).view(np.uint8)
        made = torch.empty(array.shape, dtype=to_tensor(np.empty(0, array.dtype)).dtype, device=self._device)
        target = made.reshape(-1).view(torch.uint8)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for start in range(0, len(source), self._chunk):
            stop = start + self._chunk
            self._under_way.append(self._threads.submit(self._copy, source[start:stop], target[start:stop]))
        return made

    def arrived(self) -> None:
        """Let what runs on the device from now on see all tensors; raises what went wrong on the way."""
        under_way, self._under_way = self._under_way, []
        for one in under_way:
            one.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @torch.no_grad()
    def _copy(self, source: Array, target: torch.Tensor) -> None:
        buffer, copied = self._free.get()
        try:
            if copied is not None:
                copied.synchronize()
            part = buffer[: len(source)]
            np.copyto(part.numpy(), source)
            if self._stream is None:
                target.copy_(part)
                return
            with torch.cuda.stream(self._stream):
                target.copy_(part, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
        finally:
            self._free.put((buffer, copied))
