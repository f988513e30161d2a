"""transformers' own model of a config on tensors that are given by name, to measure beside ours in the same process."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch

from deltaloom.graph.errors import CompileError

Read = Callable[[str], torch.Tensor]

NOT_FIELDS = ("architectures", "model_type", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that say nothing about the shape of a model."""

STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
"""Parameters that transformers holds as a stack, where a checkpoint has a tensor an expert."""

WARM = 4


class TransformersPeer:
    """A causal model of transformers that decodes. ``CompileError`` where transformers is missing or has a parameter that no
    checkpoint tensor fills."""

    def __init__(self, values: Mapping[str, Any], read: Read, *, device: str, dtype: torch.dtype) -> None:
        """``values``: the fields of config.json; ``read``: a checkpoint tensor by its full name."""
        try:
            from transformers import CONFIG_MAPPING, AutoModelForCausalLM
        except ImportError as error:
            found = f"--against hf needs the package transformers, which cannot be imported ({error})"
            raise CompileError(f"{found}; install it with `pip install 'deltaloom[bench]'`") from error
        fields = {name: value for name, value in values.items() if name not in NOT_FIELDS}
        self.config = CONFIG_MAPPING[values["model_type"]](**fields)
        self._device = device
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                self._model = AutoModelForCausalLM.from_config(self.config, dtype=dtype).eval()
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(_tensor(name, parameter, read))

    def seconds(self, batch: int, context: int, *, steps: int, compiled: bool) -> float:
        """The median time of a decode step, lm_head included, at ``context`` tokens; ``compiled``: by torch.compile in its mode for
        little overhead, over a static cache."""
        with torch.no_grad():
            self._model.set_experts_implementation("batched_mm" if batch == 1 else "grouped_mm")
            cache = self._cache(batch, context, steps, static=compiled)
            ids = torch.randint(0, self.config.vocab_size, (batch, 1), device=self._device)
            place = torch.full((1, 1), context, device=self._device)
            torch._dynamo.reset()
            run = torch.compile(self._model, mode="reduce-overhead") if compiled else self._model

            def step() -> None:
                run(input_ids=ids.random_(0, self.config.vocab_size), position_ids=place, past_key_values=cache, use_cache=True)

            for _ in range(WARM):
                step()
            return median(self._times(step, steps))

    def _times(self, step: Callable[[], None], steps: int) -> list[float]:
        """Wall time of each step, waited for: where the host is what limits, it belongs to the time."""
        marks = []
        for _ in range(steps + 1):
            if self._device != "cpu":
                torch.cuda.synchronize()
            marks.append(perf_counter())
            step()
        return [after - before for before, after in pairwise(marks)]

    def _cache(self, batch: int, context: int, steps: int, *, static: bool) -> Any:
        """A cache as if ``context`` tokens had been read: of some tokens that were, then keys and values drawn for the rest."""
        from transformers import DynamicCache, StaticCache

        config = self.config
        room = context + steps + WARM + 8
        cache = StaticCache(config=config, max_cache_len=room) if static else DynamicCache(config=config)
        first = torch.randint(0, config.vocab_size, (batch, 16), device=self._device)
        self._model(input_ids=first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer, kind in zip(cache.layers, config.layer_types, strict=True):
            if kind != "full_attention":
                continue
            if static:
                layer.keys.normal_()
                layer.values.normal_()
                layer.cumulative_length.fill_(context)
            else:
                shape = (batch, config.num_key_value_heads, context, layer.keys.shape[-1])
                layer.keys, layer.values = (torch.randn(shape, device=self._device).to(layer.keys.dtype) for _ in range(2))
        return cache


def _tensor(name: str, parameter: torch.Tensor, read: Read) -> torch.Tensor:
    found = STACKED.fullmatch(name)
    try:
        if found is None:
            return read(name)
        parts = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
        rows = (torch.cat([read(f"{found[1]}.{expert}.{part}.weight") for part in parts]) for expert in range(len(parameter)))
        return torch.stack(list(rows))
    except KeyError as error:
        raise CompileError(
            f"transformers has a parameter '{name}', and the config's checkpoint no tensor {error} for it"
        ) from error
