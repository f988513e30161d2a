"""``LLM``: a model with its tokenizer and defaults; prompts and conversations in, texts out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, overload

from deltaloom.graph.errors import CheckpointError, ConfigError, RequestError, require
from deltaloom.models.bundled import model_folder
from deltaloom.models.config import ModelConfig, read_config
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.chat_template import NO_KWARGS, Tool, encode_chat
from deltaloom.runtime.generate import Request, Timings, groups, run_group
from deltaloom.runtime.load import ModelReference, load
from deltaloom.runtime.params import DEFAULT_MAX_BATCH, GenerationDefaults, ResolvedParams, SamplingParams
from deltaloom.runtime.prompts import (
    Conversation,
    EncodedPrompt,
    Prompt,
    Prompts,
    as_conversations,
    check_ids,
    encode_prompts,
    is_conversation,
)
from deltaloom.runtime.results import Completion, GenerationResult, Metrics, Piece, Score
from deltaloom.runtime.score import score
from deltaloom.runtime.tokenizer import Tokenizer

GenerationConfigMode = Literal["auto", "none"]


class LLM:
    """Loads a checkpoint once and generates from it.

    ``model``: a folder or a bundled name ("tiny-next"). ``backend``, ``dtype``, ``config``, ``max_model_len``,
    ``hf_overrides`` and ``check_weights`` are those of ``deltaloom.load``. ``max_batch``: sequences that run together.
    ``generation_config`` "auto" takes sampling defaults from generation_config.json, "none" takes neutral ones.
    Raises CheckpointError, ConfigError or CompileError.
    """

    def __init__(
        self,
        model: ModelReference,
        *,
        backend: str | Sequence[str] | None = None,
        dtype: str | None = None,
        config: CompileConfig | None = None,
        max_model_len: int | None = None,
        max_batch: int = DEFAULT_MAX_BATCH,
        generation_config: GenerationConfigMode = "auto",
        hf_overrides: Mapping[str, object] | None = None,
        check_weights: bool = False,
    ) -> None:
        require(max_batch >= 1, f"max_batch is {max_batch}, expected at least 1", ConfigError)
        folder = model_folder(model)
        shape = read_config(folder, hf_overrides, use=config.use if config else None)
        self.tokenizer = Tokenizer.from_folder(folder, shape.vocab_size)
        self.defaults = generation_defaults(folder, shape, self.tokenizer, generation_config)
        self.max_batch = max_batch
        self.model = load(
            model,
            backend=backend,
            dtype=dtype,
            config=config,
            max_model_len=max_model_len,
            hf_overrides=hf_overrides,
            check_weights=check_weights,
        )

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""
        return self.model.max_model_len

    @overload
    def generate(self, prompts: str | list[int], params: SamplingParams | None = None) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[GenerationResult]: ...

    def generate(
        self, prompts: Prompts, params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> GenerationResult | list[GenerationResult]:
        """Continue prompts: texts or token-id lists. One prompt gives one result, a list gives a list in its order.

        ``params``: for all prompts, or one for each. Control tokens spelled in a text are control tokens. Raises
        RequestError for a prompt that is empty or too long, and for logits that are not finite.
        """
        encoded, single = encode_prompts(
            prompts, self.tokenizer, vocab_size=self.model.config.vocab_size, max_model_len=self.max_model_len
        )
        results = self._run(encoded, params)
        return results[0] if single else results

    @overload
    def chat(
        self,
        messages: list[dict[str, object]] | list[dict[str, str]],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> GenerationResult: ...

    @overload
    def chat(
        self,
        messages: list[list[dict[str, object]]] | list[list[dict[str, str]]],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> list[GenerationResult]: ...

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        tools: Sequence[Tool] | None = None,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> GenerationResult | list[GenerationResult]:
        """Answer a conversation (a list of messages with role and content), or several.

        ``chat_template`` None: the checkpoint's. What users typed never becomes a control token. Raises RequestError.
        """
        conversations, single = as_conversations(messages)
        encoded = [
            self._encode_conversation(
                conversation,
                tools,
                add_generation_prompt=add_generation_prompt,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        results = self._run(encoded, params)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt | Conversation,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Tool] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] = NO_KWARGS,
    ) -> Iterator[Piece]:
        """The pieces of one prompt's or one conversation's outputs while they are generated.

        The pieces' texts and ids join to what ``generate`` or ``chat`` returns for the same seed; with ``n`` > 1 the
        samples are interleaved and told apart by ``Piece.index``. Raises RequestError before the first piece.
        """
        if is_conversation(prompt):
            encoded = self._encode_conversation(
                prompt,  # type: ignore[arg-type]
                tools,
                add_generation_prompt=True,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
            )
        else:
            listed, single = encode_prompts(
                prompt,  # type: ignore[arg-type]
                self.tokenizer,
                vocab_size=self.model.config.vocab_size,
                max_model_len=self.max_model_len,
            )
            require(single, f"stream takes one prompt, got a list of {len(listed)}; call it for each", RequestError)
            encoded = listed[0]
        request = Request(0, encoded.ids, self.resolve(params, len(encoded.ids)))
        steps = run_group(self.model, self.tokenizer, [request], self.max_batch, Timings())
        return (piece for _, piece in steps)

    def score(self, prompt: Prompt, continuation: Prompt) -> Score:
        """How likely the model finds ``continuation`` after ``prompt``; both are texts, or both are token-id lists.

        Texts are tokenised together, spaces at the prompt's end belonging to the continuation, as evaluation harnesses
        do. Log-probabilities are over all rows of the vocabulary, before any sampling parameter. Raises RequestError.
        """
        return score(self.model, self.tokenizer, prompt, continuation)

    def resolve(self, params: SamplingParams | None, prompt_length: int) -> ResolvedParams:
        """``params`` with every gap filled by the model's defaults, and ``max_tokens`` cut to what fits the context."""
        require(
            params is None or isinstance(params, SamplingParams),
            f"params is of type {type(params).__name__}, expected SamplingParams or None",
            RequestError,
        )
        resolved = (params or SamplingParams()).resolve(self.defaults)
        room = self.max_model_len - prompt_length
        most = room if resolved.max_tokens is None else min(resolved.max_tokens, room)
        return replace(resolved, max_tokens=most, min_tokens=min(resolved.min_tokens, most))

    def _encode_conversation(
        self,
        messages: Conversation,
        tools: Sequence[Tool] | None,
        *,
        add_generation_prompt: bool,
        chat_template: str | None,
        chat_template_kwargs: Mapping[str, object],
    ) -> EncodedPrompt:
        ids = encode_chat(
            self.tokenizer,
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            template=chat_template,
            template_kwargs=chat_template_kwargs,
        )
        vocab_size, limit = self.model.config.vocab_size, self.max_model_len
        check_ids(ids, "the conversation", vocab_size=vocab_size, max_model_len=limit)
        return EncodedPrompt(self.tokenizer.decode(ids, skip_special_tokens=False), ids)

    def _run(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[GenerationResult]:
        each: list[SamplingParams | None]
        if params is None or isinstance(params, SamplingParams):
            each = [params] * len(prompts)
        else:
            wanted = "expected SamplingParams, a list with one for each prompt, or None"
            require(isinstance(params, list | tuple), f"params is of type {type(params).__name__}, {wanted}", RequestError)
            each = list(params)
        require(
            len(each) == len(prompts),
            f"there are {len(prompts)} prompts but {len(each)} sampling parameters; give one for all or one for each",
            RequestError,
        )
        pairs = enumerate(zip(prompts, each, strict=True))
        requests = [Request(i, prompt.ids, self.resolve(one, len(prompt.ids))) for i, (prompt, one) in pairs]
        results: dict[int, GenerationResult] = {}
        for group in groups(requests, self.max_batch):
            timings = Timings()
            pieces: dict[int, list[Piece]] = {request.index: [] for request in group}
            for index, piece in run_group(self.model, self.tokenizer, group, self.max_batch, timings):
                pieces[index].append(piece)
            for request in group:
                results[request.index] = _result(prompts[request.index], request, pieces[request.index], timings)
        return [results[request.index] for request in requests]


def generation_defaults(
    folder: ModelReference, shape: ModelConfig, tokenizer: Tokenizer, mode: GenerationConfigMode
) -> GenerationDefaults:
    """The defaults for what a request leaves open: generation_config.json ("auto") or neutral ones ("none").

    Either way a text ends at the eos ids of generation_config.json, else of config.json, else of the tokenizer.
    """
    require(mode in ("auto", "none"), f"generation_config is {mode!r}, expected 'auto' or 'none'", ConfigError)
    own = GenerationDefaults.from_folder(folder)  # type: ignore[arg-type]
    outside = [token for token in own.eos_ids if token >= shape.vocab_size]
    require(
        not outside,
        f"{folder}/generation_config.json: eos_token_id {outside[:1]} is outside the vocabulary of {shape.vocab_size} rows",
        CheckpointError,
    )
    named = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    eos = own.eos_ids or shape.eos_token_ids or named
    return replace(own if mode == "auto" else GenerationDefaults(), eos_ids=eos)


def _result(prompt: EncodedPrompt, request: Request, pieces: Sequence[Piece], timings: Timings) -> GenerationResult:
    outputs = [_completion(index, [piece for piece in pieces if piece.index == index]) for index in range(request.params.n)]
    metrics = Metrics(len(prompt.ids), len(pieces), timings.prefill, timings.decode)
    return GenerationResult(prompt.text, prompt.ids, outputs, request.params.seed, metrics)


def _completion(index: int, pieces: Sequence[Piece]) -> Completion:
    last = pieces[-1]
    assert last.finish_reason is not None
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Completion(
        index,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.token_ids],
        last.finish_reason,
        last.stop_reason,
        logprobs or None,
    )
