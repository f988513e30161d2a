"""generation_config.json: what a checkpoint's makers recommend for sampling (Qwen3-Next specification, section 13)."""

import os
from dataclasses import dataclass

from deltaloom.graph.errors import ConfigError
from deltaloom.models.config import ModelConfig
from deltaloom.models.json_fields import Fields, as_path, read_json_object

FILE = "generation_config.json"
_READ = frozenset({
    "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id", "pad_token_id",
    "bos_token_id", "max_new_tokens",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling defaults of a checkpoint. The values here change nothing: greedy, no filter, no penalty."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()  # stop on any of them
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    max_new_tokens: int | None = None
    ignored: tuple[str, ...] = ()  # fields of the file that have no part in sampling here


def read_generation_config(folder: str | os.PathLike[str], model: ModelConfig | None = None) -> GenerationConfig:
    """The folder's generation_config.json, or neutral defaults if there is none; token ids it lacks are ``model``'s.

    Raises ConfigError for a field of the wrong kind or out of range, CheckpointError if the file is unreadable.
    """
    path = as_path(folder) / FILE
    values = read_json_object(path, ConfigError) if path.exists() else {}
    fields = Fields({name: value for name, value in values.items() if value is not None})
    try:
        result = GenerationConfig(
            do_sample=fields.boolean("do_sample", False),
            temperature=fields.number("temperature", 1.0, minimum=0.0),
            top_p=fields.number("top_p", 1.0, above=0.0, maximum=1.0),
            top_k=fields.integer("top_k", 0, minimum=0),
            min_p=fields.number("min_p", 0.0, minimum=0.0, maximum=1.0),
            repetition_penalty=fields.number("repetition_penalty", 1.0, above=0.0),
            eos_token_ids=fields.integers("eos_token_id") or (model.eos_token_ids if model else ()),
            pad_token_id=fields.optional_integer("pad_token_id", model.pad_token_id if model else None, minimum=0),
            bos_token_id=fields.optional_integer("bos_token_id", model.bos_token_id if model else None, minimum=0),
            max_new_tokens=fields.optional_integer("max_new_tokens"),
            ignored=tuple(sorted(name for name in values if name not in _READ)),
        )
        if model is not None:
            _check_vocabulary(result, model.vocab_size)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return result


def _check_vocabulary(config: GenerationConfig, vocab_size: int) -> None:
    named = [("eos", token) for token in config.eos_token_ids]
    named += [("pad", config.pad_token_id or 0), ("bos", config.bos_token_id or 0)]
    for name, token in named:
        if token >= vocab_size:
            raise ConfigError(f"{name}_token_id {token} is outside the model's vocabulary of {vocab_size} rows.")
