"""Sampling parameters: what a request may ask for, checked field by field, and how defaults fill the gaps.

Field names are those of vLLM's and OpenAI's requests. A sampling field left at None takes the checkpoint's generation
default (generation_config.json); temperature 0 is greedy.
"""

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from deltaloom.graph.errors import CheckpointError, RequestError
from deltaloom.models.json_fields import read_json_object

GENERATION_CONFIG_FILE = "generation_config.json"
MAX_SAMPLES = 128
MAX_LOGPROBS = 20
DEFAULT_MAX_BATCH = 8
"""Sequences that run together unless ``LLM`` is told otherwise."""
SEED_BITS = 64
SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclass(frozen=True)
class SamplingParams:
    """What one request asks for. Raises RequestError, naming the field, its value and the range, for anything illegal.

    ``max_tokens`` None: until the model stops or its context is full. ``min_tokens``: no stop before so many tokens.
    ``top_k`` 0 or -1: off. ``logit_bias``: added to the logits of these ids. ``stop`` may be one string. ``n``: number
    of samples. ``logprobs``: how many alternatives to report beside each token, None for no report. ``seed`` None:
    random.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check = _Check(RequestError, "")
        settings = _checked_settings({name: getattr(self, name) for name in SAMPLING_FIELDS}, check)
        settings["max_tokens"] = check.integer("max_tokens", self.max_tokens, 1)
        settings["min_tokens"] = _required(check.integer("min_tokens", self.min_tokens, 0), "min_tokens")
        settings["seed"] = check.integer("seed", self.seed, 0, 2**SEED_BITS - 1)
        settings["n"] = _required(check.integer("n", self.n, 1, MAX_SAMPLES), "n")
        settings["logprobs"] = check.integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        settings["logit_bias"] = _checked_bias(self.logit_bias)
        settings["stop"] = _checked_stop(self.stop)
        settings["stop_token_ids"] = _checked_ids("stop_token_ids", self.stop_token_ids, check)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name, value in settings.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, more than max_tokens, which is {self.max_tokens}")

    def resolve(self, defaults: "GenerationDefaults") -> "ResolvedParams":
        """Fill every None from ``defaults``; a seed that is None is drawn, and kept so that the run can be repeated."""
        chosen = {
            name: getattr(defaults, name) if getattr(self, name) is None else getattr(self, name)
            for name in SAMPLING_FIELDS
        }
        max_tokens = defaults.max_tokens if self.max_tokens is None else self.max_tokens
        return ResolvedParams(
            **chosen,
            max_tokens=None if max_tokens is None else max(max_tokens, self.min_tokens),
            min_tokens=self.min_tokens,
            logit_bias=self.logit_bias,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            eos_ids=() if self.ignore_eos else defaults.eos_ids,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            seed=secrets.randbits(SEED_BITS - 1) if self.seed is None else self.seed,
            n=self.n,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True)
class GenerationDefaults:
    """A checkpoint's defaults for the fields that a request leaves at None. Built without arguments: plain sampling."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, object], source: str) -> "GenerationDefaults":
        """The defaults in a generation_config.json; ``source`` names it in errors. Raises CheckpointError.

        ``do_sample`` false makes greedy decoding the default; where it is absent, a temperature decides.
        """
        check = _Check(CheckpointError, f"{source}: ")
        settings = _checked_settings({name: content.get(name) for name in SAMPLING_FIELDS}, check)
        chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        sample = content.get("do_sample", "temperature" in chosen)
        if sample is None or sample is False:
            chosen["temperature"] = 0.0
        elif sample is not True:
            raise CheckpointError(f"{source}: do_sample is {sample!r}; it must be true or false")
        eos = content.get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return cls(
            **chosen,
            max_tokens=check.integer("max_new_tokens", content.get("max_new_tokens"), 1),
            eos_ids=_checked_ids("eos_token_id", ids, check),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> "GenerationDefaults":
        """The defaults of the checkpoint in ``folder``; plain sampling if it brings none. Raises CheckpointError."""
        path = Path(folder) / GENERATION_CONFIG_FILE
        return cls.from_json(read_json_object(path), str(path)) if os.path.lexists(path) else cls()


@dataclass(frozen=True)
class ResolvedParams:
    """A request's parameters with nothing left open; ``top_k`` 0 is off, ``eos_ids`` is empty under ``ignore_eos``."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    max_tokens: int | None
    min_tokens: int
    logit_bias: Mapping[int, float]
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    seed: int
    n: int
    logprobs: int | None

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token id that ends the text, ascending."""
        return tuple(sorted({*self.eos_ids, *self.stop_token_ids}))


@dataclass(frozen=True)
class _Check:
    """Range checks whose errors are of one type and begin with one prefix."""

    error: type[CheckpointError] | type[RequestError]
    prefix: str

    def integer(self, name: str, value: object, low: int, high: int | None = None) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise self.error(f"{self.prefix}{name} is {value!r}; it must be a whole number")
        number = int(value)
        if number < low or (high is not None and number > high):
            limit = f"at least {low}" if high is None else f"from {low} to {high}"
            raise self.error(f"{self.prefix}{name} is {number}; it must be {limit}")
        return number

    def real(self, name: str, value: object, low: float, high: float = math.inf) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self.error(f"{self.prefix}{name} is {value!r}; it must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and low <= number <= high):
            limit = f"a finite number of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise self.error(f"{self.prefix}{name} is {number}; it must be {limit}")
        return number


def _checked_settings(raw: Mapping[str, object], check: _Check) -> dict[str, object]:
    repetition = check.real("repetition_penalty", raw["repetition_penalty"], 0.0)
    if repetition == 0:
        raise check.error(f"{check.prefix}repetition_penalty is 0; it must be greater than 0 (1 is off)")
    top_k = check.integer("top_k", raw["top_k"], -1)
    return {
        "temperature": check.real("temperature", raw["temperature"], 0.0),
        "top_p": check.real("top_p", raw["top_p"], 0.0, 1.0),
        "top_k": 0 if top_k == -1 else top_k,
        "min_p": check.real("min_p", raw["min_p"], 0.0, 1.0),
        "presence_penalty": check.real("presence_penalty", raw["presence_penalty"], -2.0, 2.0),
        "frequency_penalty": check.real("frequency_penalty", raw["frequency_penalty"], -2.0, 2.0),
        "repetition_penalty": repetition,
    }


def _required(value: int | None, name: str) -> int:
    if value is None:
        raise RequestError(f"{name} is None; it must be a whole number")
    return value


def _checked_bias(bias: object) -> dict[int, float]:
    """Keys may be decimal text, as JSON has them."""
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias is {bias!r}; it must map token ids to numbers from -100 to 100")
    check = _Check(RequestError, "")
    found: dict[int, float] = {}
    for key, value in bias.items():
        number = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() else key
        token = check.integer("a token id in logit_bias", number, 0)
        amount = check.real(f"logit_bias[{key}]", value, -100.0, 100.0)
        if token is None or amount is None:
            raise RequestError(f"logit_bias maps {key!r} to {value!r}; it must map token ids to numbers")
        found[token] = amount
    return dict(sorted(found.items()))


def _checked_stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    entries = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list | tuple) else (None,)
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise RequestError(f"stop is {stop!r}; it must be a text or a list of texts, none of them empty")
    return tuple(dict.fromkeys(entries))


def _checked_ids(name: str, ids: object, check: _Check) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not isinstance(ids, list | tuple):
        raise check.error(f"{check.prefix}{name} is {ids!r}; it must be a list of token ids")
    found = [check.integer(f"{name}[{index}]", entry, 0) for index, entry in enumerate(ids)]
    if None in found:
        raise check.error(f"{check.prefix}{name} is {ids!r}; it must be a list of token ids")
    return tuple(dict.fromkeys(entry for entry in found if entry is not None))
