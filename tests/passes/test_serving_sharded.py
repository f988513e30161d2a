"""Serving forms of a sharded graph: two ranks in lock step over their own pools give what one rank gives."""

from pathlib import Path

import numpy as np
import pytest
from sharded_models import open_model, optimised

from deltaloom.graph.types import f64
from deltaloom.models.plans import shard_pass
from deltaloom.passes.pipeline import Context
from deltaloom.passes.serving_layout import ServingLayout
from deltaloom.passes.specialise import SelectOutputs
from deltaloom.runtime.lockstep import LockStep
from deltaloom.runtime.packing import Segment, pack

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BLOCK = 4
SIZES = {"slots": 5, "blocks": 6}
STEPS = (
    [Segment(tuple(range(3, 10)), 0, (1, 4), write_slots={6: 2}), Segment((7,), 0, (2,), write_slots={0: 3})],
    [Segment((11,), 7, (1, 4), read_slot=2, write_slots={0: 4}), Segment((5, 6, 8), 1, (2,), read_slot=3, write_slots={2: 1})],
)


def pools(graph):
    types = {name: state.value.type.substitute(SIZES) for name, state in graph.all_states().items()}
    return {name: np.full(t.static_shape(), np.nan, t.plain_dtype.numpy) for name, t in types.items()}


@pytest.mark.parametrize("variant", ["next_base", "qwen3_moe"])
def test_sharded_serving_is_single_serving(variant):
    config, graphs, source = open_model(GOLDEN / variant, f64)

    def served(tp):
        shared = optimised(graphs.main, shard_pass(config, {"tp": tp}))
        return ServingLayout(None, BLOCK).run(SelectOutputs(("logits",)).run(shared, Context()), Context())

    single, divided = served(1), served(2)
    one, many = LockStep(single, {}, source), LockStep(divided, {"tp": 2}, source)
    assert "all_reduce" in {node.op.name for region in divided.regions.values() for node in region.nodes}
    own, theirs = [pools(single)], [pools(divided), pools(divided)]
    for segments in STEPS:
        given = pack(segments, block_size=BLOCK)
        inputs = {value.name: given[value.name] for value in single.inputs}
        alone, together = one.run(inputs, own), many.run(inputs, theirs)
        own, theirs = alone.states, together.states
        assert np.isfinite(alone.outputs["logits"]).all()
        assert np.abs(alone.outputs["logits"] - together.outputs["logits"]).max() <= 1e-11
