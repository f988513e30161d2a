"""Rotary embedding: a config's fields and the frequencies that follow (Qwen3-Next specification, 2.2 and 7)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaloom.graph.errors import ConfigError
from deltaloom.models.json_fields import Fields

DEFAULT_THETA = 10000.0
_SHARED_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_YARN_KEYS = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_REFUSED_TYPES = ("linear", "dynamic", "longrope", "llama3", "su", "mrope", "proportional")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN: ``factor`` times ``original_max_position_embeddings`` tokens; the rest shapes ramp and magnitude."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class RopeConfig:
    """Rotation of each head's first ``rotary_dim`` elements in pairs ``(j, j + rotary_dim / 2)``."""

    theta: float
    rotary_dim: int
    partial_rotary_factor: float
    yarn: YarnConfig | None = None


def inverse_frequencies(rope: RopeConfig) -> NDArray[np.float64]:
    """Radians per position, float64 ``[rotary_dim / 2]``: ``theta^(-2j / rotary_dim)``, YaRN ramps to 1/factor."""
    dim = rope.rotary_dim
    pair = np.arange(dim // 2, dtype=np.float64)
    plain = rope.theta ** (-2.0 * pair / dim)
    if rope.yarn is None:
        return plain
    low, high = ramp_bounds(rope, rope.yarn)
    ramp = np.clip((pair - low) / (high - low), 0.0, 1.0)
    return plain * (1.0 - ramp) + plain / rope.yarn.factor * ramp


def ramp_bounds(rope: RopeConfig, yarn: YarnConfig) -> tuple[float, float]:
    """Indices of pairs between which YaRN passes from unchanged to fully stretched frequencies; never equal."""
    low = correction_index(rope, yarn, yarn.beta_fast)
    high = correction_index(rope, yarn, yarn.beta_slow)
    if yarn.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, float(rope.rotary_dim - 1))  # dim - 1, although there are dim / 2 pairs
    return low, high + 0.001 if low == high else high


def correction_index(rope: RopeConfig, yarn: YarnConfig, turns: float) -> float:
    """The (fractional) pair that turns ``turns`` times over the original context length."""
    wavelengths = yarn.original_max_position_embeddings / (turns * 2.0 * math.pi)
    return rope.rotary_dim * math.log(wavelengths) / (2.0 * math.log(rope.theta))


def magnitude(rope: RopeConfig) -> float:
    """The factor on cos and sin: 1 without YaRN; it enters the rotated part of the attention scores squared."""
    yarn = rope.yarn
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def read_rope(
    values: Mapping[str, object], head_dim: int, max_positions: int, default_partial: float, ignored: Collection[str] = ()
) -> RopeConfig:
    """RopeConfig from a whole config.json in the published or the transformers-5 form.

    A non-empty ``rope_scaling`` wins over ``rope_parameters``; theta and the partial factor are looked up in it, then
    at the top level, then take the library's default; ``ignored`` keys of it say nothing about the rotation. Raises ConfigError
    for what is unknown or contradicts itself.
    """
    name, inner = effective_rope(values)
    fields, top = Fields(inner, f"{name}."), Fields(values)
    kind = _rope_type(fields, name)
    _refuse_unknown_keys([key for key in inner if key not in ignored], name, kind)
    theta = _theta(fields, top, name, kind)
    default_partial = top.number("partial_rotary_factor", default_partial, above=0.0, maximum=1.0)
    partial = fields.number("partial_rotary_factor", default_partial, above=0.0, maximum=1.0)
    _refuse_difference("partial_rotary_factor", top, inner, name)
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"partial_rotary_factor {partial:g} of head_dim {head_dim} rotates {rotary_dim} elements of a head; "
            "expected an even number of at least 2."
        )
    yarn = _read_yarn(fields, max_positions) if kind == "yarn" else None
    return RopeConfig(theta, rotary_dim, partial, yarn)


def effective_rope(values: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The name and content of the object that decides: ``rope_scaling`` if not empty, else ``rope_parameters``."""
    top = Fields(values)
    scaling, parameters = top.mapping("rope_scaling"), top.mapping("rope_parameters")
    return ("rope_scaling", scaling) if scaling else ("rope_parameters", parameters or {})


def _rope_type(fields: Fields, name: str) -> str:
    kind = fields.text("rope_type", fields.text("type", "default"))
    if "type" in fields.values and fields.values["type"] != kind:
        raise ConfigError(f"{name} has rope_type {kind!r} and type {fields.values['type']!r}; keep one of them.")
    if kind not in ("default", "yarn"):
        known = "is known but not supported" if kind in _REFUSED_TYPES else "is unknown"
        raise ConfigError(f"the rope type {kind!r} in {name} {known}; supported are 'default' and 'yarn'.")
    return kind


def _refuse_unknown_keys(keys: Collection[str], name: str, kind: str) -> None:
    for key in keys:
        if key in _SHARED_KEYS or (kind == "yarn" and key in _YARN_KEYS):
            continue
        if key in _YARN_KEYS:
            raise ConfigError(
                f"{name}.{key} belongs to rope type 'yarn', but the type is {kind!r}; set rope_type or remove it."
            )
        allowed = _SHARED_KEYS + (_YARN_KEYS if kind == "yarn" else ())
        raise ConfigError(f"{name}.{key} is not a field of rope type {kind!r}; known are {', '.join(allowed)}.")


def _theta(fields: Fields, top: Fields, name: str, kind: str) -> float:
    other = top.mapping("rope_parameters") or {}
    if "rope_theta" not in fields.values and "rope_theta" not in top.values:
        if name == "rope_scaling" and "rope_theta" in other:
            raise ConfigError(
                "rope_scaling replaces rope_parameters but has no rope_theta, so the one in "
                "rope_parameters would be lost; add rope_theta to rope_scaling or merge the two objects."
            )
        if kind == "yarn":
            raise ConfigError(
                f"{name} asks for YaRN but the config has no rope_theta, neither there nor at the top "
                f"level; the library would fall back to {DEFAULT_THETA:g} without a word. Add rope_theta."
            )
    _refuse_difference("rope_theta", top, fields.values, name)
    # theta must exceed 1: YaRN divides by its logarithm
    return fields.number("rope_theta", top.number("rope_theta", DEFAULT_THETA, above=1.0), above=1.0)


def _refuse_difference(key: str, top: Fields, inner: Mapping[str, object], name: str) -> None:
    if key in inner and key in top.values and inner[key] != top.values[key]:
        raise ConfigError(
            f"{key} is {top.values[key]!r} at the top level and {inner[key]!r} in {name}; keep one of them."
        )


def _read_yarn(fields: Fields, max_positions: int) -> YarnConfig:
    original = fields.optional_integer("original_max_position_embeddings") or max_positions
    if "factor" not in fields.values:
        raise ConfigError(
            f"{fields.prefix}factor is missing; YaRN needs the ratio of the wanted context length to the original one."
        )
    factor = fields.optional_number("factor", minimum=1.0)
    if factor is None:
        factor = max_positions / original
        if factor < 1.0:
            raise ConfigError(
                f"{fields.prefix}factor is null and max_position_embeddings {max_positions} is below "
                f"the original {original}; give a factor of at least 1."
            )
    fast = fields.optional_number("beta_fast", minimum=0.0) or 32.0
    slow = fields.optional_number("beta_slow", minimum=0.0) or 1.0
    if fast < slow:
        raise ConfigError(
            f"{fields.prefix}beta_fast {fast:g} is below beta_slow {slow:g}; expected the larger number of turns first."
        )
    return YarnConfig(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=fields.optional_number("attention_factor", above=0.0),
        mscale=fields.optional_number("mscale", minimum=0.0),
        mscale_all_dim=fields.optional_number("mscale_all_dim", minimum=0.0),
        truncate=fields.boolean("truncate", True),
    )
