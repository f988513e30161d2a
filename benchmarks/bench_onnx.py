"""Prefill and decode speed of a model exported to ONNX, in plain ONNX Runtime on the CPU. Prints one line of JSON.

    python benchmarks/bench_onnx.py CHECKPOINT [--prefill 128,512] [--contexts 128] [--tokens 32]

The figures are named in protocol.py. `bench_deltaloom.py --backend onnx` measures the backend; this, the one graph of the whole
model, with each state an input and an output of every call. Prompts are random, from a seed; the first output is compared with
NumPy's before anything is timed.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol import DECODE_WARM_UP, circumstances, flags, peak_mb, timed

CLOSE = 3e-4
"""Of the largest logit: float32 sums in other orders."""


class Exported:
    """A session of an exported model and the states of one sequence."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        import numpy as np

        sizes = {"batch_size": 1, "past_sequence_length": 0}
        past = [given for given in self._session.get_inputs() if given.name.startswith("past")]
        self._states = {given.name: np.zeros([sizes.get(size, size) for size in given.shape], np.float32) for given in past}
        self._length = 0

    def step(self, tokens: Any) -> Any:
        """The logits of ``tokens`` int64 ``[1, count]``."""
        import numpy as np

        count = tokens.shape[1]
        seen = self._length + count
        given: Mapping[str, Any] = {
            "input_ids": tokens,
            "attention_mask": np.ones((1, seen), np.int64),
            "position_ids": np.arange(self._length, seen, dtype=np.int64)[None],
            **self._states,
        }
        found = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        logits = found.pop("logits")
        self._states = {name.replace("present", "past_key_values"): state for name, state in found.items()}
        self._length = seen
        return logits


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    import numpy as np

    import deltaloom
    from deltaloom.runtime.onnx_export import export_onnx

    path = folder / "model.onnx"
    export_onnx(arguments.checkpoint, path)
    started = time.perf_counter()
    model = Exported(path, arguments.threads)
    result = circumstances(arguments, "exported to ONNX", time.perf_counter() - started)
    generator = np.random.default_rng(1)
    reference = deltaloom.load(arguments.checkpoint, backend="numpy", dtype="float32")

    def prompt(length: int) -> Any:
        return generator.integers(2, reference.config.vocab_size, (1, length))

    tokens = prompt(20)
    want, found = reference.forward(tokens).logits, model.step(tokens)
    assert want is not None and np.abs(found - want).max() < CLOSE * np.abs(want).max(), "the exported model gives other logits"
    for length in arguments.prefill:

        def prefill(length: int = length) -> None:
            model.reset()
            model.step(prompt(length))

        result |= timed(prefill, repeats=arguments.repeats, warm_up=1).figures(f"prefill_{length}", length)
    for context in arguments.contexts:
        model.reset()
        token = model.step(prompt(context))[:, -1].argmax(-1)[:, None]

        def decode() -> None:
            token[...] = model.step(token)[:, -1].argmax(-1)[:, None]  # noqa: B023 - run before the next context

        result |= timed(decode, repeats=arguments.tokens, warm_up=DECODE_WARM_UP).figures(f"decode_at_{context}", 1)
    return result | {"peak_mb": peak_mb()}


def main() -> None:
    arguments = flags((__doc__ or "").split("\n")[0]).parse_args()
    if arguments.dtype != "float32":
        raise SystemExit("exported models are timed in float32, the dtype that ONNX Runtime has every op in on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments, Path(folder))))


if __name__ == "__main__":
    main()
