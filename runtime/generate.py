"""The generation loop: a batch of prompts is prefilled in one call, then decoded token by token until each row ends.

Prompts of different lengths are padded on the left under a mask. The samples of a prompt share its prefill; a row that
ends leaves the batch. What a row gets depends neither on its batch mates nor on the order: its random numbers are a
function of seed, sample index and position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from deltaloom.graph.errors import RequestError
from deltaloom.graph.op import Array
from deltaloom.runtime.model import Model
from deltaloom.runtime.params import ResolvedParams
from deltaloom.runtime.results import Piece
from deltaloom.runtime.sampler import SequenceHistory, non_finite_rows, sample
from deltaloom.runtime.state import ModelState
from deltaloom.runtime.stopping import OutputText
from deltaloom.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt with nothing left open. ``index`` is its place in the caller's list, ``max_tokens`` fits the context."""

    index: int
    prompt_ids: Sequence[int]
    params: ResolvedParams


@dataclass
class Timings:
    """Seconds that a group of requests took so far."""

    prefill: float = 0.0
    decode: float = 0.0


class _Sample:
    """One row of a batch: the text so far, and what the sampler must know."""

    def __init__(self, request: Request, row: int, sample_index: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.row = row
        self.index = sample_index
        self.history = SequenceHistory(request.params, request.prompt_ids, sample_index=sample_index)
        self.output = OutputText(tokenizer, request.params)


def groups(requests: Sequence[Request], max_batch: int) -> list[list[Request]]:
    """The requests in groups of at most ``max_batch``, sorted by prompt length so that little is padded."""
    ordered = sorted(requests, key=lambda request: len(request.prompt_ids))
    return [ordered[start : start + max_batch] for start in range(0, len(ordered), max_batch)]


def left_padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Array, Array | None]:
    """Prompts as int64 ``[batch, longest]``, and the 0/1 mask of that shape (None where all are equally long)."""
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad, np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, None if mask.all() else mask


def run_group(
    model: Model, tokenizer: Tokenizer, requests: Sequence[Request], max_batch: int, timings: Timings
) -> Iterator[tuple[int, Piece]]:
    """Every token of every sample as it comes: (request index, piece). At most ``max_batch`` rows decode at a time.

    Raises RequestError naming the prompt if its logits are not finite.
    """
    started = perf_counter()
    ids, mask = left_padded([request.prompt_ids for request in requests])
    prefilled = model.forward(ids, attention_mask=mask, logits="last")
    timings.prefill += perf_counter() - started
    assert prefilled.logits is not None
    samples = [_Sample(request, row, index, tokenizer) for row, request in enumerate(requests) for index in range(request.params.n)]
    for start in range(0, len(samples), max_batch):
        part = samples[start : start + max_batch]
        rows = [one.row for one in part]
        state = prefilled.state if len(samples) == len(requests) else prefilled.state.select(rows)
        yield from _decode(model, tokenizer.vocab_size, state, prefilled.logits[rows, 0], part, timings)


def _decode(
    model: Model, allowed: int, state: ModelState, logits: Array, samples: Sequence[_Sample], timings: Timings
) -> Iterator[tuple[int, Piece]]:
    live = list(samples)
    while True:
        started = perf_counter()
        _refuse_non_finite(logits, live)
        chosen = sample(logits, [one.history for one in live], allowed=allowed)
        timings.decode += perf_counter() - started
        for one, token, logprobs in zip(live, chosen.ids.tolist(), chosen.logprobs, strict=True):
            one.history.append(token)
            step = one.output.push(token)
            piece = Piece(step.text, [token], one.index, step.finish_reason, step.stop_reason, logprobs)
            yield one.request.index, piece
        kept = [row for row, one in enumerate(live) if one.output.finish_reason is None]
        if not kept:
            return
        started = perf_counter()
        if len(kept) < len(live):
            state, live = state.select(kept), [live[row] for row in kept]
        output = model.forward(chosen.ids[kept, None], state=state, logits="last")
        timings.decode += perf_counter() - started
        assert output.logits is not None
        logits = output.logits[:, 0]


def _refuse_non_finite(logits: Array, live: Sequence[_Sample]) -> None:
    broken = non_finite_rows(logits)
    if broken:
        bad = live[broken[0]]
        raise RequestError(
            f"prompt {bad.request.index}, sample {bad.index}: the logits hold NaN or infinity at position "
            f"{bad.history.position}, so no token can be chosen; check the weights (check_weights, --check-weights) "
            "and the data type that the model computes in"
        )
