"""Profiles: which ops an exported model may use, and thereby which runtimes it is for."""

from __future__ import annotations

from dataclasses import dataclass

from deltaloom.graph.errors import ExportError, require

IR_VERSIONS = {21: 10, 24: 11, 27: 13}
"""Version of the standard ops -> of the file format: the library's own default is refused by every runtime of a few months ago."""

OPSETS = {"portable": (21,), "modern": (24, 27), "ort": (21,)}
"""Name -> versions of the standard ops that it can be written for; the first is that where none is asked for."""

CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own ops, in version 1."""


@dataclass(frozen=True)
class Profile:
    """``opset``: version of the standard ops; ``ir_version``: of the file format; ``contrib``: with ``com.microsoft``."""

    name: str
    opset: int
    ir_version: int
    contrib: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.opset}"


def profile(name: str, opset: int | None = None) -> Profile:
    """The profile ``name``, with another opset if one is given. ``ExportError`` for one that is unknown or cannot be written."""
    require(name in OPSETS, f"profile is {name!r}, expected {', '.join(OPSETS)}", ExportError)
    number = OPSETS[name][0] if opset is None else opset
    wanted = " or ".join(map(str, OPSETS[name]))
    wrong = f"opset is {opset!r}, but profile '{name}' is written for {wanted}; leave opset out, or take another profile"
    require(type(number) is int and number in OPSETS[name], wrong, ExportError)
    return Profile(name, number, IR_VERSIONS[number], contrib=name == "ort")


ALL = tuple(profile(name, opset) for name, opsets in OPSETS.items() for opset in opsets)
"""Every profile with every opset that it can have."""
