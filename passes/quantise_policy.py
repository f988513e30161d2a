"""Which weight is stored in which form: schemes by name, a policy of patterns over the names of checkpoint parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import cache

from deltaloom.graph.errors import ConfigError, require
from deltaloom.graph.ir import Graph
from deltaloom.graph.types import DType, QuantType, bf16, f8_e4m3, f32, i4, i8

Policy = tuple[tuple[str, str], ...]
"""(pattern, scheme); the first pattern that matches a parameter decides."""

Form = QuantType | DType
"""What a weight is stored in: codes and scales, or numbers of fewer bits than x has."""

PLAIN = "plain"
"""The scheme of weights that stay as they are."""

SCHEMES: dict[str, Form] = {
    "bf16": bf16,
    "int8": QuantType(i8, (1, None), f32),
    "int4": QuantType(i4, (1, 32), bf16),
    "fp8": QuantType(f8_e4m3, (128, 128), f32),
}
"""Name -> form; ``int8_g64`` and ``int4_g64`` have groups of so many inputs instead."""

PROTECTED = (
    "norm",
    "conv1d",
    "A_log",
    "dt_bias",
    "in_proj_ba",
    "mlp.gate.",
    "shared_expert_gate",
    "mtp.fc",
    "embed_tokens",
    "lm_head",
)
"""Parts of names that stay plain unless a pattern contains that part: small or sensitive weights, and the vocabulary's. bfloat16,
in which most checkpoints are published, is precise enough for all of them."""

_GROUPED = re.compile(r"(int8|int4)_g([1-9]\d*)")


def scheme_type(scheme: str) -> Form | None:
    """The form of a scheme, None for ``plain``; ``ConfigError`` for an unknown one."""
    if scheme == PLAIN or scheme in SCHEMES:
        return SCHEMES.get(scheme)
    found = _GROUPED.fullmatch(scheme)
    known = f"{', '.join(SCHEMES)}, int8_gN and int4_gN with groups of N, {PLAIN}"
    require(found is not None, f"quantise: there is no scheme '{scheme}'; known are {known}", ConfigError)
    assert found is not None
    group = int(found[2])
    require(group > 1 and group % 2 == 0, f"quantise: {scheme} has groups of {group}; expected an even number", ConfigError)
    return QuantType(i8 if found[1] == "int8" else i4, (1, group), bf16)


def quantise_policy(value: object, origin: str = "quantise") -> Policy:
    """A policy from what a user writes: a scheme for everything, a table pattern -> scheme, or pairs of both, in order.
    ``ConfigError`` for anything else and for unknown schemes."""
    pairs: object = value
    if isinstance(value, str):
        pairs = [("*", value)]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    wanted = "expected a scheme such as 'int8', or a table of pattern = scheme"
    require(isinstance(pairs, Sequence) and not isinstance(pairs, str), f"{origin} is {value!r}; {wanted}", ConfigError)
    assert isinstance(pairs, Sequence)
    policy = []
    for pair in pairs:
        good = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        require(good, f"{origin} has {pair!r}; {wanted}", ConfigError)
        scheme_type(pair[1])
        policy.append((pair[0], pair[1]))
    return tuple(policy)


def scheme_of(policy: Policy, prefix: str, name: str) -> str:
    """The scheme of the parameter ``prefix + name``; patterns match the full name or the one within its layer."""
    full = prefix + name
    guarded = [part for part in PROTECTED if part in full]
    for pattern, scheme in policy:
        named = isinstance(scheme_type(scheme), DType) or all(part.rstrip(".") in pattern for part in guarded)
        if named and matches(pattern, full, name):
            return scheme
    return PLAIN


def matches(pattern: str, *names: str) -> bool:
    """Whether a shell pattern matches one of the names."""
    return any(_compiled(pattern).match(name) for name in names)


def check_matches(policy: Policy, names: Iterable[tuple[str, str]]) -> None:
    """``ConfigError`` for a pattern that matches none of the parameters, given as prefix and name within the layer."""
    parameters = list(names)
    for pattern, _ in policy:
        found = any(matches(pattern, prefix + name, name) for prefix, name in parameters)
        example = "".join(parameters[0]) if parameters else "none"
        message = f"quantise: the pattern '{pattern}' matches no parameter of the model; they are called for example {example}"
        require(found, message, ConfigError)


def parameter_names(graph: Graph) -> Iterator[tuple[str, str]]:
    """Prefix and name within the layer of every checkpoint parameter of a model's graph."""
    return ((instance.prefix, value.name) for instance in graph.instances() for value in instance.graph.params)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def most_exact(forms: Iterable[Form | None]) -> Form | None:
    """The form that loses least: none at all, bfloat16, then integers of 8 bits, FP8, 4 bits, each in the smallest blocks."""
    found = list(forms)
    return None if None in found else min((form for form in found if form is not None), key=_loss)


def _loss(form: Form) -> tuple[int, float]:
    if isinstance(form, DType):
        return -1, 0
    rows, columns = form.block
    return (i8, f8_e4m3, i4).index(form.storage), rows * (columns or 1 << 20)
