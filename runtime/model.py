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
from deltaloom.runtime.state import ModelState

Logits = Literal["all", "last"] | None
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
        padding on the left. ``final_norm`` is given with hidden states unless ``output_final_norm`` says otherwise. Long inputs run
        in chunks of ``prefill_chunk`` tokens. Raises ``RequestError`` for ids outside the vocabulary, a wrong shape, or too many
        tokens.
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
        try:
            ids = np.asarray(token_ids)
        except ValueError as error:
            message = "token_ids has rows of different lengths; pad them on the left and give an attention_mask"
            raise RequestError(message) from error
        ids = ids[None] if ids.ndim == 1 else ids
        good = ids.ndim == 2 and ids.size > 0 and ids.dtype.kind in "iu"
        require(good, f"token_ids is {describe(ids)} of {ids.dtype}, expected whole numbers [batch, n >= 1]", RequestError)
        low, high = int(ids.min()), int(ids.max())
        vocab = self.config.vocab_size
        require(
            0 <= low and high < vocab,
            f"token id {low if low < 0 else high} is outside the vocabulary 0..{vocab - 1}",
            RequestError,
        )
        if state is not None:
            require(
                state.batch == ids.shape[0], f"token_ids has {ids.shape[0]} rows, the state {state.batch}", RequestError
            )
        return ids.astype(np.int64, copy=False)


class MtpHead:
    """The multi-token-prediction head (specification section 9): one application predicts the token after next."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor

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
        the token that follows. Gives ``logits`` float32 ``[batch, n, vocab]`` and ``hidden`` (after ``mtp.norm``) by name."""
        ids, places = np.asarray(next_ids, np.int64), np.asarray(positions, np.int64)
        features = np.asarray(hidden)
        require(
            ids.ndim == 2 and ids.shape == places.shape == features.shape[:2] and ids.shape[0] == state.batch,
            f"next_ids is {describe(ids)}, positions {describe(places)}, hidden {describe(features)}; expected [batch, n], "
            f"[batch, n], [batch, n, hidden] with batch {state.batch}",
            RequestError,
        )
        valid = _new_valid(attention_mask, state, ids.shape)
        inputs = {"next_ids": ids, "hidden": features, "positions": places}
        results = self.executor.run(inputs, state, valid, outputs)
        return {name: a.astype(np.float32, copy=False) if "logits" in name else a for name, a in results.items()}


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
    found = np.asarray(mask)
    batch, count = shape
    full = (batch, state.length + count)
    require(
        found.shape in (full, (batch, count)),
        f"attention_mask has shape {list(found.shape)}, expected {[batch, count]} or {list(full)}",
        RequestError,
    )
    found = found.astype(bool)
    if found.shape == full and state.length:
        seen = np.ones((batch, state.length), bool) if state.valid is None else state.valid
        require(
            bool((found[:, : state.length] == seen).all()),
            "attention_mask changes the padding of tokens that the state has already seen; give the same mask as before",
            RequestError,
        )
    return found[:, -count:]
