"""A loaded model: ``forward`` on token ids with explicit state, and the MTP head beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.op import Array
from deltaloom.models.config import ModelConfig
from deltaloom.passes.pipeline import Context
from deltaloom.runtime.executor import Executor, describe
from deltaloom.runtime.state import ModelState, prompt_room, require_state

Logits = Literal["all", "last"] | None
LARGEST_POSITION = 2**53
TokenIds = Sequence[int] | Sequence[Sequence[int]] | Array


@dataclass(frozen=True)
class Output:
    """What ``forward`` gives, as host arrays. ``logits`` float32 ``[batch, n, vocab]`` (n = 1 for "last"); ``hidden_states``
    ``[layers + 1, batch, n, hidden]``, the embedding output first; ``final_norm`` ``[batch, n, hidden]`` after the last norm."""

    logits: Array | None
    hidden_states: Array | None
    final_norm: Array | None
    state: ModelState


class Model:
    """A compiled model with its weights. Calls on different states may come from different threads; a state has one user."""

    def __init__(
        self, config: ModelConfig, ctx: Context, main: Executor, mtp: MtpHead | None, *, folder: Path, max_model_len: int
    ) -> None:
        self.config = config
        self.ctx = ctx
        self.main = main
        self.mtp = mtp
        self.folder = folder
        self.max_model_len = max_model_len

    def new_state(self, batch: int = 1) -> ModelState:
        """An empty state for ``batch`` sequences."""
        return self.main.new_state(batch)

    def forward(
        self,
        token_ids: TokenIds,
        *,
        state: ModelState | None = None,
        attention_mask: Array | None = None,
        logits: Logits = "all",
        output_hidden_states: bool = False,
        output_final_norm: bool | None = None,
    ) -> Output:
        """Run ``n >= 1`` tokens a row and continue ``state`` (a new one if None).

        ``token_ids`` ``[batch, n]`` (or one row ``[n]``); ``attention_mask`` 0/1 ``[batch, n]`` or ``[batch, all so far]``, 0 for
        padding on the left; after a row's first token padding is refused, as it would spoil the state. ``final_norm`` is given with
        hidden states unless ``output_final_norm`` says otherwise. Long inputs run in chunks of ``prefill_chunk`` tokens. Raises
        ``RequestError`` for ids outside the vocabulary, a wrong shape or mask, a state of another model, or too many tokens.
        """
        ids = self._ids(token_ids, state)
        state = state or self.new_state(ids.shape[0])
        valid = _new_valid(attention_mask, state, ids.shape)
        total = _longest_row(state, valid, ids.shape[1])
        require(
            total <= self.max_model_len,
            f"{total} tokens are more than the maximum context length of {self.max_model_len}; shorten the prompt or raise "
            "max_model_len (--max-model-len)",
            RequestError,
        )
        require(logits in ("all", "last", None), f"logits is {logits!r}, expected 'all', 'last' or None", RequestError)
        final = output_hidden_states if output_final_norm is None else output_final_norm
        hidden = tuple(f"hidden.{i}" for i in range(self.config.num_hidden_layers + 1)) if output_hidden_states else ()
        always = (*hidden, *(("final_norm",) if final else ()), *(("logits",) if logits == "all" else ()))
        parts: list[dict[str, Array]] = []
        step = self.ctx.config.prefill_chunk
        if ids.shape[1] > step:  # room at once: buffers that grow chunk by chunk leave as much again behind
            state.append(prompt_room(ids.shape[1], step))
        for start in range(0, ids.shape[1], step):
            last = start + step >= ids.shape[1]
            wanted = always + (("last_logits",) if logits == "last" and last else ())
            chunk = ids[:, start : start + step]
            mask = None if valid is None else valid[:, start : start + step]
            parts.append(self.main.run({"token_ids": chunk}, state, mask, wanted))
        joined = {name: _join([part[name] for part in parts]) for name in always}
        if logits == "last":
            joined["logits"] = parts[-1]["last_logits"]
        return Output(
            joined["logits"].astype(np.float32, copy=False) if logits else None,
            np.stack([joined[name] for name in hidden]) if hidden else None,
            joined.get("final_norm"),
            state,
        )

    def _ids(self, token_ids: TokenIds, state: ModelState | None) -> Array:
        ids = _as_array("token_ids", token_ids)
        ids = _whole_numbers("token_ids", ids[None] if ids.ndim == 1 else ids, self.config.vocab_size)
        if state is not None:
            require_state(state)
            require(
                state.batch == ids.shape[0], f"token_ids has {ids.shape[0]} rows, the state {state.batch}", RequestError
            )
        return ids


class MtpHead:
    """The multi-token-prediction head (specification section 9): one application predicts the token after next."""

    def __init__(self, executor: Executor, config: ModelConfig) -> None:
        self.executor = executor
        self.config = config

    def new_state(self, batch: int = 1) -> ModelState:
        """An empty state; ``state.truncate(n)`` takes back drafts."""
        return self.executor.new_state(batch)

    def forward(
        self,
        next_ids: Array,
        hidden: Array,
        positions: Array,
        state: ModelState,
        *,
        attention_mask: Array | None = None,
        outputs: tuple[str, ...] = ("logits", "hidden"),
    ) -> dict[str, Array]:
        """Rows ``i``: the hidden state after the final norm ``[batch, n, hidden]`` at ``positions`` ``[batch, n]``, with the id of
        the token that follows. Gives ``logits`` float32 ``[batch, n, vocab]`` and ``hidden`` (after ``mtp.norm``) by name. Raises
        ``RequestError`` for ids outside the vocabulary, another shape or kind, or the state of another model."""
        require_state(state)
        ids = _whole_numbers("next_ids", _as_array("next_ids", next_ids), self.config.vocab_size)
        places = _whole_numbers("positions", _as_array("positions", positions), LARGEST_POSITION)
        features, width = _as_array("hidden", hidden), self.config.hidden_size
        require(
            ids.shape == places.shape and features.shape == (*ids.shape, width) and ids.shape[0] == state.batch,
            f"next_ids is {describe(ids)}, positions {describe(places)}, hidden {describe(features)}; expected [batch, n], "
            f"[batch, n], [batch, n, {width}] with batch {state.batch}",
            RequestError,
        )
        floating = features.dtype.kind == "f" or features.dtype.name == "bfloat16"
        require(floating, f"hidden holds {features.dtype}, expected floating-point numbers", RequestError)
        valid = _new_valid(attention_mask, state, ids.shape)
        inputs = {"next_ids": ids, "hidden": features, "positions": places}
        results = self.executor.run(inputs, state, valid, outputs)
        return {name: a.astype(np.float32, copy=False) if "logits" in name else a for name, a in results.items()}


def _as_array(name: str, value: Any) -> Array:
    """``value`` (a list, array or host tensor) as an array; rows of different lengths are refused."""
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        message = f"{name} cannot be read as an array ({error}); rows of different lengths are padded on the left under a mask"
        raise RequestError(message) from None


def _whole_numbers(name: str, array: Array, limit: int) -> Array:
    """``array`` as int64, checked to be ``[batch, n >= 1]`` of whole numbers from 0 to ``limit - 1``."""
    good = array.ndim == 2 and array.size > 0 and array.dtype.kind in "iu"
    require(good, f"{name} is {describe(array)} of {array.dtype}, expected whole numbers [batch, n >= 1]", RequestError)
    low, high = int(array.min()), int(array.max())
    worst = low if low < 0 else high
    message = f"position {worst} is not one: they count from 0"
    if name != "positions":
        message = f"token id {worst} is outside the vocabulary 0..{limit - 1}"
    require(0 <= low and high < limit, message, RequestError)
    return array.astype(np.int64, copy=False)


def _require_left_padding(seen: Array, new: Array) -> None:
    """Padding after a row's first token would enter its recurrent state (specification, section 5.8), so it is refused."""
    begun = np.logical_or.accumulate(np.concatenate([seen, new], axis=1), axis=1)[:, seen.shape[1] :]
    rows = np.flatnonzero((begun & ~new).any(axis=1))
    require(
        not rows.size,
        f"attention_mask has padding after the first token of row {int(rows[0]) if rows.size else 0}; pad on the left: padding "
        "between or after tokens leaves a wrong state",
        RequestError,
    )


def _join(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _longest_row(state: ModelState, new_valid: Array | None, count: int) -> int:
    """Tokens of the longest row once ``count`` columns are added; padding takes up no context."""
    seen = state.length if state.valid is None else state.valid.sum(axis=1)
    new = count if new_valid is None else new_valid.sum(axis=1)
    return int(np.max(seen + new))


def _new_valid(mask: Any, state: ModelState, shape: tuple[int, ...]) -> Array | None:
    """The last columns of a padding mask as bool ``[batch, n]``, or None without one."""
    if mask is None:
        return None
    found = _as_array("attention_mask", mask)
    batch, count = shape
    found = found[None] if found.ndim == 1 and batch == 1 else found
    full = (batch, state.length + count)
    require(
        found.shape in (full, (batch, count)),
        f"attention_mask has shape {list(found.shape)}, expected {[batch, count]} or {list(full)}",
        RequestError,
    )
    good = found.dtype.kind in "biuf" and bool(((found == 0) | (found == 1)).all())
    require(good, f"attention_mask of {found.dtype} holds something else than 0 (padding) and 1 (tokens)", RequestError)
    found = found.astype(bool)
    seen = np.ones((batch, state.length), bool) if state.valid is None else state.valid
    _require_left_padding(seen, found[:, -count:])
    if found.shape == full and state.length:
        require(
            bool((found[:, : state.length] == seen).all()),
            "attention_mask changes the padding of tokens that the state has already seen; give the same mask as before",
            RequestError,
        )
    return found[:, -count:]
