"""``AutoModelForCausalLM`` and ``AutoTokenizer``: scripts written for transformers run with their imports changed.

Only what such scripts use to generate is here; ``deltaloom.LLM`` is the native interface.
"""

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from deltaloom.graph.errors import ConfigError, RequestError, require
from deltaloom.passes.config import CompileConfig, backend_order
from deltaloom.runtime.encoding import TextTokenizer
from deltaloom.runtime.llm import LLM
from deltaloom.runtime.params import SamplingParams

Reference = str | os.PathLike[str]
DEVICE_MAPS = ("auto", "cpu", "cuda", None)


class AutoTokenizer(TextTokenizer):
    """The tokenizer of a checkpoint with the calls of transformers."""


class AutoModelForCausalLM:
    """A causal language model with the calls of transformers; made by ``from_pretrained``."""

    def __init__(self, llm: LLM, device: str) -> None:
        self.llm = llm
        self.device = device

    @classmethod
    def from_pretrained(
        cls,
        model: Reference,
        *,
        dtype: object = "auto",
        device_map: str | None = "auto",
        backend: str | Sequence[str] | None = None,
        max_model_len: int | None = None,
    ) -> "AutoModelForCausalLM":
        """Load the checkpoint folder or bundled name ``model``.

        ``device_map``: "cpu" or None, "cuda", or "auto", which is "cuda" where torch is installed and sees a GPU, else
        "cpu"; one device in any case. On the CPU the backend is numpy, on CUDA torch, unless ``backend`` names others.
        ``dtype`` "auto" computes in float32 on a CPU and in the checkpoint's type on a GPU; a name or a torch dtype
        chooses. Raises ConfigError for anything else, CheckpointError for a checkpoint that cannot be read.
        """
        require(
            isinstance(device_map, str | None) and device_map in DEVICE_MAPS,
            f"device_map is {device_map!r}; expected 'auto', 'cpu', 'cuda' or None, since a model runs on one device",
            ConfigError,
        )
        device = ("cuda" if cuda_available() else "cpu") if device_map == "auto" else device_map or "cpu"
        order = backend if backend is not None else "torch" if device == "cuda" else "numpy"
        config = CompileConfig(backends=backend_order(order), device=device)
        llm = LLM(model, backend=order, dtype=dtype_name(dtype), config=config, max_model_len=max_model_len)
        return cls(llm, device)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
    ) -> Any:
        """Prompt and output ids ``[batch × num_return_sequences, longest]``, as tensors of the kind that ``input_ids`` is.

        Rows that end earlier are padded on the right. ``attention_mask`` 0/1 marks padding in ``input_ids``.
        ``max_new_tokens`` is cut to what fits the context (None: all of it). ``do_sample`` None follows
        generation_config.json; False is greedy. Raises RequestError.
        """
        rows = _rows(input_ids, "input_ids")
        masks = np.ones_like(rows) if attention_mask is None else _rows(attention_mask, "attention_mask")
        require(
            masks.shape == rows.shape,
            f"attention_mask has shape {list(masks.shape)}, expected that of input_ids, {list(rows.shape)}",
            RequestError,
        )
        if do_sample is False:
            temperature = 0.0
        elif do_sample and temperature is None and self.llm.defaults.temperature == 0:
            temperature = 1.0
        params = SamplingParams(
            max_tokens=max_new_tokens,
            min_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            n=num_return_sequences,
            seed=seed,
        )
        prompts: list[list[int]] = [row[mask != 0].tolist() for row, mask in zip(rows, masks, strict=True)]
        results = self.llm.generate(prompts, params)
        outputs = [output.token_ids for result in results for output in result.outputs]
        pad = self.llm.tokenizer.pad_id or 0
        found = np.full((len(outputs), rows.shape[1] + max(map(len, outputs))), pad, np.int64)
        for number, output in enumerate(outputs):
            found[number, : rows.shape[1]] = rows[number // num_return_sequences]
            found[number, rows.shape[1] : rows.shape[1] + len(output)] = output
        return input_ids.new_tensor(found) if is_torch(input_ids) else found

    def eval(self) -> "AutoModelForCausalLM":
        """The model itself: there is no training mode to leave."""
        return self


def is_torch(value: object) -> bool:
    """Whether ``value`` is a torch tensor, found out without importing torch."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "new_tensor")


def dtype_name(dtype: object) -> str:
    """'float32' of 'float32' or torch.float32; "auto" stays. Raises ConfigError for anything else."""
    name = str(dtype).removeprefix("torch.")
    known = ("auto", "float32", "bfloat16", "float16", "float64")
    require(name in known, f"dtype is {dtype!r}; expected {', '.join(known)} or a torch dtype of that name", ConfigError)
    return name


def cuda_available() -> bool:
    """Whether torch is installed and sees a CUDA device."""
    if find_spec("torch") is None:
        return False
    found: bool = import_module("deltaloom.backends.torch.tensors").cuda_available()
    return found


def _rows(value: Any, name: str) -> Any:
    """An int64 array ``[batch, n]`` of a tensor, an array or nested lists."""
    try:
        array = np.asarray(value.detach().cpu() if is_torch(value) else value)
    except ValueError:
        raise RequestError(f"{name} has rows of different lengths; pad them on the left and give an attention_mask") from None
    require(
        array.ndim == 2 and array.size > 0 and array.dtype.kind in "iub",
        f"{name} has shape {list(array.shape)} and type {array.dtype}, expected whole numbers [batch, n >= 1]",
        RequestError,
    )
    return array.astype(np.int64)
