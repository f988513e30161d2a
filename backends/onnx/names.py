"""Names that users of ONNX models know: of inputs and outputs, of sizes, and of states in the forms that consumers want."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from deltaloom.graph.errors import ExportError, require

INPUTS = {
    "token_ids": "input_ids",
    "next_ids": "input_ids",
    "positions": "position_ids",
    "valid": "attention_mask",
    "hidden": "hidden_states",
}
"""Inputs of our graphs -> names that users of ONNX know."""

OUTPUTS = {"final_norm": "hidden_states", "hidden": "hidden_states_out"}
"""Outputs of model graphs -> public names; others keep theirs."""

SYMBOLS = {"batch": "batch_size", "seq": "sequence_length", "past": "past_sequence_length", "past + seq": "total_sequence_length"}
"""Symbols of our types -> names of symbolic dimensions."""

StateStyle = Literal["portable", "genai", "transformersjs"]
STATE_STYLES: tuple[StateStyle, ...] = get_args(StateStyle)


@dataclass(frozen=True)
class StateNames:
    """The names of a state's input and output. ``extra``: columns that the consumer keeps in front of those that are read."""

    past: str
    present: str
    extra: int = 0


Naming = Callable[[str], StateNames]
"""Full name of a state -> its names."""

KINDS = {"conv": "conv_state", "delta": "recurrent_state"}
"""Last part of a state's name -> its public one; others keep theirs."""

SHORT = {"conv": "conv", "delta": "recurrent"}


def portable_names(full: str) -> StateNames:
    """``model.layers.3.self_attn.key`` -> ``past_key_values.3.key`` and ``present.3.key``; outside layers names stay whole."""
    layer, kind = _place(full)
    place = full if layer is None else f"{layer}.{KINDS.get(kind, kind)}"
    return StateNames(f"past_key_values.{place}", f"present.{place}")


def genai_names(full: str) -> StateNames:
    """As onnxruntime-genai has them: fixed states are ``past.3.conv`` and ``present.3.conv``."""
    layer, kind = _place(full)
    if layer is None or kind not in SHORT:
        return portable_names(full)
    return StateNames(f"past.{layer}.{SHORT[kind]}", f"present.{layer}.{SHORT[kind]}")


def transformersjs_names(full: str) -> StateNames:
    """As transformers.js has them: ``past_conv.3`` and ``present_conv.3``, which hold a column more than is read."""
    layer, kind = _place(full)
    if layer is None or kind not in SHORT:
        return portable_names(full)
    return StateNames(f"past_{SHORT[kind]}.{layer}", f"present_{SHORT[kind]}.{layer}", extra=int(kind == "conv"))


NAMINGS: dict[StateStyle, Naming] = {
    "portable": portable_names,
    "genai": genai_names,
    "transformersjs": transformersjs_names,
}


def naming(style: str) -> Naming:
    """The names of a style. ``ExportError`` for an unknown one."""
    found = next((NAMINGS[known] for known in STATE_STYLES if known == style), None)
    require(found is not None, f"state_names is {style!r}, expected {', '.join(STATE_STYLES)}", ExportError)
    assert found is not None
    return found


def path_name(name: str) -> str:
    """``layers.3.self_attn.q`` as a node's name: ``/model/layers.3/self_attn/q``."""
    return "/model/" + re.sub(r"\.(?!\d+(?:\.|$))", "/", name)


def _place(full: str) -> tuple[str | None, str]:
    """The layer's number and the kind of a state."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", full)
    return (layer[1] if layer else None), full.rpartition(".")[2]
