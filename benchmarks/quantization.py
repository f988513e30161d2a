"""What quantised weights cost and save on the bundled model: prints the tables of benchmarks/RESULTS.md.

    python benchmarks/quantization.py [--schemes int8,fp8,int4] [--backend numpy] [--tokens N] [--weights]

Perplexity is that of tests/golden/tiny_next/eval_text.txt in windows of 512 tokens (``--tokens``: of its first N); generations are
the 40 reference ones beside it, token for token. ``--weights`` prints the error of every weight too. Each scheme runs in a process
of its own, with one thread; its memory is what it holds in anonymous memory beyond the imports, once the weights are there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tiny_next"
FLOAT = "float32"
TARGETS = {"int8": 1.01, "fp8": 1.03, "int4": 1.15}
"""Perplexity of a scheme at most, in units of that of float32."""


def measure(scheme: str, backend: str, tokens: int | None, weights: bool) -> dict[str, Any]:
    import deltaloom
    from deltaloom.passes.config import CompileConfig
    from deltaloom.runtime import quantization
    from deltaloom.runtime.params import SamplingParams

    before = anonymous_mb()
    config = CompileConfig(backends=(backend,), dtype="float32", threads=1, quantise={} if scheme == FLOAT else scheme)
    llm = deltaloom.LLM("tiny-next", config=config)
    model = llm.model
    memory = anonymous_mb() - before
    ids = llm.tokenizer.encode((GOLDEN / "eval_text.txt").read_text(encoding="utf-8"))[:tokens]
    items = json.loads((GOLDEN / "reference_generations.json").read_text(encoding="utf-8"))["items"]
    greedy = SamplingParams(max_tokens=64, temperature=0)
    started = time.process_time()
    made = [llm.generate([item["prompt_ids"]], greedy)[0].outputs[0].token_ids for item in items]
    seconds = time.process_time() - started
    wanted = [item["output_ids"] for item in items]
    result: dict[str, Any] = {
        "scheme": scheme,
        "perplexity": quantization.perplexity(model, ids),
        "scored": len(ids),
        "generations": sum(a == b for a, b in zip(made, wanted, strict=True)),
        "agreeing": sum(same_start(a, b) for a, b in zip(made, wanted, strict=True)) / sum(map(len, wanted)),
        "file_mb": quantization.weight_bytes(model, plain_itemsize=2) / 1e6,
        "held_mb": quantization.weight_bytes(model) / 1e6,
        "memory_mb": memory,
        "tokens_per_second": sum(map(len, made)) / seconds,
    }
    if scheme != FLOAT:
        plain = deltaloom.load("tiny-next", backend=backend, dtype="float32", config=CompileConfig(threads=1))
        result["logits"] = vars(quantization.logit_error(model, plain, ids[:512]))
        result["weights"] = [vars(error) for error in quantization.weight_errors(model)] if weights else worst(model)
    return result


def worst(model: Any) -> list[dict[str, Any]]:
    """The three weights with the largest relative error."""
    from deltaloom.runtime import quantization

    errors = sorted(quantization.weight_errors(model), key=lambda error: -error.rms)
    return [vars(error) for error in errors[:3]]


def same_start(made: list[int], wanted: list[int]) -> int:
    """How many tokens agree before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(made, wanted)) if a != b), min(len(made), len(wanted)))


def anonymous_mb() -> float:
    """Anonymous memory of this process, in 10^6 bytes (Linux; elsewhere NaN)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024e-6 for line in status if line.startswith("RssAnon"))
    except OSError:
        return float("nan")


def models_table(results: list[dict[str, Any]]) -> str:
    """One row a scheme."""
    float32 = results[0]["perplexity"]
    lines = [
        "| weights | perplexity | of float32 | wanted at most | generations | tokens before a difference "
        "| in a file, rest bf16, MB | as held, rest f32, MB | process, MB | tokens a processor second |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        target = f"{TARGETS[row['scheme']]:.2f}" if row["scheme"] in TARGETS else ""
        quality = f"{row['perplexity']:.4f} | {row['perplexity'] / float32:.4f} | {target}"
        generations = f"{row['generations']} of 40 | {100 * row['agreeing']:.1f} %"
        sizes = f"{row['file_mb']:.2f} | {row['held_mb']:.2f} | {row['memory_mb']:.1f}"
        lines.append(f"| {row['scheme']} | {quality} | {generations} | {sizes} | {row['tokens_per_second']:.0f} |")
    return "\n".join(lines)


def logits_table(results: list[dict[str, Any]]) -> str:
    """Logits of each scheme against float32's."""
    lines = ["| weights | relative RMS | largest | divergence, nats a token | same best token |", "| --- | --- | --- | --- | --- |"]
    for row in (row for row in results if "logits" in row):
        found = row["logits"]
        agreement = f"{100 * found['agreement']:.1f} %"
        figures = f"{found['rms']:.4f} | {found['largest']:.3f} | {found['divergence']:.5f} | {agreement}"
        lines.append(f"| {row['scheme']} | {figures} |")
    return "\n".join(lines)


def weights_table(results: list[dict[str, Any]]) -> str:
    """The errors of weights that were asked for."""
    lines = ["| weight | form | relative RMS | largest | bytes before | after |", "| --- | --- | --- | --- | --- | --- |"]
    for error in (error for row in results for error in row.get("weights", ())):
        lines.append(
            f"| {error['name']} | {error['form']} | {error['rms']:.5f} | {error['largest']:.5f} | {error['plain_size']} "
            f"| {error['size']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--schemes", default="int8,fp8,int4", help="schemes, with commas between them")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--tokens", type=int, default=None, help="score only so many tokens of the text")
    parser.add_argument("--weights", action="store_true", help="print the error of every weight, not of the three worst")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.backend, arguments.tokens, arguments.weights)))
        return
    results = []
    for scheme in [FLOAT, *arguments.schemes.split(",")]:
        command = [sys.executable, __file__, "--one", scheme, "--backend", arguments.backend]
        command += [] if arguments.tokens is None else ["--tokens", str(arguments.tokens)]
        command += ["--weights"] if arguments.weights else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    print(models_table(results), logits_table(results), weights_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
