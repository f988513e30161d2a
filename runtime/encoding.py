"""The tokenizer with the calls of transformers: texts to id tensors with their mask, ids to texts, chat templates."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, Self, overload

import numpy as np

from deltaloom.graph.errors import ConfigError, RequestError, require
from deltaloom.models.bundled import model_folder
from deltaloom.models.config import read_config
from deltaloom.runtime.chat_template import NO_KWARGS, Message, Tool, check_messages, encode_chat, plain_messages, render
from deltaloom.runtime.generate import left_padded
from deltaloom.runtime.tokenizer import Tokenizer

TensorKind = Literal["pt", "np"]
Ids = int | Sequence[int]


class Encoding(Mapping[str, Any]):
    """``input_ids`` and ``attention_mask``, as items and as attributes; ``model.generate(**encoding)`` takes it."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise AttributeError(f"the encoding has no {name!r}; it has {', '.join(self.__dict__.get('_fields', ()))}")
        return self._fields[name]

    def to(self, device: object) -> "Encoding":
        """The encoding with torch tensors moved to ``device``; arrays and lists stay, as they live on the host."""
        return Encoding({name: v.to(device) if hasattr(v, "to") else v for name, v in self._fields.items()})


class TextTokenizer:
    """A checkpoint's tokenizer; control tokens spelled in a text are control tokens, as in the reference."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> Self:
        """Of a checkpoint folder or a bundled name. Raises CheckpointError or ConfigError."""
        folder = model_folder(model)
        return cls(Tokenizer.from_folder(folder, read_config(folder).vocab_size))

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a turn."""
        return self.tokenizer.eos_id

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self.tokenizer.pad_id

    def __len__(self) -> int:
        return self.tokenizer.vocab_size

    def __call__(self, text: str | Sequence[str], *, return_tensors: TensorKind | None = None, padding: bool = True) -> Encoding:
        """Ids and mask of a text or a list of them: lists, NumPy arrays ("np") or torch tensors ("pt") ``[batch, n]``.

        Tensors of texts of different lengths are padded on the left. Raises RequestError.
        """
        texts = [text] if isinstance(text, str) else list(text)
        require(
            bool(texts) and all(isinstance(entry, str) for entry in texts),
            "the tokenizer takes a text or a list of at least one text",
            RequestError,
        )
        rows = [self.tokenizer.encode(entry) for entry in texts]
        if return_tensors is None:
            masks = [[1] * len(row) for row in rows]
            single = isinstance(text, str)
            return Encoding({"input_ids": rows[0] if single else rows, "attention_mask": masks[0] if single else masks})
        require(
            padding or len({*map(len, rows)}) == 1, "texts of different lengths need padding=True to make a tensor", RequestError
        )
        ids, mask = left_padded(rows, self.tokenizer.pad_id or 0)
        mask = np.ones_like(ids) if mask is None else mask
        return Encoding({"input_ids": tensor(ids, return_tensors), "attention_mask": tensor(mask, return_tensors)})

    def encode(self, text: str) -> list[int]:
        """The ids of one text."""
        return self.tokenizer.encode(text)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of ids: a list, an array or a tensor of one dimension, or one id."""
        ids: Any = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        require(
            isinstance(ids, list | tuple) and all(isinstance(token, int) for token in ids),
            "decode takes the ids of one text; batch_decode takes several",
            RequestError,
        )
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """The texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        tokenize: Literal[False],
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> str: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        tokenize: Literal[True] = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> list[int]: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> str | list[int]:
        """The prompt of a conversation, as token ids or (``tokenize=False``) as text.

        Ids made here keep control tokens that users typed as ordinary text; a text loses that distinction. Raises
        RequestError for messages that are not well formed.
        """
        if tokenize:
            return encode_chat(
                self.tokenizer,
                messages,
                tools,
                add_generation_prompt=add_generation_prompt,
                template=chat_template,
                template_kwargs=chat_template_kwargs,
            )
        check_messages(messages, tools)
        return render(
            plain_messages(messages),
            tools,
            self.tokenizer.chat_template if chat_template is None else chat_template,
            add_generation_prompt=add_generation_prompt,
            template_kwargs={**self.tokenizer.named_tokens, **chat_template_kwargs},
        )


def tensor(array: Any, kind: str) -> Any:
    """``array`` as NumPy ("np") or torch ("pt"); ConfigError where torch is not installed or ``kind`` is neither."""
    if kind == "np":
        return array
    require(kind == "pt", f"return_tensors is {kind!r}, expected 'pt', 'np' or None", ConfigError)
    try:
        torch_tensors = import_module("deltaloom.backends.torch.tensors")
    except ImportError as error:
        raise ConfigError(
            "return_tensors='pt' needs torch, which is not installed; install deltaloom[torch] or use return_tensors='np'"
        ) from error
    return torch_tensors.from_array(array)
