"""The generation loop: a batch of prompts is prefilled in one call, then decoded token by token until each row ends.

Prompts of different lengths are padded on the left under a mask. The samples of a prompt share its prefill; a row that
ends leaves the batch. What a row gets depends neither on its batch mates nor on the order: its random numbers are a
function of seed, sample index and position.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from deltaloom.graph.errors import RequestError
from deltaloom.graph.op import Array
from deltaloom.runtime.model import Model
from deltaloom.runtime.params import ResolvedParams
from deltaloom.runtime.recorded import RecordedRows, records
from deltaloom.runtime.results import Piece
from deltaloom.runtime.sampler import SequenceHistory, TokenLogprobs, non_finite_rows, sample
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

    def take(self, token: int, logprobs: TokenLogprobs | None = None) -> Piece:
        """The piece that ``token`` adds."""
        self.history.append(token)
        step = self.output.push(token)
        return Piece(step.text, [token], self.index, step.finish_reason, step.stop_reason, logprobs)


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
        by_step = records(model.main) and not any(_needs_host(one.history.params) for one in part)
        decode = _decode_recorded if by_step else _decode
        yield from decode(model, tokenizer.vocab_size, state, prefilled.logits[rows, 0], part, timings)


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
            yield one.request.index, one.take(token, logprobs)
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


def _decode_recorded(
    model: Model, allowed: int, state: ModelState, logits: Array, samples: Sequence[_Sample], timings: Timings
) -> Iterator[tuple[int, Piece]]:
    """``_decode`` where the backend records a step: the first token is chosen here, all others on the device."""
    started = perf_counter()
    _refuse_non_finite(logits, samples)
    chosen = sample(logits, [one.history for one in samples], allowed=allowed)
    for one, token in zip(samples, chosen.ids.tolist(), strict=True):
        yield one.request.index, one.take(token)
    kept = [row for row, one in enumerate(samples) if one.output.finish_reason is None]
    if not kept:
        return
    live = dict(enumerate(samples[row] for row in kept))
    rows = RecordedRows(
        model.main, state if len(kept) == len(samples) else state.select(kept), allowed=allowed, draws=_draws(list(live.values()))
    )
    for tokens in rows.steps(chosen.ids[kept].tolist()):
        timings.decode += perf_counter() - started
        _refuse_broken([row for row, token in enumerate(tokens) if token < 0 and row in live], live)
        for row, one in list(live.items()):
            yield one.request.index, one.take(tokens[row])
            if one.output.finish_reason is not None:
                rows.free(row)
                del live[row]
        started = perf_counter()


def _needs_host(params: ResolvedParams) -> bool:
    """Whether a token of the request depends on more than its own logits and a random number, or more than the token is asked
    for."""
    return params.penalised or bool(params.logit_bias) or params.logprobs is not None or params.min_tokens > 0


def _draws(samples: Sequence[_Sample]) -> dict[str, Array]:
    """What a recorded step must know of rows that are drawn; nothing where all take the likeliest token."""
    params = [one.history.params for one in samples]
    if all(entry.greedy for entry in params):
        return {}
    return {
        "seed": np.asarray([entry.seed for entry in params], np.uint64).view(np.int64),
        "sample_index": np.asarray([one.index for one in samples], np.int64),
        "greedy": np.asarray([entry.greedy for entry in params], np.int64),
        "temperature": np.asarray([entry.temperature or 1.0 for entry in params], np.float64),
        "top_k": np.asarray([entry.top_k for entry in params], np.int64),
        "top_p": np.asarray([entry.top_p for entry in params], np.float64),
        "min_p": np.asarray([entry.min_p for entry in params], np.float64),
    }


def _refuse_non_finite(logits: Array, live: Sequence[_Sample]) -> None:
    _refuse_broken(non_finite_rows(logits), live)


def _refuse_broken(broken: Sequence[int], live: Sequence[_Sample] | Mapping[int, _Sample]) -> None:
    if broken:
        bad = live[broken[0]]
        raise RequestError(
            f"prompt {bad.request.index}, sample {bad.index}: the logits hold NaN or infinity at position "
            f"{bad.history.position}, so no token can be chosen; check the weights (check_weights, --check-weights) "
            "and the data type that the model computes in"
        )
