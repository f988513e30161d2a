"""``deltaloom generate``: one prompt in, text out."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaloom.cli import options
from deltaloom.graph.errors import ConfigError, RequestError, require

if TYPE_CHECKING:
    from deltaloom.runtime.results import GenerationResult


def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help='The text to continue; "-" reads it from standard input.')] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user's message and answer it.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system message before it; only with --chat.")] = None,
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Show the text while it is made.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with ids, counts and the seed.")] = False,
    model: options.Model = None,
    config: options.RunFile = None,
    print_config: options.PrintConfig = False,
    backend: options.Backend = None,
    dtype: options.DType = None,
    device: options.Device = None,
    threads: options.Threads = None,
    quantise: options.Quantise = None,
    keep_quantized: options.KeepQuantized = None,
    skip: options.Skip = None,
    fuel: options.Fuel = None,
    cache: options.Cache = None,
    no_cache: options.NoCache = False,
    max_model_len: options.MaxModelLen = None,
    generation_config: options.GenerationConfig = None,
    hf_overrides: options.HfOverrides = None,
    check_weights: options.CheckWeights = None,
    max_tokens: options.MaxTokens = None,
    min_tokens: options.MinTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Samples of the one prompt.")] = None,
    logprobs: Annotated[int | None, typer.Option("--logprobs", help="Alternatives to report; needs --json.")] = None,
) -> None:
    """Continue a text, or answer one message with --chat."""
    from deltaloom.cli.settings import Settings

    settings = Settings(ctx.params, config)
    if print_config:
        print(settings.describe_json() if as_json else settings.describe())
        return
    params = settings.sampling_params()
    require(prompt is not None, "there is no prompt; give one, or - to read it from standard input", RequestError)
    require(system is None or chat, "--system is given without --chat; only a conversation has a system message", ConfigError)
    require(not (stream and as_json), "--stream and --json exclude each other: JSON is printed as a whole", ConfigError)
    require(not (stream and params.n > 1), "--stream shows one sample, but n is more than 1; use --no-stream", ConfigError)
    require(params.logprobs is None or as_json, "--logprobs needs --json, which shows them", ConfigError)
    text = read_prompt(str(prompt))
    llm = settings.llm()
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": text})
    if stream is not False and not as_json and params.n == 1:
        for piece in llm.stream(messages if chat else text, params):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    result = llm.chat(messages, params=params) if chat else llm.generate(text, params)
    if as_json:
        print(json.dumps({"model": settings.value("model", "model"), **as_object(result)}, ensure_ascii=False))
        return
    for output in result.outputs:
        print(f"[{output.index}] {output.text}" if params.n > 1 else output.text)


def read_prompt(prompt: str) -> str:
    """The prompt, or standard input without its last line feed where it is "-"."""
    if prompt != "-":
        return prompt
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def as_object(result: "GenerationResult") -> dict[str, Any]:
    """A result as a JSON object."""
    return asdict(result)
