"""From logits to a token: penalties, filters and the draw, as plain array functions.

Rows are independent; every parameter is one number a row. Everything is computed in float64, ties go to the lowest id,
and the draw walks the ids in ascending order, so that backends whose float32 logits differ in the last bits choose
alike.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]


def apply_penalties(
    logits: Floats,
    seen: NDArray[np.bool_],
    output_counts: NDArray[np.int32],
    repetition: Floats,
    presence: Floats,
    frequency: Floats,
) -> Floats:
    """Penalised logits, float64 [rows, vocab].

    ``seen`` [rows, vocab]: tokens of prompt or output; their logits are divided by ``repetition`` [rows] where
    positive, else multiplied by it. ``output_counts`` [rows, vocab]: occurrences in the output; a token loses
    ``frequency`` for each one and ``presence`` once if there is any. (Keskar et al. 2019, "CTRL"; OpenAI API.)
    """
    strength = repetition[:, None]
    with np.errstate(over="ignore"):  # an extreme penalty reaches the largest number, where it stays
        repeated = np.where(logits > 0, logits / strength, logits * strength)
    largest = np.finfo(np.float64).max / 4  # so that no difference of two overflows later
    penalised = np.where(seen, np.clip(repeated, -largest, largest), logits)
    penalised = penalised - frequency[:, None] * output_counts
    return penalised - presence[:, None] * (output_counts > 0)


def scale_by_temperature(logits: Floats, temperature: Floats) -> Floats:
    """``(logits - row maximum) / temperature``, float64 [rows, vocab]; each temperature [rows] is greater than 0."""
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to minus infinity
        scaled: Floats = (logits - logits.max(axis=-1, keepdims=True)) / temperature[:, None]
    return scaled


def filter_top_k_top_p_min_p(logits: Floats, top_k: Ids, top_p: Floats, min_p: Floats) -> Floats:
    """Logits with the tokens that may not be drawn set to minus infinity, float64 [rows, vocab].

    In this order, as transformers does: ``top_k`` [rows] keeps that many (0: all); ``top_p`` [rows] keeps the smallest
    set of the likeliest remaining tokens whose probability reaches it, at least one (1: all); ``min_p`` [rows] removes
    tokens less likely than that fraction of the likeliest (0: none). At the border of equal logits the lowest ids stay.
    """
    kept = np.full_like(logits, -np.inf)
    for row, scores in enumerate(logits):
        ids = _best_ids(scores, int(top_k[row]))
        if top_p[row] < 1:
            ids = ids[np.argsort(-scores[ids], kind="stable")]
            weights = np.exp(scores[ids] - scores[ids[0]])
            reached = np.cumsum(weights) >= top_p[row] * weights.sum()
            ids = ids[: int(np.argmax(reached)) + 1 if reached.any() else None]
        if min_p[row] > 0:
            best = scores[ids].max()
            ids = ids[np.exp(scores[ids] - best) >= min_p[row]]
        kept[row, ids] = scores[ids]
    return kept


def draw(logits: Floats, uniforms: Floats) -> Ids:
    """One token id a row, int64 [rows], with probability softmax(logits).

    ``uniforms`` [rows], in [0, 1): the chosen id is the first, in ascending order, whose cumulative probability exceeds
    it. Ids at minus infinity are never chosen; each row has at least one other.
    """
    chosen = np.empty(len(logits), np.int64)
    for row, scores in enumerate(logits):
        ids = np.flatnonzero(scores > -np.inf)
        cumulative = np.cumsum(np.exp(scores[ids] - scores[ids].max()))
        rank = np.searchsorted(cumulative, uniforms[row] * cumulative[-1], side="right")
        chosen[row] = ids[min(int(rank), len(ids) - 1)]
    return chosen


def log_softmax(logits: NDArray[np.floating]) -> Floats:
    """Log-probabilities over the last axis, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def best_ids(scores: Floats, count: int) -> Ids:
    """The ``count`` ids of the largest ``scores`` [vocab], best first, equal ones by ascending id."""
    ids = _best_ids(scores, min(count, len(scores))) if count else np.empty(0, np.int64)
    return ids[np.argsort(-scores[ids], kind="stable")]


def _best_ids(scores: Floats, count: int) -> Ids:
    """Ascending ids of the ``count`` largest finite scores (0: all finite ones), without sorting the vocabulary."""
    ids = np.flatnonzero(scores > -np.inf)
    if not 0 < count < len(ids):
        return ids
    border = np.partition(scores[ids], len(ids) - count)[len(ids) - count]
    above = ids[scores[ids] > border]
    equal = ids[scores[ids] == border]
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
