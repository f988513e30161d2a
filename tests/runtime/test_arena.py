"""Decode in arenas: results are those of steps that allocate, nobody sees another's memory, and a step allocates nothing large."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import deltaloom
from deltaloom.backends import backend
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Variant
from deltaloom.passes.emit import Program
from deltaloom.runtime.arena import KEPT, Arenas, make_arena, no_buffers
from deltaloom.runtime.compile import compile
from deltaloom.runtime.load import build_graph
from deltaloom.runtime.model import Model
from deltaloom.runtime.state import ModelState
from deltaloom.testing.allocations import Allocation, recorded
from deltaloom.testing.programs import RandomRun

LARGE = 4096
DECODE = Variant(decode=True, padded=False, outputs=("last_logits",))
WIDE = {
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 128,
    "linear_num_value_heads": 16,
    "linear_num_key_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
"""A model whose every value of a step is 4 KiB or more."""


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    """The bundled model on one thread: allocations of other threads are not seen."""
    yield deltaloom.load("tiny-next", config=CompileConfig(threads=1))


def tokens(batch: int, count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(2, 4000, (batch, count))


def decoded(model: Model, state: ModelState, count: int, seed: int) -> list[Any]:
    """The logits of ``count`` steps."""
    found = [model.forward(tokens(state.batch, 1, seed + n), state=state, logits="last").logits for n in range(count)]
    assert all(logits is not None for logits in found)
    return found


def spoil(arenas: Arenas) -> int:
    """NaN in every arena that nobody uses; their number."""
    for arena in arenas._idle:
        arena.memory.fill(255)
    return len(arenas._idle)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_steps_in_an_arena_give_what_steps_that_allocate_give(
    model: Model, batch: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across a growth of the caches, with arenas full of NaN before each step; results stay as they were."""
    mask = np.ones((batch, 60), np.int64)
    mask[0, : 7 if padded else 0] = 0
    prompt = tokens(batch, 60)
    planned, plain = model.new_state(batch), model.new_state(batch)
    for state in (planned, plain):
        model.forward(prompt, state=state, attention_mask=mask, logits=None)
    found = []
    for step in range(8):
        found += decoded(model, planned, 1, step)
        assert spoil(model.main.arenas) > 0
    program = model.main.program(Variant(True, padded, ("last_logits",)))

    def allocating(variant: Variant, one: Program, arguments: tuple[Any, ...], state: ModelState) -> Any:
        assert one is program
        return one.run(*arguments, no_buffers(one))

    monkeypatch.setattr(model.main, "_call", allocating)
    for logits, want in zip(found, decoded(model, plain, 8, 0), strict=True):
        np.testing.assert_array_equal(logits, want)


def test_threads_with_states_of_their_own_do_not_disturb_each_other(model: Model) -> None:
    states = [model.new_state(2) for _ in range(4)]
    alone = [decoded(model, model.new_state(2), 12, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: decoded(model, states[seed], 12, seed), range(4)))
    np.testing.assert_array_equal(together, alone)


def test_an_arena_is_used_by_one_run_at_a_time_and_few_are_kept(model: Model) -> None:
    program, arenas = model.main.program(DECODE), Arenas(backend("numpy", threads=1))
    sizes = {"batch": 1, "past": 64}
    one, other = (arenas.take(program, "p", sizes) for _ in range(2))
    assert one is not other and not np.shares_memory(one.memory, other.memory)
    arenas.give(one)
    assert arenas.take(program, "p", sizes) is one
    assert arenas.take(program, "q", sizes) is not one and arenas.take(program, "p", {**sizes, "past": 128}) is not one
    for number in range(KEPT + 3):
        arenas.give(arenas.take(program, number, sizes))
    assert len(arenas._idle) == KEPT and arenas._idle[-1].key == (KEPT + 2, *sizes.items())


def test_an_arena_is_not_used_again_after_a_run_that_failed(model: Model) -> None:
    """A thread of the pool may still be writing to it."""
    program = model.main.program(DECODE)
    executor = model.main
    executor.arenas._idle.clear()

    class Broken:
        memory = program.memory

        def plan(self, sizes: Any) -> Any:
            return program.plan(sizes)

        def run(self, *arguments: Any) -> Any:
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return getattr(program, name)

    with pytest.raises(KeyboardInterrupt):
        executor._call(DECODE, Broken(), (), model.new_state(1))  # type: ignore[arg-type]
    assert not executor.arenas._idle


def test_the_emitted_source_runs_by_itself_with_and_without_buffers() -> None:
    program = compile(build_graph("tiny-next").main, CompileConfig(threads=1)).program("decode", outputs=DECODE.outputs)
    space: dict[str, Any] = {}
    exec(program.source, space)
    home = backend("numpy", threads=1)
    results = []
    for run, planned in ((program.run, True), (space["qwen3_next"], True), (space["qwen3_next"], False)):
        one = RandomRun(program, home, batch=2, length=10)
        object.__setattr__(program, "run", run)
        results.append(one.step(make_arena(program, home, 0, one.sizes).buffers if planned else no_buffers(program))[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def large(found: list[Allocation], results: int) -> list[Allocation]:
    """The large buffers among those found, without those of the results (which are taken out by size, so many of them)."""
    rest = [one for one in found if one.nbytes >= LARGE]
    for one in rest:
        if one.nbytes == results:
            rest.remove(one)
            break
    return rest


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_the_bundled_model_allocates_no_large_buffer_but_its_logits(model: Model, batch: int) -> None:
    state = model.new_state(batch)
    model.forward(tokens(batch, 70), state=state, logits=None)
    decoded(model, state, 2, 0)
    with recorded() as found:
        decoded(model, state, 1, 2)
    assert found, "nothing was recorded"
    assert large(found, batch * model.config.vocab_size * 4) == []


@pytest.mark.parametrize("batch", [1, 8])
def test_a_step_of_a_wide_model_allocates_no_large_buffer_but_its_logits(batch: int) -> None:
    program = compile(build_graph("tiny-next", hf_overrides=WIDE).main, CompileConfig(threads=1)).program(
        "decode", outputs=DECODE.outputs
    )
    home = backend("numpy", threads=1)
    run = RandomRun(program, home, batch=batch, length=200)
    buffers = make_arena(program, home, 0, run.sizes).buffers
    run.step(buffers)
    with recorded() as found:
        (logits,) = run.step(buffers)
    assert large(found, logits.nbytes) == []
    with recorded() as found:
        run.step(no_buffers(program))
    assert len(large(found, logits.nbytes)) > 40, "without the plan there are many"
