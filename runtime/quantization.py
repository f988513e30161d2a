"""What quantising a model's weights costs: the error of each weight, of the logits, of the perplexity, and the bytes it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deltaloom.graph.errors import RequestError, require
from deltaloom.graph.op import Array
from deltaloom.graph.quantized import QuantizedArray
from deltaloom.graph.types import QuantType, bf16, dtype_named
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.ops.quantized import plain
from deltaloom.runtime.model import Model
from deltaloom.runtime.weights import materialise


@dataclass(frozen=True)
class WeightError:
    """One weight that is stored quantised, or in bfloat16 where the model computes in more, against what it was made of. ``rms``:
    root of the mean squared error relative to that of the weight; ``largest``: the largest error relative to the largest element;
    both 0 for codes that are kept as they are stored (``kept``). ``plain_size`` is its bytes in the dtype that the model computes
    in, ``size`` those that are stored."""

    name: str
    form: str
    kept: bool
    rms: float
    largest: float
    plain_size: int
    size: int


@dataclass(frozen=True)
class LogitError:
    """Logits against those of another model, over all positions. ``rms``: root of the mean squared difference relative to the
    reference's spread (each position's mean taken off both); ``largest``: the largest difference; ``divergence``: mean Kullback-
    Leibler divergence from the reference in nats a token; ``agreement``: share of positions with the same best token."""

    rms: float
    largest: float
    divergence: float
    agreement: float


def weight_errors(model: Model) -> Iterator[WeightError]:
    """The error of every quantised or narrowed weight of the main model, one after the other: two forms of one are in memory."""
    source = Checkpoint.open(model.folder)
    for instance in model.main.driver.shared.graph.instances():
        graph = instance.graph.weights
        assert graph is not None
        for name, value in graph.outputs:
            form = value.type.dtype
            made = graph.producers.get(value.name) if value.kind == "node" else None
            narrowed = made is not None and made.op.name == "cast" and form == bf16 != made.inputs[0].type.dtype
            if not isinstance(form, QuantType) and not narrowed:
                continue
            quantised = narrowed or made is not None and made.op.name == "quantize"
            rms = largest = 0.0
            if made is not None and quantised:
                before = materialise(graph, made.inputs[0], instance.prefix, source, ())
                after = materialise(graph, value, instance.prefix, source, ())
                assert not isinstance(before, QuantizedArray)
                rms, largest = _error(before, plain(after, before.dtype))
            plain_size = math.prod(value.type.static_shape()) * dtype_named(model.ctx.config.dtype).itemsize
            size = _number(value.type.nbytes())
            yield WeightError(instance.prefix + name, str(form), not quantised, rms, largest, plain_size, size)


def weight_bytes(model: Model, *, plain_itemsize: int | None = None) -> int:
    """Bytes of all weights that the main model's programs read. ``plain_itemsize``: count float weights that are not quantised
    with so many bytes an element, as a file in bfloat16 would have them (2); None: as they are held."""
    sizes: dict[str, int] = {}
    for instance in model.main.driver.shared.graph.instances():
        for value in instance.graph.params:
            size = value.type.nbytes()
            if plain_itemsize is not None and not isinstance(value.type.dtype, QuantType):
                size = value.type.elements() * plain_itemsize
            sizes[instance.prefix + value.name] = _number(size)
    return sum(sizes.values())


def logit_error(model: Model, reference: Model, token_ids: Sequence[int]) -> LogitError:
    """The logits of ``model`` after each of the tokens against those of ``reference``. ``RequestError`` for no tokens."""
    require(bool(token_ids), "token_ids is empty; give at least one token to compare logits of", RequestError)
    found, wanted = (_logits(one, token_ids).astype(np.float64) for one in (model, reference))
    difference = found - wanted
    log_found, log_wanted = (rows - np.logaddexp.reduce(rows, axis=-1, keepdims=True) for rows in (found, wanted))
    divergence = (np.exp(log_wanted) * (log_wanted - log_found)).sum(axis=-1)
    spread = wanted - wanted.mean(axis=-1, keepdims=True)
    centred = difference - difference.mean(axis=-1, keepdims=True)
    return LogitError(
        rms=float(np.sqrt(np.mean(centred**2) / np.mean(spread**2))),
        largest=float(np.abs(difference).max()),
        divergence=float(divergence.mean()),
        agreement=float(np.mean(found.argmax(axis=-1) == wanted.argmax(axis=-1))),
    )


def perplexity(model: Model, token_ids: Sequence[int], *, window: int = 512) -> float:
    """exp of the mean negative log-probability of each token after those before it in its window of so many tokens; the first of
    each window is not scored. ``RequestError`` for fewer than two tokens."""
    require(len(token_ids) >= 2 and window >= 2, "perplexity needs at least two tokens and a window of two", RequestError)
    total, count = 0.0, 0
    for start in range(0, len(token_ids) - 1, window):
        ids = token_ids[start : start + window]
        if len(ids) < 2:
            continue
        rows = _logits(model, ids[:-1]).astype(np.float64)
        chosen = rows[np.arange(len(rows)), np.asarray(ids[1:])]
        total += float((np.logaddexp.reduce(rows, axis=-1) - chosen).sum())
        count += len(rows)
    return float(np.exp(total / count))


def _logits(model: Model, token_ids: Sequence[int]) -> Array:
    logits = model.forward([list(token_ids)], logits="all").logits
    assert logits is not None
    found: Array = logits[0]
    return found


def _error(before: Array, after: Array) -> tuple[float, float]:
    wide = before.astype(np.float64)
    error, size = after - wide, np.abs(wide)
    if not size.any():
        return 0.0, 0.0
    return float(np.sqrt(np.mean(error**2) / np.mean(wide**2))), float(np.abs(error).max() / size.max())


def _number(size: object) -> int:
    assert isinstance(size, int)
    return size
