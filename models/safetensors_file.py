"""A reader of the safetensors format over a memory map: eight bytes of header length, a JSON header, raw tensor bytes.

The header is checked whole before any tensor is handed out: ranges lie in the file, leave no gap, do not overlap and
fit dtype and shape. No tensor data is read before it is used.
"""

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deltaloom.graph.errors import CheckpointError
from deltaloom.models.json_fields import DuplicateKey, describe, object_without_duplicates, reason

MOST_DIMENSIONS = 32
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor; ``begin`` and ``end`` are byte positions in ``file``."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """One open file. ``tensor`` gives read-only views into the map, which stay valid after ``close``."""

    def __init__(self, path: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._infos = infos
        self._map: mmap.mmap | None = None
        self._closed = False

    @classmethod
    def open(cls, path: Path) -> "SafetensorsFile":
        """Read and check the header; CheckpointError if the file is missing, unreadable, truncated or inconsistent."""
        header, data_start, file_size = _read_header(path)
        metadata = _metadata(path, header.pop("__metadata__", {}))
        infos = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
        _check_ranges(path, infos, data_start, file_size)
        return cls(path, infos, metadata)

    def names(self) -> list[str]:
        """Tensor names in the order of the header."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and byte range; CheckpointError if the file has no such tensor."""
        if name not in self._infos:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it holds {len(self._infos)} others.")
        return self._infos[name]

    def items(self) -> Iterator[tuple[str, TensorInfo]]:
        return iter(self._infos.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return sum(info.nbytes for info in self._infos.values())

    def tensor(self, name: str) -> NDArray[np.generic]:
        """A read-only view into the mapped file, perhaps not aligned to its element size; nothing is copied."""
        info = self.info(name)
        array: NDArray[np.generic] = np.ndarray(info.shape, info.dtype, buffer=self._mapped(), offset=info.begin)
        return array

    def close(self) -> None:
        """Lets go of the map (the system frees it with the last view); ``tensor`` raises from now on."""
        self._map = None
        self._closed = True

    def forget(self) -> None:
        """Let the system take the pages that were read; views stay valid, their pages come from disk again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self) -> mmap.mmap:
        if self._closed:
            raise CheckpointError(f"{self.path} was closed; open the checkpoint again to read from it.")
        if self._map is None:
            try:
                with self.path.open("rb") as file:
                    self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as problem:
                raise CheckpointError(f"{self.path} cannot be mapped into memory: {reason(problem)}.") from None
            longest = max((info.end for info in self._infos.values()), default=0)
            if len(self._map) < longest:
                self._map = None
                raise CheckpointError(f"{self.path} has shrunk since it was opened; copy the file again.")
        return self._map


def write_safetensors(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Write ``arrays`` by name. ``CheckpointError`` for a dtype that the format has not; an OSError is the caller's to name."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, position = {}, 0
    for name, array in arrays.items():
        if array.dtype not in names:
            raise CheckpointError(f"tensor {name!r} is {array.dtype}; safetensors files hold {', '.join(DTYPES)}.")
        offsets = [position, position + array.nbytes]
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        position = offsets[1]
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def _read_header(path: Path) -> tuple[dict[str, object], int, int]:
    """The header's object, the position of the first data byte, and the file's size."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(f"{path} has {size} bytes; a safetensors file has at least 8, so it is truncated.")
            length = int.from_bytes(start, "little")
            if length > LONGEST_HEADER:
                raise CheckpointError(
                    f"{path} claims a header of {length} bytes, over the format's limit of {LONGEST_HEADER}; "
                    "it is damaged or not a safetensors file."
                )
            if 8 + length > size:
                raise CheckpointError(f"{path} is truncated: its header of {length} bytes does not fit the file of {size} bytes.")
            raw = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path} cannot be read: {reason(problem)}.") from None
    return _parse_header(path, raw), 8 + length, size


def _parse_header(path: Path, raw: bytes) -> dict[str, object]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=object_without_duplicates)
    except DuplicateKey as duplicate:
        raise CheckpointError(f"the header of {path} names {str(duplicate)!r} twice; the file is damaged.") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"the header of {path} is not valid JSON; it is damaged or not safetensors.") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {path} is {describe(header)}; expected an object of tensors.")
    return header


def _metadata(path: Path, entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError(f"__metadata__ of {path} is not an object of strings; the file is damaged.")
    return dict(entry)


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"tensor {name!r} in {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {describe(entry)}; expected exactly dtype, shape and data_offsets.")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{where} has the dtype {describe(kind)}; readable are {', '.join(DTYPES)}.")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise CheckpointError(f"{where} has the shape {shape!r:.80}; expected a list of at most {MOST_DIMENSIONS} sizes.")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {offsets!r:.80}; expected two positions, begin and end.")
    begin, end = offsets
    needed = math.prod(shape) * DTYPES[kind].itemsize
    if needed != end - begin:
        raise CheckpointError(
            f"{where} is {kind} {shape}, which takes {needed} bytes, but its data_offsets span {end - begin}; the file is damaged."
        )
    return TensorInfo(DTYPES[kind], tuple(shape), path, data_start + begin, data_start + end)


def _are_sizes(value: object) -> bool:
    """A list of non-negative integers that fit a file position."""
    return isinstance(value, list) and all(
        isinstance(entry, int) and not isinstance(entry, bool) and 0 <= entry < 2**63 for entry in value
    )


def _check_ranges(path: Path, infos: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    """Ranges must cover the data part of the file exactly once, in any order of names."""
    position, before = data_start, ""
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin < position:
            raise CheckpointError(
                f"tensors {before!r} and {name!r} in {path} overlap by {position - info.begin} bytes; the file is damaged."
            )
        if info.end > file_size:
            raise CheckpointError(
                f"{path} is truncated: tensor {name!r} ends at byte {info.end}, but the file has {file_size} bytes. "
                "Copy the file again."
            )
        if info.begin > position:
            raise CheckpointError(
                f"{path} has {info.begin - position} bytes before tensor {name!r} that belong to no tensor; the file is damaged."
            )
        position, before = info.end, name
    if position != file_size:
        raise CheckpointError(
            f"{path} has {file_size - position} bytes after its last tensor; the file is damaged or not complete."
        )
