"""Write a seeded random checkpoint of the Qwen3-Next architecture, in the Hugging Face layout, of any size.

    python benchmarks/make_midsize.py next-0.3b OUT_FOLDER [--dtype float32|bfloat16]

The seed fixes every value, so each machine gets the same files and none of them needs to be kept. float32 files hold
the bfloat16 values, so both dtypes are one model. Scales are picked so that activations stay of order one and the
delta-rule gate covers slow and fast decay: a model whose state dies at once would hide errors in the recurrence.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Named = tuple[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Qwen3-Next model, under the names that ``config.json`` gives them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    linear_conv_kernel_dim: int = 4
    full_attention_interval: int = 4

    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def query_dim(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_key_value_heads * self.head_dim


# A few hundred thousand parameters, for smoke tests.
NEXT_TINY = Geometry(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
    num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, shared_expert_intermediate_size=32,
)
# The 80B model's ratios scaled down to about 300 million parameters.
NEXT_300M = Geometry(
    vocab_size=32768, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=2, head_dim=128,
    linear_num_key_heads=8, linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
    num_experts=64, num_experts_per_tok=8, moe_intermediate_size=128, shared_expert_intermediate_size=128,
)
# One 3:1 block of the 80B model's true layers; the vocabulary is cut.
NEXT_80B_L4 = Geometry(
    vocab_size=32768, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4,
    num_attention_heads=16, num_key_value_heads=2, head_dim=256,
    linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128, linear_value_head_dim=128,
    num_experts=512, num_experts_per_tok=10, moe_intermediate_size=512, shared_expert_intermediate_size=512,
)
PRESETS = {
    "next-tiny": NEXT_TINY,
    "next-0.3b": NEXT_300M,
    "next-80b-l4e128": replace(NEXT_80B_L4, num_experts=128),
    "next-80b-l4": NEXT_80B_L4,
}


def config(geometry: Geometry, dtype: str) -> dict[str, object]:
    """The ``config.json`` of a model of this geometry, in the form in which the 80B model was published."""
    return {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "torch_dtype": dtype,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "norm_topk_prob": True, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rope_scaling": None, "tie_word_embeddings": False,
        "use_cache": True, "max_position_embeddings": 262144, "bos_token_id": 0, "eos_token_id": 1,
    } | asdict(geometry)  # fmt: skip


class Draw:
    """Random weights from one stream; the order of the calls is part of the format."""

    def __init__(self, seed: int) -> None:
        self.stream = np.random.Generator(np.random.PCG64(seed))

    def normal(self, *shape: int, scale: float) -> NDArray[np.float32]:
        return self.stream.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def matrix(self, rows: int, columns: int, *, gain: float = 1.0) -> NDArray[np.float32]:
        """A projection [rows, columns] that keeps the size of its input, times ``gain``."""
        return self.normal(rows, columns, scale=gain * columns**-0.5)


def delta_net(g: Geometry, draw: Draw, prefix: str) -> Iterator[Named]:
    heads = g.linear_num_value_heads
    yield prefix + "in_proj_qkvz.weight", draw.matrix(2 * g.key_dim + 2 * g.value_dim, g.hidden_size)
    yield prefix + "in_proj_ba.weight", draw.matrix(2 * heads, g.hidden_size)
    yield prefix + "conv1d.weight", draw.normal(2 * g.key_dim + g.value_dim, 1, g.linear_conv_kernel_dim, scale=0.5)
    yield prefix + "dt_bias", draw.normal(heads, scale=1.0) - np.float32(3.0)
    yield prefix + "A_log", np.log(draw.stream.uniform(0.01, 4.0, heads)).astype(np.float32)
    yield prefix + "norm.weight", 1 + draw.normal(g.linear_value_head_dim, scale=0.05)
    yield prefix + "out_proj.weight", draw.matrix(g.hidden_size, g.value_dim)


def attention(g: Geometry, draw: Draw, prefix: str) -> Iterator[Named]:
    yield prefix + "q_proj.weight", draw.matrix(2 * g.query_dim, g.hidden_size)
    yield prefix + "k_proj.weight", draw.matrix(g.kv_dim, g.hidden_size)
    yield prefix + "v_proj.weight", draw.matrix(g.kv_dim, g.hidden_size)
    yield prefix + "o_proj.weight", draw.matrix(g.hidden_size, g.query_dim)
    yield prefix + "q_norm.weight", draw.normal(g.head_dim, scale=0.05)
    yield prefix + "k_norm.weight", draw.normal(g.head_dim, scale=0.05)


def expert(g: Geometry, draw: Draw, prefix: str, width: int) -> Iterator[Named]:
    yield prefix + "gate_proj.weight", draw.matrix(width, g.hidden_size)
    yield prefix + "up_proj.weight", draw.matrix(width, g.hidden_size)
    yield prefix + "down_proj.weight", draw.matrix(g.hidden_size, width, gain=2)


def tensors(g: Geometry, draw: Draw) -> Iterator[Named]:
    """Every tensor of the model, float32, under its published name, in the order that the seed depends on."""
    yield "model.embed_tokens.weight", draw.normal(g.vocab_size, g.hidden_size, scale=1.0)
    for index in range(g.num_hidden_layers):
        layer = f"model.layers.{index}."
        yield layer + "input_layernorm.weight", draw.normal(g.hidden_size, scale=0.05)
        if (index + 1) % g.full_attention_interval:
            yield from delta_net(g, draw, layer + "linear_attn.")
        else:
            yield from attention(g, draw, layer + "self_attn.")
        yield layer + "post_attention_layernorm.weight", draw.normal(g.hidden_size, scale=0.05)
        yield layer + "mlp.gate.weight", draw.matrix(g.num_experts, g.hidden_size, gain=2)
        for number in range(g.num_experts):
            yield from expert(g, draw, f"{layer}mlp.experts.{number}.", g.moe_intermediate_size)
        yield from expert(g, draw, layer + "mlp.shared_expert.", g.shared_expert_intermediate_size)
        yield layer + "mlp.shared_expert_gate.weight", draw.matrix(1, g.hidden_size)
    yield "model.norm.weight", draw.normal(g.hidden_size, scale=0.05)
    yield "lm_head.weight", draw.matrix(g.vocab_size, g.hidden_size)


def tokenizer(vocabulary: int) -> dict[str, object]:
    """The ``tokenizer.json`` of a byte-level BPE without merges, with unused names up to ``vocabulary`` tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    special = ["<|bos|>", "<|eos|>"]
    names = [*special, *(letters[byte] for byte in range(256))]
    names += [f"<|unused{i}|>" for i in range(len(names), vocabulary)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": name} | flags for i, name in enumerate(special)],
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "vocab": {name: i for i, name in enumerate(names)}, "merges": [],
        },
    }  # fmt: skip


def write_weights(g: Geometry, folder: Path, dtype: str, seed: int, shard_bytes: float) -> tuple[int, int]:
    """Write the shards and their index; return the number of parameters and of bytes."""
    target = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    shard: dict[str, NDArray[np.float32]] = {}
    index: dict[str, str] = {}
    size = count = total = files = 0

    def flush() -> None:
        nonlocal shard, size, files
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    for name, drawn in tensors(g, Draw(seed)):
        weight = np.ascontiguousarray(drawn.astype(ml_dtypes.bfloat16).astype(target))
        if shard and size + weight.nbytes > shard_bytes:
            flush()
        shard[name] = weight
        size, count, total = size + weight.nbytes, count + weight.size, total + weight.nbytes
    flush()
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    return count, total


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="the most that one file holds, in 10^9 bytes")
    parser.add_argument("--keep", action="store_true", help="do nothing if the folder already holds a complete model")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    last = folder / "config.json"  # written last, so its presence says that the rest is complete
    if arguments.keep and last.exists():
        print(f"{folder} is already there")
        return
    geometry = PRESETS[arguments.preset]
    folder.mkdir(parents=True, exist_ok=True)
    last.unlink(missing_ok=True)
    count, total = write_weights(geometry, folder, arguments.dtype, arguments.seed, arguments.shard_gb * 1e9)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False})
    write_json(folder / "tokenizer.json", tokenizer(geometry.vocab_size))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": "<|eos|>",
        "model_max_length": 262144,
    })  # fmt: skip
    write_json(last, config(geometry, arguments.dtype))
    print(f"{arguments.preset}: {count / 1e6:.1f} M parameters, {total / 1e6:.0f} MB in {folder}")


if __name__ == "__main__":
    main()
