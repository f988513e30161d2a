"""Several backends in one program, and the emitted source as a file of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import deltaloom
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Variant
from deltaloom.runtime.arena import no_buffers

MIXES = {
    "linears on torch": CompileConfig(backends=("numpy", "torch"), kernels={"linear": ("torch",)}),
    "states on torch": CompileConfig(
        backends=("numpy", "torch"), kernels={"gated_delta_rule": ("torch",), "attention": ("torch",)}
    ),
    "states on numpy": CompileConfig(
        backends=("torch", "numpy"), kernels={"causal_conv1d": ("numpy",), "attention": ("numpy",), "moe_experts": ("numpy",)}
    ),
}


def tokens(count: int) -> Any:
    return np.random.default_rng(1).integers(5, 4000, (2, count))


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_program_equals_numpy_through_prefill_chunk_and_decode(mix: str) -> None:
    ids = tokens(72)
    want = deltaloom.load("tiny-next", backend="numpy").forward(ids).logits
    model = deltaloom.load("tiny-next", config=MIXES[mix])
    state = model.new_state(2)
    parts = [model.forward(part, state=state).logits for part in np.split(ids, [66, 70, 71], axis=1)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), want, rtol=2e-3, atol=2e-3)
    source = model.main.program(Variant(True, False, ("logits",))).source
    assert "numpy.from_host(torch.to_host(" in source and "torch.from_host(numpy.to_host(" in source


def test_an_order_of_backends_is_one_text_or_a_list_and_overrides_are_checked() -> None:
    one, other = deltaloom.load("tiny-next", backend="torch, numpy"), deltaloom.load("tiny-next", backend=["torch", "numpy"])
    assert one.ctx.config.backends == other.ctx.config.backends == ("torch", "numpy")
    with pytest.raises(deltaloom.DeltaloomError, match="there is no op 'atention'"):
        deltaloom.load("tiny-next", config=CompileConfig(kernels={"atention": ("numpy",)}))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_the_emitted_source_runs_as_it_stands(backend: str) -> None:
    model = deltaloom.load("tiny-next", backend=backend)
    start = model.forward(tokens(9), logits=None).state
    want = model.forward(tokens(1), state=start.copy(), logits="last").logits
    variant = Variant(True, False, ("last_logits",))
    program = model.main.program(variant)
    space: dict[str, Any] = {}
    exec(compile(program.source, "pasted.py", "exec"), space)
    _, weights = model.main.bound(variant)
    home = model.ctx.backends[0]
    given = [home.from_host(a) for a in (tokens(1), np.full((2, 1), 9))]
    buffers = () if program.memory is None else (no_buffers(program),)
    (found,) = space["qwen3_next"](*given, weights, start.fixed, start.append(1), *buffers)
    np.testing.assert_array_equal(home.to_host(found), want)
