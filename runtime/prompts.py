"""What a caller may give as prompts, made uniform and checked: texts or token-id lists, one or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.chat_template import Message
from deltaloom.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]]
Conversation = Sequence[Message]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's token ids, and its text where it was given as one."""

    text: str | None
    ids: list[int]


def encode_prompts(
    prompts: Prompts, tokenizer: Tokenizer, *, vocab_size: int, max_model_len: int
) -> tuple[list[EncodedPrompt], bool]:
    """The prompts, and whether there was one prompt rather than a list of them.

    Raises RequestError, naming the prompt, for one that is empty, too long, of another kind or with unknown ids.
    """
    given: Any = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    if not isinstance(given, str | list | tuple):
        raise RequestError(f"the prompt is a {type(given).__name__}; expected a text, a list of token ids, or a list of either")
    if not given:
        raise RequestError("the prompt is empty; give at least one token")
    single = isinstance(given, str) or all(_is_id(entry) for entry in given)
    listed = [given] if single else list(given)
    encoded = [encode_prompt(prompt, f"prompt {number}", tokenizer) for number, prompt in enumerate(listed)]
    for number, prompt in enumerate(encoded):
        check_ids(prompt.ids, f"prompt {number}", vocab_size=vocab_size, max_model_len=max_model_len)
    return encoded, single


def encode_prompt(prompt: object, name: str, tokenizer: Tokenizer) -> EncodedPrompt:
    """One prompt's ids, not checked further; ``name`` says in errors which it is."""
    if isinstance(prompt, str):
        return EncodedPrompt(prompt, tokenizer.encode(prompt))
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()
    if isinstance(prompt, list | tuple) and all(_is_id(entry) for entry in prompt):
        return EncodedPrompt(None, [int(entry) for entry in prompt])
    raise RequestError(f"{name} is {_shown(prompt)}; expected a text or a list of token ids (whole numbers)")


def check_ids(ids: Sequence[int], name: str, *, vocab_size: int, max_model_len: int) -> None:
    """Raise RequestError unless ``ids`` is not empty, within the vocabulary, and leaves room for one more token."""
    if not ids:
        raise RequestError(f"{name} is empty; give at least one token")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise RequestError(f"{name} has the token id {outside[0]}; the model's ids are 0 to {vocab_size - 1}")
    if len(ids) >= max_model_len:
        raise RequestError(
            f"{name} has {len(ids)} tokens, but the model's maximum context length is {max_model_len} tokens with at "
            "least one of output; shorten the prompt or raise max_model_len (--max-model-len)"
        )


def as_conversations(messages: Conversation | Sequence[Conversation]) -> tuple[list[Conversation], bool]:
    """The conversations, and whether there was one rather than a list of them; their form is checked later."""
    given: Any = messages
    if isinstance(given, list | tuple) and given and all(isinstance(entry, list | tuple) for entry in given):
        return list(given), False
    return [given], True


def is_conversation(value: object) -> bool:
    """Whether ``value`` is a list of messages rather than a prompt."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def _is_id(entry: object) -> bool:
    return isinstance(entry, Integral) and not isinstance(entry, bool)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
