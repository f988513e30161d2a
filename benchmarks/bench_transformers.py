"""Prefill and decode speed of Hugging Face transformers on a checkpoint, on the CPU. Prints one line of JSON.

    python benchmarks/bench_transformers.py CHECKPOINT [--prefill 128,512] [--contexts 128] [--tokens 32]

The figures are named in protocol.py. Prompts are random, from a seed.
"""

import argparse
import json
import time

from protocol import DECODE_WARM_UP, circumstances, flags, limit_threads, peak_mb, timed


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    limit_threads(arguments.threads)
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    started = time.perf_counter()
    options = {} if arguments.experts is None else {"experts_implementation": arguments.experts}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=getattr(torch, arguments.dtype), attn_implementation=arguments.attention, **options
    ).eval()
    result = circumstances(arguments, f"transformers {transformers.__version__}", time.perf_counter() - started)
    generator = torch.Generator().manual_seed(1)

    def prompt(length: int) -> torch.Tensor:
        return torch.randint(2, model.config.vocab_size, (1, length), generator=generator)

    with torch.inference_mode():
        for length in arguments.prefill:

            def prefill(length: int = length) -> None:
                model(input_ids=prompt(length), use_cache=True, logits_to_keep=1)

            result |= timed(prefill, repeats=arguments.repeats, warm_up=1).figures(f"prefill_{length}", length)
        for context in arguments.contexts:
            output = model(input_ids=prompt(context), use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            token = output.logits[:, -1].argmax(-1, keepdim=True)

            def decode(cache: object = cache, token: torch.Tensor = token) -> None:
                logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
                token.copy_(logits[:, -1].argmax(-1, keepdim=True))

            runs = timed(decode, repeats=arguments.tokens, warm_up=DECODE_WARM_UP)
            result |= runs.figures(f"decode_at_{context}", 1)
    return result | {"peak_mb": peak_mb()}


def main() -> None:
    parser = flags((__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", choices=["eager", "grouped_mm", "batched_mm"], help="how it runs the experts")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
