"""Scoring: the log-probability of a given continuation."""

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.ops.sampling import log_softmax
from deltaloom.runtime.model import Model
from deltaloom.runtime.prompts import Prompt, check_ids, encode_prompt
from deltaloom.runtime.results import Score
from deltaloom.runtime.tokenizer import Tokenizer


def score(model: Model, tokenizer: Tokenizer, prompt: Prompt, continuation: Prompt) -> Score:
    """See ``LLM.score``. The prompt is read without logits, so memory grows with the continuation only."""
    before, after = split_ids(tokenizer, prompt, continuation)
    vocab_size, limit = model.config.vocab_size, model.max_model_len
    check_ids(before, "the prompt", vocab_size=vocab_size, max_model_len=limit)
    require(bool(after), "the continuation is empty; give at least one token to score", RequestError)
    total = len(before) + len(after)
    check_ids([*before, *after], "the prompt with its continuation", vocab_size=vocab_size, max_model_len=total + 1)
    require(
        total <= limit,
        f"the prompt with its continuation has {total} tokens, but the model's maximum context length is {limit}; shorten them "
        "or raise max_model_len",
        RequestError,
    )
    state = model.new_state(1)
    if len(before) > 1:
        model.forward([before[:-1]], state=state, logits=None)
    output = model.forward([[before[-1], *after[:-1]]], state=state, logits="all")
    assert output.logits is not None
    rows = output.logits[0]
    require(
        bool(np.isfinite(rows).all()),
        "score: the logits of the continuation hold NaN or infinity; check the weights (check_weights)",
        RequestError,
    )
    logprobs = [float(log_softmax(row)[token]) for row, token in zip(rows, after, strict=True)]
    best = rows[:, : tokenizer.vocab_size].argmax(axis=1).tolist()
    return Score(float(sum(logprobs)), logprobs, after, best == after)


def split_ids(tokenizer: Tokenizer, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
    """The ids of both. Texts are tokenised together; white space at the prompt's end goes to the continuation."""
    if isinstance(prompt, str) and isinstance(continuation, str):
        whole = tokenizer.encode(prompt + continuation)
        border = len(tokenizer.encode(prompt.rstrip() or prompt))
        return whole[:border], whole[border:]
    require(
        not isinstance(prompt, str) and not isinstance(continuation, str),
        "score takes a prompt and a continuation of one kind: two texts or two token-id lists",
        RequestError,
    )
    return encode_prompt(prompt, "the prompt", tokenizer).ids, encode_prompt(continuation, "the continuation", tokenizer).ids
