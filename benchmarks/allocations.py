"""Array buffers that a decode step of the NumPy backend allocates, with and without its memory plan. Prints a Markdown table.

    python benchmarks/allocations.py [MODEL] [--batches 1,8] [--length 512] [--wide] [--lines]

Counted are buffers of 4 KiB or more (views are none), on one thread, with random weights: only config.json is read. Outputs of the
program are the caller's and are counted apart. `--wide` makes the model about as wide as a 2B model, with four layers.
"""

import argparse
from collections import Counter

from protocol import lengths

import deltaloom
from deltaloom.backends import backend
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.arena import Buffers, make_arena, no_buffers
from deltaloom.testing.allocations import Allocation, recorded
from deltaloom.testing.programs import RandomRun

LARGE = 4096
WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "linear_num_value_heads": 16,
    "linear_num_key_heads": 8,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}


def step(run: RandomRun, buffers: Buffers) -> tuple[list[Allocation], int]:
    """The large buffers of one step, but for those of its outputs; and the bytes of these."""
    run.step(buffers)
    with recorded() as found:
        outputs = run.step(buffers)
    left = Counter(one.nbytes for one in outputs)
    rest = []
    for one in reversed(found):  # outputs are made last
        if left[one.nbytes]:
            left[one.nbytes] -= 1
        elif one.nbytes >= LARGE:
            rest.append(one)
    return rest, sum(one.nbytes for one in outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", nargs="?", default="tiny-next", help="checkpoint folder, config.json or bundled name")
    parser.add_argument("--batches", type=lengths, default=[1, 8])
    parser.add_argument("--length", type=int, default=512, help="tokens that the state holds")
    parser.add_argument("--wide", action="store_true", help="replace the sizes of MODEL (a Qwen3-Next) by wider ones")
    parser.add_argument("--lines", action="store_true", help="list the lines that allocate under the plan")
    options = parser.parse_args()
    graph = deltaloom.build_graph(options.model, hf_overrides=WIDE if options.wide else None).main
    program = deltaloom.compile(graph, CompileConfig(threads=1)).program("decode", outputs=("last_logits",))
    home = backend("numpy", threads=1)
    print("| batch | arena | the same without reuse | outputs | large buffers, no plan | large buffers, planned |")
    print("|---|---|---|---|---|---|")
    lines: Counter[tuple[int, int, str]] = Counter()
    for batch in options.batches:
        run = RandomRun(program, home, batch=batch, length=options.length)
        arena = make_arena(program, home, "allocations", run.sizes)
        plain, outputs = step(run, no_buffers(program))
        planned, _ = step(run, arena.buffers)
        figures = [f"{len(found)} ({sum(one.nbytes for one in found):,} bytes)" for found in (plain, planned)]
        sizes = [f"{arena.plan.nbytes:,}", f"{arena.plan.unshared:,}", f"{outputs:,}"]
        print(f"| {batch} | {' | '.join([*sizes, *figures])} |")
        lines.update((batch, one.nbytes, one.where) for one in planned)
    if options.lines:
        for (batch, nbytes, where), count in sorted(lines.items()):
            print(f"batch {batch}: {count} x {nbytes:,} bytes in {where}")


if __name__ == "__main__":
    main()
