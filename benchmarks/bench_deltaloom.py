"""Prefill and decode speed of deltaloom on a checkpoint, on the CPU. Prints one line of JSON.

    python benchmarks/bench_deltaloom.py CHECKPOINT --backend numpy [--quantise bf16] [--prefill 128,512] [--contexts 128]
                                                                    [--tokens 32] [--skip fuse]

The figures are named in protocol.py. Prompts are random, from a seed.
"""

import argparse
import json
import time

from protocol import DECODE_WARM_UP, circumstances, flags, limit_threads, peak_mb, timed

TORCH = ("torch", "inductor")
"""Backends whose libraries have threads of their own; the others share NumPy's pool, which the configuration sizes."""


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    if arguments.backend in TORCH:
        limit_threads(arguments.threads)
    import numpy as np

    import deltaloom
    from deltaloom.passes.config import CompileConfig

    started = time.perf_counter()
    config = CompileConfig(
        backends=(arguments.backend,),
        dtype=arguments.dtype,
        threads=arguments.threads,
        prefill_chunk=arguments.chunk,
        quantise=arguments.quantise or {},
        skip=tuple(arguments.skip.split(",")) if arguments.skip else (),
    )
    model = deltaloom.load(arguments.checkpoint, config=config)
    engine = " ".join(filter(None, ["deltaloom", arguments.backend, arguments.quantise]))
    result = circumstances(arguments, engine, time.perf_counter() - started)
    generator = np.random.default_rng(1)

    def prompt(length: int) -> "np.ndarray[tuple[int, int], np.dtype[np.int64]]":
        return generator.integers(2, model.config.vocab_size, (1, length))

    for length in arguments.prefill:

        def prefill(length: int = length) -> None:
            model.forward(prompt(length), logits="last")

        result |= timed(prefill, repeats=arguments.repeats, warm_up=1).figures(f"prefill_{length}", length)
    for context in arguments.contexts:
        output = model.forward(prompt(context), logits="last")
        state = output.state
        assert output.logits is not None
        token = output.logits[:, -1].argmax(-1)[:, None]

        def decode() -> None:
            logits = model.forward(token, state=state, logits="last").logits  # noqa: B023 - run before the next context
            assert logits is not None
            token[...] = logits[:, -1].argmax(-1)[:, None]  # noqa: B023

        result |= timed(decode, repeats=arguments.tokens, warm_up=DECODE_WARM_UP).figures(f"decode_at_{context}", 1)
    return result | {"peak_mb": peak_mb()}


def main() -> None:
    parser = flags((__doc__ or "").split("\n")[0])
    parser.add_argument("--backend", default="numpy", help="any that is installed")
    parser.add_argument("--quantise", default="", help="scheme of the weights, such as bf16")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens a prefill step at most")
    parser.add_argument("--skip", default="", help="passes to leave out, with commas between them")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
