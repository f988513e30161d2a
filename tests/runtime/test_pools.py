"""The fixed pools and the packing of a step: sizes, poison, copies, and what is refused."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import deltaloom
from deltaloom.graph.errors import ConfigError, RequestError
from deltaloom.passes.driver import Variant
from deltaloom.runtime.packing import Segment, pack
from deltaloom.runtime.pools import StatePools
from deltaloom.testing.serving import ServedModel

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FOLDER = GOLDEN / "next_mtp"


@cache
def served(part: str = "main", block_size: int = 4) -> ServedModel:
    return ServedModel(FOLDER, part=part, dtype="float32", block_size=block_size)


def pools(*models: ServedModel, poison: bool = False) -> StatePools:
    programs = [program for model in models for program in model.programs.values()]
    return StatePools(programs, {b.name: b for b in models[0].ctx.backends}, slots=3, blocks=5, poison=poison)


def test_bytes_are_those_of_the_arrays() -> None:
    found = pools(served())
    arrays = found.arrays()
    slots = [a for name, a in arrays.items() if "linear_attn" in name]
    blocks = [a for name, a in arrays.items() if "self_attn" in name]
    assert len(slots) + len(blocks) == len(arrays) and slots and blocks
    assert all(a.shape[0] == 3 for a in slots) and all(a.shape[0] == 5 and a.shape[2] == 4 for a in blocks)
    assert found.slot_bytes * 3 == sum(a.nbytes for a in slots)
    assert found.block_bytes * 5 == sum(a.nbytes for a in blocks)
    assert found.nbytes == sum(a.nbytes for a in arrays.values())
    assert not any(a.any() for a in arrays.values())


def test_a_model_and_its_head_share_one_pool() -> None:
    main, both = pools(served()), pools(served(), served("mtp"))
    assert set(both.arrays()) - set(main.arrays()) == {"mtp.layers.0.self_attn.key", "mtp.layers.0.self_attn.value"}
    assert both.block_bytes > main.block_bytes and both.slot_bytes == main.slot_bytes


def test_poison_is_where_nobody_wrote_and_where_it_was_freed() -> None:
    found = pools(served(), poison=True)
    assert all(np.isnan(a).all() for a in found.arrays().values())
    served().step(found, [Segment((1, 2, 3), 0, (2,), write_slots={2: 1})])
    for name, array in found.arrays().items():
        if "linear_attn" in name:
            assert not np.isnan(array[1]).any() and np.isnan(array[[0, 2]]).all()
        else:
            assert not np.isnan(array[2, :, :3]).any() and np.isnan(array[2, :, 3:]).all() and np.isnan(array[[0, 1, 3, 4]]).all()
    found.free_slots([1])
    found.free_blocks([2])
    assert all(np.isnan(a).all() for a in found.arrays().values())


def test_without_poison_freeing_touches_nothing() -> None:
    found = pools(served())
    served().step(found, [Segment((1, 2, 3), 0, (2,), write_slots={2: 1})])
    before = found.arrays()
    found.free_slots([1])
    found.free_blocks([2])
    assert all(np.array_equal(before[name], array) for name, array in found.arrays().items())


def test_blocks_are_copied_in_every_layer() -> None:
    found = pools(served(), served("mtp"))
    served().step(found, [Segment((1, 2, 3), 0, (2,), write_slots={2: 1})])
    found.copy_blocks([2, 2], [4, 1])
    for name, array in found.arrays().items():
        if "self_attn" in name:
            assert np.array_equal(array[4], array[2]) and np.array_equal(array[1], array[2])
            assert array[2].any() == ("mtp" not in name)


def test_pools_that_cannot_be_are_refused() -> None:
    programs, backends = list(served().programs.values()), {b.name: b for b in served().ctx.backends}
    with pytest.raises(ConfigError, match="slots is 1, expected at least 2: number 0 is scratch"):
        StatePools(programs, backends, slots=1, blocks=5)
    other = list(served(block_size=8).programs.values())
    with pytest.raises(ConfigError, match="different pools under 'model.layers.3.'; give them one block size"):
        StatePools([*programs, *other], backends, slots=3, blocks=5)
    base = deltaloom.load(FOLDER, dtype="float32").main.program(Variant(True, False, ("last_logits",)))
    with pytest.raises(ConfigError, match="is no pool; compile the program with the serving layout"):
        StatePools([base], backends, slots=3, blocks=5)
    found = pools(served())
    with pytest.raises(RequestError, match=re.escape("blocks [5] are not among the 5 of this pool")):
        found.free_blocks([1, 5])
    with pytest.raises(RequestError, match="2 blocks cannot be copied to 1"):
        found.copy_blocks([1, 2], [3])


def test_a_mixed_step_is_packed_row_after_row() -> None:
    rows = [Segment((7, 8, 9), 2, (3, 1), 4, {1: 5, 2: 6}, (0, -1)), Segment((6,), 0, (2,), write_slots={0: 7}, logit_rows=())]
    packed = pack(rows, block_size=4, seqs=3, tokens=6)
    want = {
        "token_ids": [[7, 8, 9, 6, 0, 0]],
        "positions": [[2, 3, 4, 0, 0, 0]],
        "block_tables": [[3, 1], [2, 0], [0, 0]],
        "context_lengths": [2, 0, 0],
        "read_slots": [4, -1, -1],
        "write_slots": [-1, 5, 6, 7, -1, -1],
        "query_starts": [0, 3, 4, 4],
        "logit_rows": [0, 2],
    }
    assert {name: array.tolist() for name, array in packed.items()} == want


def test_a_uniform_step_is_filled_with_rows_in_scratch() -> None:
    packed = pack([Segment((7, 8), 3, (3, 1), 4, {0: 5})], block_size=4, tokens_each=2, seqs=2)
    want = {
        "token_ids": [[7, 8, 0, 0]],
        "positions": [[3, 4, 0, 1]],
        "block_tables": [[3, 1], [0, 0]],
        "context_lengths": [3, 0],
        "read_slots": [4, -1],
        "write_slots": [5, -1, -1, -1],
    }
    assert {name: array.tolist() for name, array in packed.items()} == want


@pytest.mark.parametrize(
    ("rows", "each", "message"),
    [
        ([], None, "a step needs at least one sequence"),
        ([Segment((), 0, ())], None, "sequence 0 of the step has 0 tokens, expected at least 1"),
        ([Segment((1, 2), 0, (1,))], 1, "sequence 0 of the step has 2 tokens, expected 1"),
        ([Segment((1, 2), 3, (1,))], None, "sequence 0 of the step reaches position 5, but its 1 blocks end at 4"),
        ([Segment((1,), 0, (1,), write_slots={1: 2})], None, "sequence 0 of the step names token [1], but has 1"),
        ([Segment((1,), 0, (b,), write_slots={0: 2}) for b in (1, 2)], None, "sequence 1 of the step writes slot 2, as sequence 0"),
        (
            [Segment((1,), 4, (1, 2), 3), Segment((1,), 4, (3, 4), 5, {0: 3})],
            None,
            "sequence 0 of the step reads slot 3, which sequence 1 writes; write another slot",
        ),
        (
            [Segment((1,), 5, (1, 2)), Segment((1,), 4, (3, 2))],
            None,
            "sequence 0 of the step writes to block 2, which sequence [1] uses",
        ),
    ],
)
def test_steps_that_do_not_fit_are_refused(rows: list[Segment], each: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        pack(rows, block_size=4, tokens_each=each)


def test_full_blocks_of_a_prefix_may_be_shared() -> None:
    pack([Segment((1,), 4, (1, 2)), Segment((1,), 4, (1, 3)), Segment((1,), 8, (1, 5, 4))], block_size=4)
