"""What a generation gives back: outputs, pieces of a stream, scores and timings, as plain records."""

from dataclasses import dataclass

from deltaloom.runtime.sampler import TokenLogprobs
from deltaloom.runtime.stopping import FinishReason


@dataclass(frozen=True)
class Metrics:
    """Token counts of one request; seconds are those of the batch that it ran in (its mates took part in them)."""

    prompt_tokens: int
    generated_tokens: int  # over all samples
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Completion:
    """One sample. ``token_ids`` include the token that ended it; ``text`` does not, unless the request asked for it.

    ``stop_reason``: the stop string or token id that ended it, None at "length". ``logprobs``: one entry a token, None
    where the request asked for none.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class GenerationResult:
    """All samples of one prompt. ``prompt`` is None for a prompt given as ids; ``seed`` repeats the run if given back."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]
    seed: int
    metrics: Metrics


@dataclass(frozen=True)
class Piece:
    """What one token added to sample ``index`` of a stream; ``text`` is empty while it is held back.

    The last piece of a sample has its ``finish_reason``.
    """

    text: str
    token_ids: list[int]
    index: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: natural-log probabilities, and whether greedy decoding would have given it."""

    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    greedy: bool
