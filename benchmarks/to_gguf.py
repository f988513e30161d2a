"""Write a Qwen3-Next checkpoint as a GGUF file, so that llama.cpp can be measured and checked on the same weights.

    python benchmarks/to_gguf.py CHECKPOINT MODEL.gguf [--dtype float32|bfloat16]

Needs the package `gguf`. What llama.cpp keeps otherwise than the checkpoint: query, key and value rows of all heads before those of
the gate z, stacked experts, `1 + w` of norms, `-exp(A_log)`. With bfloat16, vectors, the convolution and the router stay float32.
The file has no tokenizer: token ids in, logits out.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from deltaloom.models.checkpoint import Checkpoint

Floats = NDArray[np.float32]
Config = dict[str, object]

WIDE = ("ssm_conv1d", "ffn_gate_inp")
"""Parts of names of matrices that stay float32, as in llama.cpp's own files."""

EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(\w+)\.weight")


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: its name there, its shape, and what reads it."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]

    def form(self, wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
        narrow = len(self.shape) > 1 and not any(part in self.name for part in WIDE)
        return wanted if narrow else gguf.GGMLQuantizationType.F32


class Source:
    """The checkpoint's tensors, in the order and form of llama.cpp."""

    def __init__(self, folder: Path) -> None:
        self.config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if self.config["model_type"] != "qwen3_next":
            raise SystemExit(f"{folder} is a {self.config['model_type']}; only qwen3_next is written")
        if self.size("linear_key_head_dim") != self.size("linear_value_head_dim"):
            raise SystemExit(f"{folder}: keys and values of the delta-net have other widths, for which llama.cpp has no form")
        self.checkpoint = Checkpoint.open(folder)
        self.names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3NEXT, self.size("num_hidden_layers"))

    def size(self, key: str) -> int:
        value = self.config[key]
        assert isinstance(value, int)
        return value

    def number(self, key: str) -> float:
        value = self.config[key]
        assert isinstance(value, int | float)
        return value

    def read(self, name: str) -> Floats:
        return self.checkpoint.read(name).astype(np.float32)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor but those of the extra layer that predicts a second token."""
        for name, shape in self.checkpoint.shapes().items():
            stacked = EXPERT.fullmatch(name)
            if name.startswith("mtp."):
                continue
            if stacked:
                if ".experts.0." in name:
                    yield self._experts(stacked[1], stacked[2], shape)
            elif name.endswith("in_proj_qkvz.weight"):
                yield from self._projections(name, shape)
            else:
                yield self._plain(name, shape)

    def _name(self, name: str) -> str:
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{name}: llama.cpp has no such tensor")
        return str(found)

    def _plain(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(".A_log"):
            return Tensor(self._name(name), shape, lambda: -np.exp(self.read(name)))
        if name.endswith(".dt_bias"):
            return Tensor(self._name(name.removesuffix("dt_bias") + "dt_proj.bias"), shape, lambda: self.read(name))
        if name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
            return Tensor(self._name(name), shape, lambda: 1 + self.read(name))
        if name.endswith(("conv1d.weight", "shared_expert_gate.weight")):
            shape = tuple(length for length in shape if length > 1)
        return Tensor(self._name(name), shape, lambda: self.read(name).reshape(shape))

    def _experts(self, prefix: str, matrix: str, shape: tuple[int, ...]) -> Tensor:
        count = self.size("num_experts")

        def read() -> Floats:
            return np.stack([self.read(f"{prefix}.{number}.{matrix}.weight") for number in range(count)])

        return Tensor(self._name(f"{prefix}.{matrix}.weight"), (count, *shape), read)

    def _projections(self, name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        """The rows q, k, v, z of each key head as those of q, k, v of all heads, and those of z."""
        heads, width = self.size("linear_num_key_heads"), self.size("linear_key_head_dim")
        group = self.size("linear_num_value_heads") // heads * width
        borders = [width, 2 * width, 2 * width + group]

        def parts() -> list[Floats]:
            rows = self.read(name).reshape(heads, -1, shape[1])
            return [part.reshape(-1, shape[1]) for part in np.split(rows, borders, axis=1)]

        layer = re.search(r"\d+", name)
        assert layer is not None
        keys, values = heads * width, heads * group
        yield Tensor(f"blk.{layer[0]}.attn_qkv.weight", (2 * keys + values, shape[1]), lambda: np.concatenate(parts()[:3]))
        yield Tensor(f"blk.{layer[0]}.attn_gate.weight", (values, shape[1]), lambda: parts()[3])


def describe(writer: gguf.GGUFWriter, source: Source) -> None:
    """The model's sizes under the names of GGUF."""
    size, number = source.size, source.number
    writer.add_context_length(size("max_position_embeddings"))
    writer.add_embedding_length(size("hidden_size"))
    writer.add_block_count(size("num_hidden_layers"))
    writer.add_feed_forward_length(size("intermediate_size"))
    writer.add_head_count(size("num_attention_heads"))
    writer.add_head_count_kv(size("num_key_value_heads"))
    writer.add_key_length(size("head_dim"))
    writer.add_value_length(size("head_dim"))
    writer.add_rope_dimension_count(int(size("head_dim") * number("partial_rotary_factor")))
    writer.add_rope_freq_base(number("rope_theta"))
    writer.add_layer_norm_rms_eps(number("rms_norm_eps"))
    writer.add_expert_count(size("num_experts"))
    writer.add_expert_used_count(size("num_experts_per_tok"))
    writer.add_expert_feed_forward_length(size("moe_intermediate_size"))
    writer.add_expert_shared_feed_forward_length(size("shared_expert_intermediate_size"))
    writer.add_ssm_conv_kernel(size("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(size("linear_key_head_dim"))
    writer.add_ssm_group_count(size("linear_num_key_heads"))
    writer.add_ssm_time_step_rank(size("linear_num_value_heads"))
    writer.add_ssm_inner_size(size("linear_num_value_heads") * size("linear_value_head_dim"))
    writer.add_full_attention_interval(size("full_attention_interval"))
    writer.add_vocab_size(size("vocab_size"))
    writer.add_tokenizer_model("no_vocab")


def write(folder: Path, path: Path, dtype: str) -> int:
    """Write the file, one tensor in memory at a time; returns its bytes."""
    source = Source(folder)
    wanted = gguf.GGMLQuantizationType.F32 if dtype == "float32" else gguf.GGMLQuantizationType.BF16
    tensors = list(source.tensors())
    writer = gguf.GGUFWriter(path, "qwen3next")
    describe(writer, source)
    for tensor in tensors:
        form = tensor.form(wanted)
        bytes_each = 4 if form == gguf.GGMLQuantizationType.F32 else 2
        count = int(np.prod(tensor.shape))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_each * count, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(gguf.quantize(np.ascontiguousarray(tensor.read()), tensor.form(wanted)))
    writer.close()
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--keep", action="store_true", help="do nothing if the file is already there")
    arguments = parser.parse_args()
    if arguments.keep and arguments.file.exists():
        print(f"{arguments.file} is already there")
        return
    part = arguments.file.with_name(arguments.file.name + ".part")  # renamed when complete
    part.parent.mkdir(parents=True, exist_ok=True)
    size = write(arguments.checkpoint, part, arguments.dtype)
    part.rename(arguments.file)
    print(f"{arguments.file}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
