"""A checkpoint folder: one model.safetensors, or shards that model.safetensors.index.json names. Everything is lazy."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deltaloom.graph.errors import CheckpointError
from deltaloom.models.json_fields import as_path, describe, read_json_object, reason
from deltaloom.models.safetensors_file import SafetensorsFile, TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FINITE_CHUNK = 1 << 20  # elements looked at together: a few MB of working memory


class Checkpoint:
    """Named tensors over one or more files; opening reads headers only. Use as a context manager, or ``close`` it."""

    def __init__(self, folder: Path, files: Mapping[str, SafetensorsFile]) -> None:
        """``files`` maps each tensor's name to the open file that holds it."""
        self.folder = folder
        self._files = files

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "Checkpoint":
        """Open a folder's checkpoint and check headers and index against each other.

        Raises CheckpointError with one sentence for anything missing, unreadable, truncated or contradictory.
        """
        path = as_path(folder, CheckpointError)
        try:
            entries = sorted(entry.name for entry in path.iterdir())
        except FileNotFoundError:
            raise CheckpointError(f"the checkpoint folder {path} does not exist.") from None
        except OSError as problem:
            raise CheckpointError(f"the checkpoint folder {path} cannot be read: {reason(problem)}.") from None
        if INDEX_FILE in entries:
            return cls(path, _open_shards(path, single_file_too=SINGLE_FILE in entries))
        if SINGLE_FILE not in entries:
            others = [name for name in entries if name.endswith((".bin", ".safetensors", ".gguf", ".pt", ".pth"))]
            found = f"; found {', '.join(others[:3])}, which is not read" if others else ""
            raise CheckpointError(f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}.")
        file = SafetensorsFile.open(path / SINGLE_FILE)
        return cls(path, dict.fromkeys(file.names(), file))

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape, file and byte range, from the header; CheckpointError if there is no such tensor."""
        return self._file(name).info(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, sorted by name."""
        return {name: self.info(name).shape for name in self.names()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.info(name).nbytes for name in self._files)

    def read(self, name: str) -> NDArray[np.generic]:
        """A read-only view into the mapped file; its pages come from disk when they are touched."""
        return self._file(name).tensor(name)

    def forget(self) -> None:
        """Let the system take the pages that were read: for who reads each tensor once."""
        for file in set(self._files.values()):
            file.forget()

    def close(self) -> None:
        """Let go of all files; views that were handed out stay valid."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise CheckpointError(f"the checkpoint {self.folder} has no tensor {name!r}.")
        return self._files[name]


def check_finite(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> None:
    """Read all float tensors (or ``names``) in bounded chunks; CheckpointError for the first NaN or infinity."""
    for name in checkpoint.names() if names is None else names:
        tensor = checkpoint.read(name)
        if not _is_float(tensor.dtype):
            continue
        flat = tensor.reshape(-1)
        for start in range(0, flat.size, _FINITE_CHUNK):
            finite = np.isfinite(flat[start : start + _FINITE_CHUNK])
            if not finite.all():
                first = start + int(np.argmin(finite))
                position = [int(index) for index in np.unravel_index(first, tensor.shape)]
                raise CheckpointError(
                    f"tensor {name!r} in {checkpoint.info(name).file} holds {flat[first]} at {position}; weights must "
                    "be finite. Copy the file again, or ask its makers."
                )


def _is_float(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind == "f" or dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def _open_shards(folder: Path, *, single_file_too: bool) -> dict[str, SafetensorsFile]:
    index = folder / INDEX_FILE
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    if single_file_too and SINGLE_FILE not in shards:
        raise CheckpointError(
            f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}, which names other files; remove the one that is stale."
        )
    missing = [shard for shard in shards if not os.path.exists(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of the {len(shards)} files that {index} names are missing, first {missing[0]}; "
            "copy the checkpoint again."
        )
    result: dict[str, SafetensorsFile] = {}
    for shard in shards:
        file = SafetensorsFile.open(folder / shard)
        for name in file.names():
            if name in result:
                raise CheckpointError(
                    f"tensor {name!r} is in both {result[name].path} and {file.path}; keep one of them."
                )
            result[name] = file
    _check_index(index, weight_map, result)
    return result


def _check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, SafetensorsFile]) -> None:
    """The index and the headers of its shards must name the same tensors in the same files."""
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{index} places tensor {name!r} in {shard}, but that file does not hold it.")
        if found[name].path.name != shard:
            raise CheckpointError(f"{index} places tensor {name!r} in {shard}, but it is in {found[name].path.name}.")
    for name, file in found.items():
        if name not in weight_map:
            raise CheckpointError(f"{file.path} holds tensor {name!r}, which {index} does not name.")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name beside the index. A file may be a link (as in the hub's cache), a name may not leave."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"weight_map in {index} is {describe(weight_map)}; expected an object of file names.")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index} gives {describe(shard)} as the file of {name!r}; expected a file name.")
        if "/" in shard or "\\" in shard or "\0" in shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard!r}, which leaves its folder; expected the plain name of a "
                "file beside the index."
            )
    return dict(weight_map)
