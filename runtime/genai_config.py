"""genai_config.json: what onnxruntime-genai has to know to generate with an exported model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaloom.backends.onnx.names import OUTPUTS, Naming
from deltaloom.models.config import ModelConfig
from deltaloom.runtime.params import GenerationDefaults

CONFIG_FILE = "genai_config.json"
LAYER = "model.layers.%d.mixer."
KINDS = ("key", "value", "conv", "delta")
TYPE = "decoder"
"""The one model type that every version takes with any names of states."""


def genai_config(shape: ModelConfig, folder: Path | None, naming: Naming, model: str, mtp: str | None) -> bytes:
    """The file for a model called ``model`` and, if there is one, its MTP head ``mtp``; both lie in the same folder. ``folder``:
    the checkpoint's, for its defaults of generation."""
    defaults = GenerationDefaults.from_folder(folder) if folder is not None else GenerationDefaults()
    past, present = templates(naming)
    sizes = {
        "head_size": shape.head_dim, "hidden_size": shape.hidden_size, "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers, "num_key_value_heads": shape.num_key_value_heads,
    }  # fmt: skip
    known: dict[str, Any] = {"bos_token_id": shape.bos_token_id, "pad_token_id": shape.pad_token_id}
    ends = defaults.eos_ids or shape.eos_token_ids
    tokens = {name: token for name, token in known.items() if token is not None} | ({"eos_token_id": list(ends)} if ends else {})
    decoder: dict[str, Any] = {"filename": model, **sizes, "session_options": {"provider_options": []}, **_names(past, present)}
    if mtp is not None:
        decoder["outputs"][_HIDDEN] = _HIDDEN
    described = {
        "type": TYPE, "vocab_size": shape.vocab_size, "context_length": shape.max_position_embeddings, **tokens, "decoder": decoder,
        **({"mtp": _mtp(mtp, past, present)} if mtp is not None else {}),
    }  # fmt: skip
    return (json.dumps({"model": described, "search": _search(defaults, shape)}, indent=2) + os.linesep).encode()


_HIDDEN = OUTPUTS["final_norm"]


def templates(naming: Naming) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Kind of state -> the names of its inputs, and of its outputs, with ``%d`` for the layer."""
    names = {kind: naming((LAYER % 0) + kind) for kind in KINDS}
    past = {kind: found.past.replace("0", "%d") for kind, found in names.items()}
    return past, {kind: found.present.replace("0", "%d") for kind, found in names.items()}


def _names(past: Mapping[str, str], present: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Inputs and outputs of the main model. Fixed states are named where the runtime does not know the names by itself."""
    kinds = {"key": "key", "value": "value"}
    if not past["conv"].startswith("past_key_values."):
        kinds |= {"conv": "conv", "delta": "recurrent"}
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", "position_ids": "position_ids"}
    inputs |= {f"past_{word}_names": past[kind] for kind, word in kinds.items()}
    outputs = {"logits": "logits", **{f"present_{word}_names": present[kind] for kind, word in kinds.items()}}
    return {"inputs": inputs, "outputs": outputs}


def _mtp(file: str, past: Mapping[str, str], present: Mapping[str, str]) -> dict[str, Any]:
    """The MTP head, in the words of the builder of onnxruntime-genai 0.18."""
    names = {"input_ids": "input_ids", _HIDDEN: _HIDDEN, "attention_mask": "attention_mask", "position_ids": "position_ids"}
    return {
        "filename": file,
        "num_hidden_layers": 1,
        "main_hidden_states": _HIDDEN,
        "inputs": {**names, "past_key_names": past["key"], "past_value_names": past["value"]},
        "outputs": {
            "logits": "logits", "hidden_states": OUTPUTS["hidden"],
            "present_key_names": present["key"], "present_value_names": present["value"],
        },
    }  # fmt: skip


def _search(defaults: GenerationDefaults, shape: ModelConfig) -> dict[str, Any]:
    """How tokens are chosen unless a request says otherwise. State buffers are not shared: the recurrent ones have no length."""
    greedy = defaults.temperature == 0
    chosen: dict[str, Any] = {"do_sample": not greedy, "max_length": shape.max_position_embeddings}
    chosen["past_present_share_buffer"] = False
    chosen["repetition_penalty"] = defaults.repetition_penalty
    if not greedy:
        chosen |= {"temperature": defaults.temperature, "top_p": defaults.top_p, "top_k": defaults.top_k}
    return chosen
