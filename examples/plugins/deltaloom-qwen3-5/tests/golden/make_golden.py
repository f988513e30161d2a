"""Makes the files beside it: a small random Qwen3.5 text model with a tokenizer of bytes, and what transformers computes for it.

    python make_golden.py FOLDER        (made with transformers 5.23.0 and torch 2.13.0 on a CPU)

Weights are stored in bfloat16, as published ones are; the model is read back from the folder and run in float32 with eager
attention. ``expected.safetensors`` has, for each case, ``CASE.STAGE.NAME`` with NAME ``input_ids``, ``position_ids`` [B, n],
``logits`` [B, n, V], and in the padded case ``attention_mask`` [B, all so far]. The stages run in order, each on the cache of those
before it: ``prefill``, ``chunk`` (several tokens on a cache), ``decode.0``, ... Tokens are drawn, not sampled. Rows of padding hold
whatever came out. ``greedy.prompt`` and ``greedy.continuation`` are the ids of PROMPT and of the likeliest tokens after it.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, Qwen3_5ForCausalLM, Qwen3_5TextConfig

SEED = 20260224
END = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", END)
PROMPT = "Once upon a time"
CLEAR = 0.02
"""How far apart the two best logits of a greedy step must be."""
CASES = {
    "short": {"lengths": [5], "chunk": 0, "decode": 3},
    "long": {"lengths": [70], "chunk": 3, "decode": 4},
    "padded": {"lengths": [9, 4, 1], "chunk": 0, "decode": 4},
}


def config(vocab: int, end: int) -> Qwen3_5TextConfig:
    return Qwen3_5TextConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=4,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        eos_token_id=end,
        dtype="bfloat16",
    )


def randomise(model: Qwen3_5ForCausalLM) -> None:
    """Weights large enough that every part of the model shows in the logits; norms and gates away from their usual start."""
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in sorted(model.named_parameters()):
        numbers = torch.randn(weight.shape, generator=generator)
        if name.endswith("A_log"):
            numbers = numbers * 0.7 - 0.5
        elif name.endswith("linear_attn.norm.weight"):
            numbers = 1 + 0.3 * numbers
        elif name.endswith(("norm.weight", "dt_bias")):
            numbers = 0.3 * numbers
        elif name.endswith("conv1d.weight"):
            numbers = 0.5 * numbers
        elif not name.endswith("embed_tokens.weight"):
            numbers = numbers * (1.4 * weight.shape[-1] ** -0.5)
        weight.data.copy_(numbers)


def write_tokenizer(folder: Path) -> Tokenizer:
    """One token a byte and three special ones: no merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"eos_token": END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described) + "\n")
    return tokenizer


@torch.no_grad()
def run(model: Qwen3_5ForCausalLM, lengths: list[int], chunk: int, decode: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    widest, batch = max(lengths), len(lengths)
    padded = min(lengths) < widest
    stages = {"prefill": widest, **({"chunk": chunk} if chunk else {}), **{f"decode.{i}": 1 for i in range(decode)}}
    mask = torch.tensor([[0] * (widest - length) + [1] * length for length in lengths])
    cache, found = DynamicCache(config=model.config), {}
    for name, count in stages.items():
        if name != "prefill":
            mask = torch.cat([mask, torch.ones(batch, count, dtype=mask.dtype)], 1)
        ids = torch.randint(0, 256, (batch, count), generator=generator)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -count:]
        given = {"input_ids": ids, "position_ids": positions, **({"attention_mask": mask} if padded else {})}
        out = model(**given, past_key_values=cache, use_cache=True)
        found |= {f"{name}.{key}": value.clone() for key, value in given.items()}
        found[f"{name}.logits"] = out.logits.clone()
    return found


@torch.no_grad()
def continue_greedily(model: Qwen3_5ForCausalLM, prompt: list[int], count: int) -> dict[str, torch.Tensor]:
    """The whole text is computed again for each token, so no cache is involved."""
    ids = list(prompt)
    for _ in range(count):
        (first, second), (token, _) = (found.tolist() for found in model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2))
        if first - second < CLEAR:
            raise SystemExit(f"the likeliest tokens after {ids} are {first - second:.2g} apart: rounding could swap them")
        ids.append(token)
    return {"prompt": torch.tensor(prompt), "continuation": torch.tensor(ids[len(prompt) :])}


def main(folder: Path) -> None:
    tokenizer = write_tokenizer(folder)
    end = tokenizer.token_to_id(END)
    model = Qwen3_5ForCausalLM(config(tokenizer.get_vocab_size(), end))
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    model = Qwen3_5ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    found = {}
    for number, (name, case) in enumerate(CASES.items()):
        found |= {f"{name}.{key}": value.contiguous() for key, value in run(model, **case, seed=SEED + number).items()}
    greedy = continue_greedily(model, tokenizer.encode(PROMPT).ids, 16)
    found |= {f"greedy.{key}": value for key, value in greedy.items()}
    save_file(found, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
