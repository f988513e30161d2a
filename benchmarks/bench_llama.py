"""Prefill and decode speed of llama.cpp on a checkpoint, on the CPU, or how far it agrees. Prints one line of JSON.

    python benchmarks/bench_llama.py CHECKPOINT --gguf MODEL.gguf [--prefill 128,512] [--contexts 128] [--tokens 32] [--check]

Needs the package `llama-cpp-python`; the file is one of `to_gguf.py`. The figures are named in protocol.py. Prompts are random.
`--check` compares logits with deltaloom's on NumPy: a prompt of 130 tokens, then, one by one, the tokens that it chooses.
"""

import argparse
import json
import time
from pathlib import Path

from protocol import DECODE_WARM_UP, circumstances, flags, limit_threads, peak_mb, timed

CHECKED_PROMPT, CHECKED_STEPS = 130, 20


def opened(arguments: argparse.Namespace, *, context: int, exact_cache: bool = False):  # type: ignore[no-untyped-def]
    limit_threads(arguments.threads)
    from llama import Llama

    vocabulary = json.loads((arguments.checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return Llama(arguments.gguf, threads=arguments.threads, context=context, vocabulary=vocabulary, exact_cache=exact_cache)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    import numpy as np

    started = time.perf_counter()
    longest = max([*arguments.prefill, *(length + arguments.tokens + DECODE_WARM_UP for length in arguments.contexts)])
    model = opened(arguments, context=longest)
    result = circumstances(arguments, "llama.cpp", time.perf_counter() - started) | {"file": arguments.gguf.name}
    generator = np.random.default_rng(1)

    def prompt(length: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
        return generator.integers(2, model.vocabulary, (1, length))

    for length in arguments.prefill:

        def prefill(length: int = length) -> None:
            model.clear()
            model.forward(prompt(length))

        result |= timed(prefill, repeats=arguments.repeats, warm_up=1).figures(f"prefill_{length}", length)
    for context in arguments.contexts:
        model.clear()
        token = model.forward(prompt(context)).argmax()[None]

        def decode(token: "np.ndarray[tuple[int], np.dtype[np.int64]]" = token) -> None:
            token[...] = model.forward(token).argmax()

        result |= timed(decode, repeats=arguments.tokens, warm_up=DECODE_WARM_UP).figures(f"decode_at_{context}", 1)
    return result | {"peak_mb": peak_mb()}


def check(arguments: argparse.Namespace) -> dict[str, object]:
    """Normalised mean squared error of its logits against ours, and how often both have the same best token."""
    import numpy as np

    import deltaloom

    model = opened(arguments, context=CHECKED_PROMPT + CHECKED_STEPS, exact_cache=True)
    ours = deltaloom.load(arguments.checkpoint, backend="numpy", dtype="float32")
    ids = np.random.default_rng(1).integers(2, model.vocabulary, (1, CHECKED_PROMPT))
    errors, agreeing, state = [], 0, None
    for _ in range(1 + CHECKED_STEPS):
        output = ours.forward(ids, state=state, logits="last")
        state = output.state
        assert output.logits is not None
        wanted, got = output.logits[0, -1].astype(np.float64), model.forward(ids)
        errors.append(float(((got - wanted) ** 2).sum() / (wanted**2).sum()))
        agreeing += int(got.argmax() == wanted.argmax())
        ids = wanted.argmax()[None, None]
    return {
        "file": arguments.gguf.name,
        "nmse_of_prompt": errors[0],
        "nmse_of_steps_median": float(np.median(errors[1:])),
        "nmse_of_steps_max": max(errors[1:]),
        "same_best_token": f"{agreeing} of {len(errors)}",
    }


def main() -> None:
    parser = flags((__doc__ or "").split("\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="what to_gguf.py wrote; its type of weights counts, not --dtype")
    parser.add_argument("--check", action="store_true", help="compare logits with deltaloom's instead of timing")
    arguments = parser.parse_args()
    print(json.dumps(check(arguments) if arguments.check else measure(arguments)))


if __name__ == "__main__":
    main()
