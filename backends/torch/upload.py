"""Arrays of mapped files on their way to a device: threads fill a few pinned buffers from the files, and the device copies from
those meanwhile. Many small arrays share a buffer and a copy. The host holds ``BUFFERS`` buffers at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from deltaloom.backends.torch.host import to_tensor
from deltaloom.graph.op import Array

BUFFERS = 8
CHUNK = 8 << 20
"""Bytes of a buffer."""

ALIGNED = 256
"""Arrays begin at multiples of so many bytes."""


@dataclass(frozen=True)
class _Piece:
    """Bytes of an array and where they go in their buffer."""

    source: Array
    at: int


class Upload:
    """Copies arrays to ``device`` in chunks of ``chunk`` bytes, a multiple of 256."""

    def __init__(self, device: torch.device, *, chunk: int = CHUNK) -> None:
        self._device = device
        self._chunk = chunk
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(BUFFERS, thread_name_prefix="deltaloom-upload")
        self._free: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()
        for _ in range(BUFFERS):
            self._free.put((torch.empty(chunk, dtype=torch.uint8, pin_memory=self._stream is not None), None))

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Tensors of the shapes, dtypes and content of ``arrays``, which lie side by side in one piece of the device's memory."""
        plain = {name: array for name, array in arrays.items() if _plain(array)}
        made = {name: to_tensor(array).to(self._device) for name, array in arrays.items() if name not in plain}
        starts, size = dict[str, int](), 0
        for name, array in plain.items():
            starts[name] = size
            size += -(-array.nbytes // ALIGNED) * ALIGNED
        whole = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        chunks = list(self._chunks(plain, starts, size))
        targets = [whole[start : start + self._chunk] for start in range(0, size, self._chunk)]
        for _ in self._threads.map(self._copy, chunks, targets):
            pass  # raises what went wrong on the way
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for name, array in plain.items():
            dtype = to_tensor(np.empty(0, array.dtype)).dtype
            made[name] = whole[starts[name] : starts[name] + array.nbytes].view(dtype).view(array.shape)
        return made

    def _chunks(self, arrays: Mapping[str, Array], starts: Mapping[str, int], size: int) -> Iterator[list[_Piece]]:
        """What each chunk of the whole holds."""
        chunks: list[list[_Piece]] = [[] for _ in range(0, size, self._chunk)]
        for name, array in arrays.items():
            source, start = array.reshape(-1).view(np.uint8), starts[name]
            done = 0
            while done < len(source):
                number, at = divmod(start + done, self._chunk)
                count = min(len(source) - done, self._chunk - at)
                chunks[number].append(_Piece(source[done : done + count], at))
                done += count
        yield from chunks

    @torch.no_grad()
    def _copy(self, pieces: list[_Piece], target: torch.Tensor) -> None:
        buffer, copied = self._free.get()
        try:
            if copied is not None:
                copied.synchronize()
            into = buffer.numpy()
            for piece in pieces:
                np.copyto(into[piece.at : piece.at + len(piece.source)], piece.source)
            part = buffer[: len(target)]
            if self._stream is None:
                target.copy_(part)
                return
            with torch.cuda.stream(self._stream):
                target.copy_(part, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
        finally:
            self._free.put((buffer, copied))


def _plain(array: Array) -> bool:
    """Whether its bytes can be copied as they lie."""
    return bool(array.flags.c_contiguous and array.dtype.isnative and array.size)
