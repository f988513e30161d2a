"""``deltaloom chat``: a conversation on the terminal, or line by line from a pipe."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from deltaloom.cli import options
from deltaloom.graph.errors import RequestError

if TYPE_CHECKING:
    from deltaloom.runtime.llm import LLM
    from deltaloom.runtime.params import SamplingParams

HELP = "/reset forgets the conversation, /exit leaves."


def chat(
    ctx: typer.Context,
    system: Annotated[str | None, typer.Option("--system", help="A system message at the start.")] = None,
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
) -> None:
    """Talk with a model. Each line is a message; /reset forgets the conversation, /exit leaves."""
    from deltaloom.cli.settings import Settings

    settings = Settings(ctx.params, config)
    if print_config:
        print(settings.describe())
        return
    params = settings.sampling_params()
    start: list[dict[str, str]] = [{"role": "system", "content": system}] if system is not None else []
    interactive = sys.stdin.isatty()
    llm = settings.llm()
    if interactive:
        print(f"{settings.value('model', 'model')}. {HELP}", file=sys.stderr)
    history = list(start)
    for line in lines(interactive):
        if line == "/exit":
            return
        if line == "/reset":
            history = list(start)
        elif line.startswith("/"):
            print(f"there is no command {line.split()[0]}; {HELP}", file=sys.stderr)
        elif line:
            history = answer(llm, history, line, params, interactive=interactive)


def lines(interactive: bool) -> Iterator[str]:
    """What the user types, without surrounding white space, until the end of input."""
    if interactive:
        with suppress(ImportError):  # not on every platform; with it, input has history and arrow keys
            import_module("readline")
    while True:
        try:
            yield input("> " if interactive else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None


def answer(
    llm: "LLM", history: list[dict[str, str]], message: str, params: "SamplingParams", *, interactive: bool
) -> list[dict[str, str]]:
    """Show the answer while it is made and return the longer conversation; on a terminal a refused message is dropped."""
    asked = [*history, {"role": "user", "content": message}]
    reply: list[str] = []
    try:
        for piece in llm.stream(asked, params):
            reply.append(piece.text)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except RequestError as error:
        if not interactive:
            raise
        print(f"deltaloom: {error} (/reset starts anew)", file=sys.stderr)
        return history
    sys.stdout.write("\n")
    sys.stdout.flush()
    return [*asked, {"role": "assistant", "content": "".join(reply)}]
