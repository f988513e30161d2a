"""The golden data under tests/golden, read for any engine: what to run, in which order, and what to expect.

An engine is run over ``walk(case)``, carrying its state from stage to stage, and over ``mtp_rounds(case)``; the results go to
``compare`` and ``close``, which assert the golden tolerance and give the largest deviation. Arrays are those of
tests/golden/README.md.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]
FOLDER = Path(__file__).parents[1] / "golden"
VARIANTS = tuple(sorted(path.parent.name for path in FOLDER.glob("*/expected.safetensors")))
SHORT = 24  # the length of prompts up to which a case is not slow
NOT_SLOW = {("next_base", "t65")}  # and these: a chunk and one token, with caches


@dataclass(frozen=True)
class Case:
    """One batch of sequences of one variant; ``taps`` is the width of the convolution (0 without one)."""

    variant: str
    name: str
    prompt: int
    atol: float
    rtol: float
    taps: int

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return FOLDER / self.variant

    @property
    def slow(self) -> bool:
        """Whether a default run over an engine that takes long leaves it out; every variant keeps its shortest case."""
        shortest = min(_prompts(self.variant).values())
        return self.prompt > max(SHORT, shortest) and (self.variant, self.name) not in NOT_SLOW

    def __str__(self) -> str:
        return f"{self.variant}-{self.name}"


@dataclass(frozen=True)
class Stage:
    """One run of the model: n new tokens after ``past`` others. Padding is False in ``valid`` [B, past + n]."""

    name: str
    token_ids: Array
    positions: Array
    valid: Array
    logits: Array
    hidden: Array
    final_norm: Array
    states: Mapping[str, Array] = field(default_factory=dict)  # of the states' full names; conv has its K - 1 columns
    details: Mapping[str, Array] = field(default_factory=dict)  # "LAYER.NAME"
    logits_bfloat16: Array | None = None

    @property
    def past(self) -> int:
        return int(self.valid.shape[1] - self.token_ids.shape[1])

    @property
    def real(self) -> Array:
        """bool [B, n]: which of the new tokens are not padding."""
        return self.valid[:, self.past :]


@dataclass(frozen=True)
class Draft:
    """A further application of the MTP head to one row: batch of one, one token."""

    next_ids: Array
    positions: Array
    logits: Array  # [V]
    hidden: Array  # [H]


@dataclass(frozen=True)
class Round:
    """One round of the MTP head: its rows over the new target positions [1, n], then ``drafts``, which start from these
    rows' cache and are rolled back before the next round. ``first_draft`` is the argmax of the last row's logits."""

    name: str
    next_ids: Array
    positions: Array
    target_hidden: Array
    fc_out: Array
    layer_out: Array
    hidden: Array
    logits: Array
    first_draft: int
    drafts: tuple[Draft, ...]


def cases(variant: str | None = None) -> list[Case]:
    """The cases of one variant or of all, shortest prompt first."""
    found = []
    for name in VARIANTS if variant is None else (variant,):
        meta, config = _json(name, "meta"), _json(name, "config")
        atol, rtol = meta["suggested_tolerance"]["logits_atol"], meta["suggested_tolerance"]["rtol"]
        taps = config.get("linear_conv_kernel_dim", 0)
        found += [Case(name, case, prompt, atol, rtol, taps) for case, prompt in _prompts(name).items()]
    return sorted(found, key=lambda case: (case.variant, case.prompt, case.name))


def case_named(variant: str, name: str) -> Case:
    return next(case for case in cases(variant) if case.name == name)


def walk(case: Case) -> Iterator[Stage]:
    """The stages of ``case`` in their order; each continues from the state that the one before left."""
    arrays = _arrays(case.variant)
    past = 0
    for name in _stage_names(case):
        start = f"{case.name}.{name}."
        own = {key.removeprefix(start): array for key, array in arrays.items() if key.startswith(start)}
        tokens = own["input_ids"]
        everything = np.ones((tokens.shape[0], past + tokens.shape[1]), bool)
        yield Stage(
            name,
            tokens,
            own["position_ids"],
            own["attention_mask"].astype(bool) if "attention_mask" in own else everything,
            own["logits"],
            own["hidden"],
            own["final_norm"],
            _states(own, case.taps),
            {key.removeprefix("detail.layer."): array for key, array in own.items() if key.startswith("detail.")},
            own.get("logits_bfloat16"),
        )
        past += tokens.shape[1]


def mtp_rounds(case: Case) -> Iterator[Round]:
    """The rounds of ``case`` in their order; each continues from the cache that the rows (not the drafts) before left."""
    arrays = _arrays(case.variant)
    for number in range(1 + max(_numbers(arrays, f"mtp.{case.name}.round."), default=-1)):
        start = f"mtp.{case.name}.round.{number}."
        own = {key.removeprefix(start): array for key, array in arrays.items() if key.startswith(start)}
        ids, last = own["draft_ids"], int(own["position_ids"][-1])
        drafts = tuple(
            Draft(ids[None, step - 1 : step], np.array([[last + step]]), own["draft_logits"][step], own["draft_hidden"][step])
            for step in range(1, len(ids))
        )
        rows = {name: own[name][None] for name in ("target_hidden", "fc_out", "layer_out", "hidden", "logits")}
        yield Round(
            name=f"round.{number}",
            next_ids=own["next_ids"][None],
            positions=own["position_ids"][None],
            target_hidden=rows["target_hidden"],
            fc_out=rows["fc_out"],
            layer_out=rows["layer_out"],
            hidden=rows["hidden"],
            logits=rows["logits"],
            first_draft=int(ids[0]),
            drafts=drafts,
        )


def compare(
    case: Case,
    stage: Stage,
    *,
    logits: Array | None = None,
    hidden: Array | None = None,
    final_norm: Array | None = None,
    state: Callable[[str], Array] | None = None,
) -> dict[str, float]:
    """Assert that results agree with the golden ones where tokens are real; gives the largest absolute deviation of each.

    ``logits`` [B, n, V], ``hidden`` [L + 1, B, n, H], ``final_norm`` [B, n, H]; ``state`` gives the new state of a full name
    (``model.layers.0.linear_attn.conv`` [B, C, K - 1], ``...delta``, ``...self_attn.key``, ``...value``). What is None is
    not compared.
    """
    real, found = stage.real, {}
    if logits is not None:
        found["logits"] = close(case, f"{stage.name} logits", logits[real], stage.logits[real])
    if hidden is not None:
        found["hidden"] = close(case, f"{stage.name} hidden", hidden[:, real], stage.hidden[:, real])
    if final_norm is not None:
        found["final_norm"] = close(case, f"{stage.name} final_norm", final_norm[real], stage.final_norm[real])
    if state is not None:
        for name, expected in stage.states.items():
            kind = name.rpartition(".")[2]
            found[kind] = max(found.get(kind, 0.0), close(case, f"{stage.name} {name}", state(name), expected))
    return found


def close(case: Case, what: str, actual: Array, expected: Array) -> float:
    """Assert closeness by the case's tolerance; gives the largest absolute deviation."""
    wide = np.asarray(actual, np.float64)
    np.testing.assert_allclose(wide, expected, atol=case.atol, rtol=case.rtol, err_msg=f"{case} {what}")
    return float(np.max(np.abs(wide - expected), initial=0.0))


def _stage_names(case: Case) -> list[str]:
    described = _json(case.variant, "meta")["cases"][case.name]
    chunks = [f"chunk.{number}" for number in range(len(described["chunks"]))]
    return ["prefill", *chunks, *(f"decode.{number}" for number in range(described["decode"]))]


def _states(own: Mapping[str, Array], taps: int) -> dict[str, Array]:
    """``cache.LAYER.NAME`` by the name that the graphs give the state; the convolution's oldest column is of no use."""
    names = {
        "conv_state": "linear_attn.conv",
        "recurrent_state": "linear_attn.delta",
        "key": "self_attn.key",
        "value": "self_attn.value",
    }
    found = {}
    for key, array in own.items():
        if key.startswith("cache."):
            _, layer, name = key.split(".")
            found[f"model.layers.{layer}.{names[name]}"] = array[..., 1 - taps :] if name == "conv_state" else array
    return found


def _numbers(names: Mapping[str, Array], start: str) -> set[int]:
    return {int(name.removeprefix(start).partition(".")[0]) for name in names if name.startswith(start)}


@cache
def _prompts(variant: str) -> dict[str, int]:
    return {name: case["T"] for name, case in _json(variant, "meta")["cases"].items()}


@cache
def _json(variant: str, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((FOLDER / variant / f"{name}.json").read_text())
    return values


@cache
def _arrays(variant: str) -> dict[str, Array]:
    with safe_open(FOLDER / variant / "expected.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}
