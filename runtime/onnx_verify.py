"""Is an exported model right: the file by itself, and its logits beside the compiler's own in float32.

A whole model runs in ONNX Runtime with all rewrites and with none, over prompts of many lengths, with and without a past, in
batches, in chunks and padded on the left. So does a part, on the numbers that its graph gives it, beside what the definitions of
its ops make of them; one op in onnx's reference evaluator too. The MTP head runs on seeded numbers, where the levels must agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaloom.backends.onnx.verify import evaluator, file_faults, open_session, some_inputs
from deltaloom.graph.op import Array
from deltaloom.runtime.onnx_cases import Subject
from deltaloom.runtime.onnx_part import PartCheck, Run, limit_of

if TYPE_CHECKING:
    from deltaloom.runtime.model import Model
    from deltaloom.runtime.onnx_export import ExportResult

TOKENS = (1, 4, 5, 15, 16, 17, 53)
PAST = (0, 7)
BATCHES = (1, 2)
PROMPT = ("input_ids", "attention_mask", "position_ids")
NO_STATES = ("logits", "hidden_states")
LIMITS = {"float32": 3e-4, "bfloat16-storage": 3e-4, "float16": 2e-2}
"""Largest error of a token's logits, relative to the largest logit."""
BEYOND = {"float16": 0.01}
"""Share of tokens that may be beyond the limit: where rounding chooses another expert, a token goes another way."""
LEVELS = 1e-5
"""How far the two levels of optimisation may be apart on a part."""


@dataclass(frozen=True)
class VerifyRow:
    """One check. ``error`` and ``limit`` are relative to the largest element; ``note`` says what is wrong."""

    case: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.note and self.error <= self.limit


@dataclass
class VerifyReport:
    """All checks of a file."""

    file: str
    rows: list[VerifyRow] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[str]:
        """A sentence for each check that does not hold."""
        return [
            f"{self.file}: {row.case}: {row.note or f'off by {row.error:.2g} of the largest element, allowed {row.limit:.2g}'}"
            for row in self.rows
            if not row.ok
        ]


def verify_export(
    result: ExportResult, model: Model | None, dtype: str = "float32", *, subject: Subject | None = None, one_op: bool = False
) -> VerifyReport:
    """Check what was exported. ``model``: the same model, loaded; else ``subject``: the part of a graph that it is; with neither,
    its numbers are compared with themselves. ``one_op``: it is one op."""
    report = VerifyReport(result.path.name)
    faults = file_faults(result.path)
    report.rows += [VerifyRow("file", 0.0, 0.0, fault) for fault in faults] or [VerifyRow("file: checker and shapes", 0.0, 0.0)]
    try:
        sessions = {name: open_session(result.path, optimised=name == "all") for name in ("all", "none")}
    except Exception as error:  # ONNX Runtime raises many kinds
        report.rows.append(VerifyRow("load", 0.0, 0.0, f"ONNX Runtime refuses it: {str(error).splitlines()[0]}"))
        return report
    try:
        if subject is not None:
            _check_subject(report, result, sessions, subject, one_op)
        elif model is None:
            _check_alone(report, sessions)
        else:
            for level, session in sessions.items():
                rows = list(_checks(_Runner(session, level), model, LIMITS[dtype]))
                report.rows += rows if dtype not in BEYOND else [_share(rows, level, BEYOND[dtype])]
    except Exception as error:
        report.rows.append(VerifyRow("run", 0.0, 0.0, f"ONNX Runtime cannot run it: {str(error).splitlines()[0]}"))
    return report


def _check_subject(report: VerifyReport, result: ExportResult, sessions: dict[str, Any], subject: Subject, one_op: bool) -> None:
    ways: dict[str, Run] = {f"{level} rewrites": partial(session.run, None) for level, session in sessions.items()}
    if one_op and result.profile != "ort":
        ways["reference evaluator"] = evaluator(result.path)
    given = [(one.name, one.type, one.shape) for one in sessions["all"].get_inputs()]
    for way, run in ways.items():
        for case, error in PartCheck(subject, given, run).errors():
            report.rows.append(VerifyRow(f"{case}, {way}", error, limit_of(subject)))


def _check_alone(report: VerifyReport, sessions: dict[str, Any]) -> None:
    feeds = some_inputs(sessions["all"])
    every, none = (session.run(None, feeds) for session in sessions.values())
    report.rows.append(VerifyRow("all rewrites against none", max(map(_error, every, none), default=0.0), LEVELS))


class _Runner:
    """An exported model in one session."""

    def __init__(self, session: Any, level: str) -> None:
        self.level = level
        self._session = session
        self._states = [given for given in session.get_inputs() if given.name not in PROMPT]
        self._outputs = [output.name for output in session.get_outputs()]

    def logits(self, ids: Array, mask: Array, cuts: Sequence[int]) -> Array:
        """Logits ``[batch, tokens, vocab]`` of ``ids``, given in pieces that end at ``cuts``."""
        sizes = {"batch_size": len(ids), "past_sequence_length": 0}
        kinds = {"tensor(float16)": np.float16}
        states = {
            one.name: np.zeros([sizes.get(size, size) for size in one.shape], kinds.get(one.type, np.float32))
            for one in self._states
        }
        places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        parts: list[Array] = []
        for begin, end in zip((0, *cuts), (*cuts, ids.shape[1])):
            if begin == end:
                continue
            now = {"input_ids": ids[:, begin:end], "attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
            found = dict(zip(self._outputs, self._session.run(None, {**now, **states}), strict=True))
            parts.append(found["logits"])
            made = [value for name, value in found.items() if name not in NO_STATES]
            states = {one.name: value for one, value in zip(self._states, made, strict=True)}
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class _TokenRow(VerifyRow):
    """A check of some tokens: how many, and how many of them are beyond the limit."""

    tokens: int = 0
    beyond: int = 0


def _checks(runner: _Runner, model: Model, limit: float) -> Iterator[_TokenRow]:
    """The logits of a model, case by case."""
    rng = np.random.default_rng(0)
    size = min(model.config.vocab_size, 1 << 16)

    def check(case: str, got: Array, wanted: Array) -> _TokenRow:
        scale = np.abs(wanted).max()
        errors = np.nan_to_num(np.abs(got.astype(np.float64) - wanted).max(axis=-1), nan=np.inf) / scale
        top = np.sort(wanted, axis=-1)[..., -2:]
        other = (got.argmax(axis=-1) != wanted.argmax(axis=-1)) & (top[..., 1] - top[..., 0] > limit * scale)
        note = f"{int(other.sum())} of {other.size} likeliest tokens are others" if other.any() else ""
        beyond = int(((errors > limit) | other).sum())
        return _TokenRow(f"{case}, {runner.level} rewrites", float(errors.max()), limit, note, other.size, beyond)

    for batch in BATCHES:
        for past in PAST:
            for count in TOKENS:
                ids = rng.integers(0, size, (batch, past + count))
                got = runner.logits(ids, np.ones_like(ids), (past,))
                yield check(f"batch {batch}, past {past}, {count} tokens", got, _wanted(model, ids))
    ids = rng.integers(0, size, (1, 23))
    yield check("16 tokens, then one by one", runner.logits(ids, np.ones_like(ids), range(16, 23)), _wanted(model, ids))
    padded = np.concatenate([np.zeros((1, 6), ids.dtype), ids], axis=1)
    mask = np.concatenate([np.zeros((1, 6), ids.dtype), np.ones_like(ids)], axis=1)
    yield check("padded on the left", runner.logits(padded, mask, (20,))[:, 6:], _wanted(model, ids))


def _share(rows: Sequence[_TokenRow], level: str, allowed: float) -> VerifyRow:
    """All cases as one: the share of tokens beyond the limit."""
    tokens, beyond = sum(row.tokens for row in rows), sum(row.beyond for row in rows)
    return VerifyRow(f"share of {tokens} tokens beyond {rows[0].limit}, {level} rewrites", beyond / tokens, allowed)


def _wanted(model: Model, ids: Array) -> Array:
    logits = model.forward(ids).logits
    assert logits is not None
    return logits


def _error(got: Array, wanted: Array) -> float:
    """The largest error relative to the largest element; what is not finite must be the same."""
    left, right = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(right)
    if left.shape != right.shape or not np.array_equal(left[~finite], right[~finite], equal_nan=True):
        return float("inf")
    scale = float(np.abs(right[finite]).max(initial=1e-30))
    return float(np.nan_to_num(np.abs(left[finite] - right[finite]), nan=np.inf).max(initial=0.0)) / scale
