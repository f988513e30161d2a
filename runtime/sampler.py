"""The sampler: logits of a batch of sequences to one token each, on the host, by the rules of
`deltaloom.ops.sampling`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deltaloom.graph.errors import RequestError
from deltaloom.ops import sampling
from deltaloom.ops.philox import Purpose, uniform
from deltaloom.runtime.params import ResolvedParams


class SequenceHistory:
    """What the sampler must know of one sequence: its parameters, its length and, for penalties, its token counts."""

    def __init__(self, params: ResolvedParams, prompt_ids: Sequence[int], *, sample_index: int = 0) -> None:
        """``sample_index``: which of the request's ``n`` samples this is; each has its own random numbers."""
        self.params = params
        self.sample_index = sample_index
        self.prompt_length = len(prompt_ids)
        self.output_length = 0
        self.prompt_ids = np.unique(np.asarray(prompt_ids, np.int64))
        self.output_counts: dict[int, int] = {}

    @property
    def position(self) -> int:
        """Position in the sequence, prompt included, of the next token."""
        return self.prompt_length + self.output_length

    @property
    def may_end(self) -> bool:
        """Whether ``min_tokens`` allows the next token to end the text."""
        return self.output_length >= self.params.min_tokens

    def append(self, token: int) -> None:
        """Take a sampled token into the history."""
        self.output_length += 1
        self.output_counts[token] = self.output_counts.get(token, 0) + 1

    def counts(self, vocab_size: int) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Which ids were seen in prompt or output, and how often in the output: bool and int32 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int32)
        counts[list(self.output_counts)] = list(self.output_counts.values())
        seen = counts > 0
        seen[self.prompt_ids[self.prompt_ids < vocab_size]] = True
        return seen, counts


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a chosen token and of the likeliest ones (best first), before penalties and filters."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class SampledTokens:
    """One token id a row, int64 [rows]; ``logprobs`` has an entry for each row, None where none were asked for."""

    ids: NDArray[np.int64]
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)


def non_finite_rows(logits: NDArray[np.floating]) -> list[int]:
    """The rows of ``logits`` [rows, vocab] that hold NaN or infinity: their requests fail, the others go on."""
    return [int(row) for row in np.flatnonzero(~np.isfinite(logits).all(axis=-1))]


def sample(
    logits: NDArray[np.floating], histories: Sequence[SequenceHistory], *, allowed: int | None = None
) -> SampledTokens:
    """Choose the next token of each row of ``logits`` [rows, vocab]; ``histories`` are left as they are.

    Only ids below ``allowed`` (the tokenizer's size; None: all) are chosen. Raises RequestError for logits that are not
    finite, and for parameters that leave a row no token.
    """
    if logits.ndim != 2 or len(logits) != len(histories):
        raise RequestError(f"logits of shape {list(logits.shape)} do not fit {len(histories)} sequences: [rows, vocab]")
    if broken := non_finite_rows(logits):
        raise RequestError(
            f"the logits of sequence {broken[0]} hold NaN or infinity at position {histories[broken[0]].position}, so "
            "no token can be chosen; check the weights and the data type that the model computes in"
        )
    scores = logits[:, :allowed]
    ids = np.argmax(scores, axis=-1).astype(np.int64)
    rows = [row for row, history in enumerate(histories) if not _takes_best(history)]
    if rows:
        ids[rows] = _choose(scores[rows].astype(np.float64), [histories[row] for row in rows])
    return SampledTokens(ids, _report(logits, ids, histories, scores.shape[1]))


def _takes_best(history: SequenceHistory) -> bool:
    """Whether the row needs nothing but its largest logit."""
    params = history.params
    masked = bool(params.end_ids) and not history.may_end
    return params.greedy and not params.penalised and not params.logit_bias and not masked


def _choose(scores: NDArray[np.float64], histories: Sequence[SequenceHistory]) -> NDArray[np.int64]:
    scores = _penalised(scores, histories)
    for row, history in enumerate(histories):
        _bias_and_mask(scores[row], history)
        if not (scores[row] > -np.inf).any():
            raise RequestError(f"no token is left for sequence {row}: min_tokens rules out every id of the vocabulary")
    ids: NDArray[np.int64] = np.argmax(scores, axis=-1).astype(np.int64)
    rows = [row for row, history in enumerate(histories) if not history.params.greedy]
    if rows:
        drawn = [histories[row] for row in rows]
        params = [history.params for history in drawn]
        scaled = sampling.scale_by_temperature(scores[rows], np.array([entry.temperature for entry in params]))
        filtered = sampling.filter_top_k_top_p_min_p(
            scaled,
            np.array([min(entry.top_k, scores.shape[1]) for entry in params], np.int64),
            np.array([entry.top_p for entry in params]),
            np.array([entry.min_p for entry in params]),
        )
        ids[rows] = sampling.draw(filtered, _uniforms(drawn))
    return ids


def _uniforms(histories: Sequence[SequenceHistory]) -> NDArray[np.float64]:
    return uniform(
        np.array([history.params.seed for history in histories], np.uint64),
        np.array([history.sample_index for history in histories], np.uint32),
        np.array([history.position for history in histories], np.uint64),
        Purpose.SAMPLE,
    )


def _penalised(scores: NDArray[np.float64], histories: Sequence[SequenceHistory]) -> NDArray[np.float64]:
    rows = [row for row, history in enumerate(histories) if history.params.penalised]
    if not rows:
        return scores
    params = [histories[row].params for row in rows]
    counts = [histories[row].counts(scores.shape[1]) for row in rows]
    scores[rows] = sampling.apply_penalties(
        scores[rows],
        np.stack([seen for seen, _ in counts]),
        np.stack([occurrences for _, occurrences in counts]),
        np.array([entry.repetition_penalty for entry in params]),
        np.array([entry.presence_penalty for entry in params]),
        np.array([entry.frequency_penalty for entry in params]),
    )
    return scores


def _bias_and_mask(scores: NDArray[np.float64], history: SequenceHistory) -> None:
    """Add the logit bias to ``scores`` [vocab] and rule out ids that would end the text too early, in place."""
    bias = history.params.logit_bias
    if bias and max(bias) >= len(scores):
        raise RequestError(f"logit_bias names token id {max(bias)}; the vocabulary has ids 0 to {len(scores) - 1}")
    scores[list(bias)] += list(bias.values())
    if not history.may_end:
        scores[[token for token in history.params.end_ids if token < len(scores)]] = -np.inf


def _report(
    logits: NDArray[np.floating], ids: NDArray[np.int64], histories: Sequence[SequenceHistory], allowed: int
) -> list[TokenLogprobs | None]:
    report: list[TokenLogprobs | None] = []
    for row, history in enumerate(histories):
        if history.params.logprobs is None:
            report.append(None)
            continue
        logprobs = sampling.log_softmax(logits[row])
        top = sampling.best_ids(logprobs[:allowed], history.params.logprobs)
        report.append(TokenLogprobs(float(logprobs[ids[row]]), tuple(top.tolist()), tuple(logprobs[top].tolist())))
    return report
