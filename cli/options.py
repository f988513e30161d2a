"""The flags that several commands share, each described once. An absent flag is None: settings then come from elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

Looked = Annotated[
    str | None, typer.Argument(help="Checkpoint folder, its config.json alone, or bundled name; tiny-next if not given.")
]
"""The model of a command that only looks at one."""
Model = Annotated[str | None, typer.Option("--model", "-m", help="Checkpoint folder or bundled name.", metavar="MODEL")]
RunFile = Annotated[Path | None, typer.Option("--config", help="TOML file with [model], [compile] and [sampling].", metavar="FILE")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show every setting and where it comes from, and exit.")]

Backend = Annotated[
    str | None,
    typer.Option("--backend", "-b", help="numpy, torch, inductor, cuda or onnx; several by comma, the first that can runs an op."),
]
DType = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; all if not given.")]

Quantise = Annotated[
    str | None,
    typer.Option(
        "--quantise", "--quantize", help="Weights as bf16, int8, int4 or fp8; or JSON: name pattern to scheme.", metavar="SCHEME"
    ),
]
KeepQuantized = Annotated[
    bool | None, typer.Option("--keep-quantized/--no-keep-quantized", help="Weights that are stored quantised stay so.")
]
Skip = Annotated[str | None, typer.Option("--skip", help="Passes to leave out, by comma.", metavar="PASSES")]
Fuel = Annotated[int | None, typer.Option("--fuel", help="Rewrite rules change nothing more after so many rewrites.")]
Mesh = Annotated[str | None, typer.Option("--mesh", help="Ranks of a partition, for example tp=2.", metavar="AXIS=N")]
Cache = Annotated[str | None, typer.Option("--cache", help="Keep compiled graphs: default, a folder, or off.", metavar="FOLDER")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor keep compiled graphs.")]

MaxModelLen = Annotated[int | None, typer.Option("--max-model-len", help="Most tokens of prompt and output together.")]
GenerationConfig = Annotated[
    str | None, typer.Option("--generation-config", help="auto: sampling defaults of the checkpoint; none: neutral ones.")
]
HfOverrides = Annotated[str | None, typer.Option("--hf-overrides", help="JSON object laid over config.json.", metavar="JSON")]
CheckWeights = Annotated[
    bool | None, typer.Option("--check-weights/--no-check-weights", help="Read every weight and refuse NaN and infinity.")
]

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="Most tokens to generate; until the context is full if not given.")
]
MinTokens = Annotated[int | None, typer.Option("--min-tokens", help="No end before so many tokens.")]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0: always the likeliest token.")]
TopP = Annotated[float | None, typer.Option("--top-p", help="Smallest set of tokens with this probability.")]
TopK = Annotated[int | None, typer.Option("--top-k", help="Likeliest tokens to draw from; 0 is off.")]
MinP = Annotated[float | None, typer.Option("--min-p", help="Least probability, relative to the likeliest.")]
PresencePenalty = Annotated[float | None, typer.Option("--presence-penalty", help="Taken off tokens already generated.")]
FrequencyPenalty = Annotated[float | None, typer.Option("--frequency-penalty", help="Taken off for each time generated.")]
RepetitionPenalty = Annotated[float | None, typer.Option("--repetition-penalty", help="Divides tokens already seen; 1 is off.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Repeats a run; a fresh one if not given.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="Text that ends the output; may be repeated.", metavar="TEXT")]
IgnoreEos = Annotated[bool | None, typer.Option("--ignore-eos/--no-ignore-eos", help="Go on after an end token.")]
