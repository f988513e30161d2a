"""How fast a checkpoint gets onto a device: the weights of a compiled model, beside plain reads of the files and safetensors' own
loader.

    python benchmarks/load_checkpoint.py CONFIG FOLDER --gb 20 --backend cuda

writes a random FP8 checkpoint of CONFIG's layers into FOLDER (as many layers as fit --gb; kept if it is there already) and loads it
with the files dropped from the system's cache (cold), then with what it holds (warm). GB are 10**9 bytes; loading compiles too. On
a CPU, weights that need no other form stay in the mapped files and are not read, so that its rate says something of devices only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import deltaloom
from deltaloom.models.inventory import checkpoint_tensors
from deltaloom.models.safetensors_file import write_safetensors
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.load import build_graph
from deltaloom.runtime.resident import Peak

SHARD = 2 << 30
"""Bytes of a file at most."""
CHUNK = 16 << 20
QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
Arrays = dict[str, NDArray[np.generic]]


def fields_of(config: Path, layers: int) -> dict[str, object]:
    """config.json with so many layers, stored in FP8 blocks."""
    fields: dict[str, object] = json.loads(config.read_text(encoding="utf-8"))
    for name in ("layer_types", "torch_dtype"):
        fields.pop(name, None)
    return fields | {"num_hidden_layers": layers, "quantization_config": QUANTISED, "dtype": "bfloat16"}


def stored(folder: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype[np.generic]]]:
    """Name, shape and dtype of every tensor that the config in ``folder`` asks for."""
    for name, one in checkpoint_tensors(build_graph(folder / "config.json", dtype="bfloat16").main).items():
        yield name, one.shape, np.dtype(ml_dtypes.bfloat16) if one.dtype is None else one.dtype.numpy


def size_of(folder: Path) -> int:
    """Bytes of all tensors."""
    return sum(int(np.prod(shape)) * dtype.itemsize for _, shape, dtype in stored(folder))


def write(config: Path, folder: Path, gb: float) -> None:
    """A random checkpoint of at most ``gb``, but at least one block of layers."""
    folder.mkdir(parents=True, exist_ok=True)
    period = int(json.loads(config.read_text(encoding="utf-8")).get("full_attention_interval", 1))
    sizes = []
    for layers in (period, 2 * period):
        (folder / "config.json").write_text(json.dumps(fields_of(config, layers)), encoding="utf-8")
        sizes.append(size_of(folder))
    blocks = max(1, 1 + int((gb * 1e9 - sizes[0]) // (sizes[1] - sizes[0])))
    (folder / "config.json").write_text(json.dumps(fields_of(config, blocks * period)), encoding="utf-8")
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 256, CHUNK, np.uint8) & 0xB7  # no NaN, no large exponent, in either dtype
    batch: Arrays = {}
    where: dict[str, str] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}.safetensors"
        write_safetensors(folder / file, batch)
        where.update(dict.fromkeys(batch, file))
        batch.clear()

    for name, shape, dtype in stored(folder):
        count = int(np.prod(shape)) * dtype.itemsize
        if batch and sum(array.nbytes for array in batch.values()) + count > SHARD:
            flush()
        data = np.resize(pool, count).view(dtype).reshape(shape)
        batch[name] = np.full(shape, 0.01, dtype) if len(shape) == 1 or name.endswith("scale_inv") else data
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def drop(files: list[Path]) -> None:
    """Ask the system to forget what it holds of the files."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: list[Path]) -> None:
    """Every byte into one buffer."""
    buffer = bytearray(CHUNK)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def main() -> None:
    """Write where nothing is, then time each way cold and warm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=0.5)
    parser.add_argument("--backend", default="torch")
    arguments = parser.parse_args()
    if not (arguments.folder / "model.safetensors.index.json").exists():
        started = perf_counter()
        write(arguments.config, arguments.folder, arguments.gb)
        print(f"written in {perf_counter() - started:.1f} s", flush=True)
    files = sorted(arguments.folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    options = CompileConfig(backends=(arguments.backend,), dtype="bfloat16", keep_quantized=True)
    print(f"{total / 1e9:.2f} GB in {len(files)} files, onto {options.device}", flush=True)

    def wait() -> None:
        if options.device != "cpu":
            torch.cuda.synchronize()

    def ours() -> None:
        deltaloom.load(arguments.folder, config=options)

    def theirs() -> None:
        held = [load_file(file, device=options.device) for file in files]
        if options.device == "cpu":  # mapped until it is touched
            held[0] = {name: tensor.clone() for one in held for name, tensor in one.items()}

    ways: dict[str, Callable[[], None]] = {"read()": lambda: plain_read(files), "deltaloom": ours, "safetensors": theirs}
    for cache in ("cold", "warm"):
        for name, way in ways.items():
            if cache == "cold":
                drop(files)
            with Peak() as held:
                started = perf_counter()
                way()
                wait()
                seconds = perf_counter() - started
            grown = (held.most - held.start) / 1e9
            print(
                f"{cache}  {name:12s} {seconds:7.2f} s  {total / seconds / 1e9:6.2f} GB/s  host memory +{grown:.2f} GB", flush=True
            )


if __name__ == "__main__":
    main()
