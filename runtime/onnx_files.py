"""Writing the files of an export: all under temporary names first, so that nothing half written has a final name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from deltaloom.backends.onnx.tensor_file import MARK
from deltaloom.graph.errors import CheckpointError, ExportError, require
from deltaloom.models.safetensors_file import SafetensorsFile

TENSORS = ".safetensors"
Writer = Callable[[Path], object]
"""Writes a file under the path that it is given."""


def check_targets(files: Collection[Path], checkpoint: Collection[Path]) -> None:
    """``ExportError`` for a file that may not be written: a folder, one of the ``checkpoint`` (resolved paths), or any other file
    of weights that is not of an earlier export."""
    for file in files:
        wrong = next((one for one in file.parents if one.exists() and not one.is_dir()), None)
        require(wrong is None, f"{file} cannot be written: {wrong} is no folder", ExportError)
        require(file.resolve() not in checkpoint, f"{file} is a file of the checkpoint; give the model another name", ExportError)
        require(not file.is_dir(), f"{file} is a folder; give the model's file a name of its own", ExportError)
        found = f"{file} has weights that no export wrote; export into another folder, or give the model another name"
        require(file.suffix != TENSORS or not file.exists() or _ours(file), found, ExportError)


def write_files(writers: Mapping[Path, Writer]) -> None:
    """Write files of one folder, which is made if need be; the last gets its name last, and none of them is there while weights
    change. ``ExportError`` where that is not possible; then no file has its final name, and nothing is left behind."""
    target = list(writers)[-1]
    folder = target.parent
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            for path, write in writers.items():
                write(Path(scratch) / path.name)
            if len(writers) > 1:  # a model that was there before must not be seen with new weights
                for path in writers:
                    if path.suffix != TENSORS:
                        path.unlink(missing_ok=True)
            for path in writers:
                os.replace(Path(scratch) / path.name, path)
    except BaseException as problem:
        for made in new:
            if made.is_dir() and not any(made.iterdir()):
                made.rmdir()
        if isinstance(problem, OSError):
            raise ExportError(f"{target} cannot be written: {problem.strerror or problem}") from problem
        raise


def _ours(file: Path) -> bool:
    """Whether an existing file of tensors was written by an export."""
    try:
        return SafetensorsFile.open(file).metadata == MARK
    except CheckpointError:
        return False
