"""What readers of stored graphs refuse: newer formats, other versions of an op, attributes that an op does not have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from deltaloom.graph.errors import GraphError
from deltaloom.graph.ir import FORMAT_VERSION, Call
from deltaloom.graph.op import Attribute, Op
from deltaloom.graph.registry import OpRegistry


def check_format(version: int, what: str) -> None:
    """Refuse a format that this version does not know."""
    if not 1 <= version <= FORMAT_VERSION:
        raise GraphError(
            f"{what} has format {version}, and this deltaloom reads up to format {FORMAT_VERSION}; "
            "read it with a newer deltaloom or write it again"
        )


def make_op(name: str, version: int, attributes: Mapping[str, Attribute], registry: OpRegistry) -> Op:
    """The op with these attributes. Raises ``GraphError`` for an unknown op, another version of it, an attribute that
    is unknown or of a wrong type, or one that is missing and has no default."""
    cls = Call if name == Call.name else registry.get(name)
    if version != cls.version:
        raise GraphError(
            f"op {name} is stored in version {version}, and this deltaloom has version {cls.version}, whose meaning "
            "differs; build the graph again"
        )
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(attributes) - set(known)):
        raise GraphError(f"op {name} has no attribute '{unknown[0]}'; it has {', '.join(sorted(known)) or 'none'}")
    hints = get_type_hints(cls)
    for key, field in known.items():
        if key not in attributes and field.default is MISSING:
            raise GraphError(f"op {name} needs the attribute '{key}'")
        if key in attributes and not fits(attributes[key], hints[key]):
            raise GraphError(f"attribute '{key}' of op {name} is {attributes[key]!r}, expected {field.type}")
    return cls(**attributes)


def fits(value: Attribute, hint: Any) -> bool:
    """Whether ``value`` may stand for an attribute declared as ``hint``; an integer may stand for a float."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType) or get_origin(hint) is not tuple and get_args(hint):
        return any(fits(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(fits(v, part) for v, part in zip(value, parts, strict=True))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
