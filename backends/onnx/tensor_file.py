"""A file of tensors in the safetensors format, each at a multiple of a page, so that runtimes can map them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltaloom.graph.errors import ExportError, require
from deltaloom.graph.op import Array
from deltaloom.graph.types import DType

PAGE = 4096
CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "int64": "I64", "int32": "I32", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Dtypes as the safetensors format names them."""


MARK = {"made_by": "deltaloom export"}
"""In the header of our files: any other file is somebody's weights, and is not overwritten."""


@dataclass(frozen=True)
class Piece:
    """A tensor to be written: its bytes are those of ``arrays``, one after the other."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    arrays: Callable[[], Iterable[Array]]

    @property
    def entry(self) -> tuple[str, list[int]]:
        """Its dtype and shape in the header: codes of four bits are bytes there."""
        if self.dtype.long_name in CODES:
            return CODES[self.dtype.long_name], list(self.shape)
        return "U8", [self.nbytes]


@dataclass
class TensorFile:
    """What lies at ``path`` once it is written."""

    path: Path
    pieces: list[Piece] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """One more tensor, behind those before."""
        self.pieces.append(piece)

    def offsets(self) -> dict[str, int]:
        """Name of each tensor -> its first byte in the file."""
        at = len(self._head())
        found = {}
        for piece in self.pieces:
            found[piece.name] = at
            at += _padded(piece.nbytes)
        return found

    def write(self, path: Path) -> None:
        """Write the file, a piece of a tensor at a time."""
        with path.open("wb") as file:
            file.write(self._head())
            for piece in self.pieces:
                size = 0
                for array in piece.arrays():
                    data = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
                    size += file.write(data.data)
                found = f"the weight '{piece.name}' has {size} bytes, expected {piece.nbytes}"
                require(size == piece.nbytes, found, ExportError)
                file.write(bytes(_padded(size) - size))

    def _head(self) -> bytes:
        """Length and header, filled with spaces so that the data begins on a page. What fills a page has a name too, because the
        format knows no gaps."""
        header: dict[str, object] = {"__metadata__": MARK}
        offset = 0
        for number, piece in enumerate(self.pieces):
            code, shape = piece.entry
            end, page = offset + piece.nbytes, offset + _padded(piece.nbytes)
            header[piece.name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
            if page > end:
                header[f"padding.{number}"] = {"dtype": "U8", "shape": [page - end], "data_offsets": [end, page]}
            offset = page
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text


def _padded(size: int) -> int:
    return size + -size % PAGE
