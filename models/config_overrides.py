"""One spelling for the fields of config.json, and the deep merge behind ``--hf-overrides``."""

from collections.abc import Mapping

from deltaloom.graph.errors import ConfigError
from deltaloom.models.json_fields import describe
from deltaloom.models.rope_config import effective_rope

# transformers 5 renamed torch_dtype, and writes num_local_experts for qwen3_moe
RENAMED = {"torch_dtype": "dtype", "num_local_experts": "num_experts"}
_ROPE_OBJECTS = ("rope_scaling", "rope_parameters")
_ROPE_NUMBERS = ("rope_theta", "partial_rotary_factor")


def canonical_names(values: Mapping[str, object]) -> dict[str, object]:
    """``values`` with renamed fields under the one name that the reader knows; ConfigError if old and new disagree."""
    result: dict[str, object] = {}
    for name, value in values.items():
        new = RENAMED.get(name, name)
        if new == "dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")
        if new in result and (result[new] != value or type(result[new]) is not type(value)):
            old = next(before for before, after in RENAMED.items() if after == new)
            raise ConfigError(
                f"{new} and {old} are two names of one field but differ: {describe(result[new])} and "
                f"{describe(value)}; keep one of them."
            )
        result[new] = value
    return result


def merge_overrides(values: Mapping[str, object], overrides: Mapping[str, object]) -> dict[str, object]:
    """``values`` with ``overrides`` on top: objects merge, other values replace, ``a.b`` reaches into ``a``.

    Rotary overrides go to where this config keeps them, in either form: setting a YaRN factor never loses theta.
    """
    expanded = canonical_names(_expand(overrides))
    rotary = {name: expanded.pop(name) for name in (*_ROPE_OBJECTS, *_ROPE_NUMBERS) if name in expanded}
    return _merge_rope(_deep_merge(values, expanded, ""), rotary)


def _expand(overrides: Mapping[str, object]) -> dict[str, object]:
    """Dotted keys as nested objects; ConfigError if one key needs an object where another sets a plain value."""
    result: dict[str, object] = {}
    for key, value in overrides.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise ConfigError(f"the override {key!r} is not a field name; expected a name, or names joined by dots.")
        *parents, last = key.split(".")
        nested: object = _expand(value) if isinstance(value, Mapping) else value
        for parent in reversed([*parents, last]):
            nested = {parent: nested}
        assert isinstance(nested, dict)
        result = _deep_merge(result, nested, "")
    return result


def _deep_merge(base: Mapping[str, object], over: Mapping[str, object], where: str) -> dict[str, object]:
    result = dict(base)
    for name, value in over.items():
        before = result.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            result[name] = _deep_merge(before, value, f"{where}{name}.")
        elif isinstance(value, Mapping) and before is not None:
            raise ConfigError(
                f"the override of {where}{name} is an object, but the field holds {describe(before)}; "
                "give a plain value."
            )
        else:
            result[name] = dict(value) if isinstance(value, Mapping) else value
    return result


def _merge_rope(values: dict[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """``values`` with the rotary ``changes`` in the object that decides, each of its numbers in one place only."""
    target, inner = effective_rope(values)
    given: dict[str, object] = {name: changes[name] for name in _ROPE_NUMBERS if name in changes}
    for name in _ROPE_OBJECTS:
        change = changes.get(name, {})
        if change is None:  # back to plain rotation; theta stays
            change = {"rope_type": "default"}
        if not isinstance(change, Mapping):
            raise ConfigError(f"the override of {name} is {describe(change)}; expected an object or null.")
        for number in _ROPE_NUMBERS:
            if number in change and given.setdefault(number, change[number]) != change[number]:
                raise ConfigError(
                    f"the overrides give {number} as {given[number]!r} and as {change[number]!r}; keep one of them."
                )
        inner = _change_rope(inner, change)
    for number, value in given.items():
        inner.pop(number, None)
        values.pop(number, None)
        (inner or values)[number] = value
    if inner:
        values[target] = inner
    return values


def _change_rope(inner: Mapping[str, object], change: Mapping[str, object]) -> dict[str, object]:
    """A change of the rope type drops what belonged to the old type, all but theta and the partial factor."""
    before, after = _with_rope_type(inner), _with_rope_type(change)
    if "rope_type" in after and after["rope_type"] != before.get("rope_type", "default"):
        before = {name: before[name] for name in _ROPE_NUMBERS if name in before}
    return {**before, **after}


def _with_rope_type(rope: Mapping[str, object]) -> dict[str, object]:
    """``type`` is the older name of ``rope_type``."""
    return {
        ("rope_type" if name == "type" and "rope_type" not in rope else name): value for name, value in rope.items()
    }
