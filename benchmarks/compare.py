"""Compare engines fairly: a fresh process for each engine and round, rounds alternating. Prints a Markdown table.

    python benchmarks/compare.py CHECKPOINT --rounds 5 \\
        --engine "transformers=bench_transformers.py" \\
        --engine "grouped=bench_transformers.py --experts grouped_mm" -- --prefill 512 --tokens 32

An engine is a name and a program in this folder that prints one line of JSON (protocol.py); what follows `--` goes to
each. The first engine is the one that the others are compared with. A cell holds the median over the rounds, the spread
from the slowest to the fastest round, and the ratio to the first engine's median.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def run(command: str, checkpoint: str, common: list[str]) -> dict[str, float]:
    """One fresh process; its figures in tokens per second."""
    program, *own = shlex.split(command)
    arguments = [sys.executable, str(FOLDER / program), checkpoint, *own, *common]
    printed = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(printed.splitlines()[-1])
    names = [name for name in result if name.startswith(("prefill_", "decode_at_"))]
    return {name: result[name] for name in names if not name.endswith(("_best", "_cpu_ms"))}


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """The medians over the rounds of each engine as a Markdown table, a row for each figure."""
    engines = list(rounds)
    lines = ["| tokens/s | " + " | ".join(engines) + " |", "| --- |" + " --- |" * len(engines)]
    for figure in rounds[engines[0]][0]:
        base = statistics.median(each[figure] for each in rounds[engines[0]])
        cells = []
        for engine in engines:
            values = [each[figure] for each in rounds[engine]]
            middle = statistics.median(values)
            ratio = "" if engine == engines[0] else f", {middle / base:.2f}×"
            cells.append(f"{middle:.1f} ({min(values):.1f}–{max(values):.1f}){ratio}")
        lines.append(f"| {figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    border = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=PROGRAM", help="repeat for each")
    parser.add_argument("--json", type=Path, help="write every round's figures here")
    arguments = parser.parse_args(words[:border])
    commands = dict(engine.partition("=")[::2] for engine in arguments.engine)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(arguments.rounds):
        for name, command in commands.items():
            rounds[name].append(run(command, arguments.checkpoint, words[border + 1 :]))
            print(f"round {number + 1} of {arguments.rounds}: {name} {rounds[name][-1]}", file=sys.stderr)
    print(table(rounds))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"checkpoint": arguments.checkpoint, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
