"""Our passes, by the suite that every pass is held to."""

from deltaloom.graph.op import Draw
from deltaloom.graph.types import f64
from deltaloom.passes.quantise import Quantise
from deltaloom.passes.quantise_policy import quantise_policy
from deltaloom.passes.serving_layout import ServingLayout
from deltaloom.passes.specialise import AssumeUnpadded, Specialise
from deltaloom.passes.table import TABLE
from deltaloom.testing import PassSuite, claims
from deltaloom.testing.samples import Sample, filled
from deltaloom.testing.toy_models import HYBRID, toy_graph

TESTED = {
    "canonicalise", "shard", "fold", "pack_siblings", "fuse", "border_fusion", "quantise", "lift_weights", "select_outputs",
    "assume_unpadded", "specialise", "serving_layout", "assign", "transfers",
}  # fmt: skip


class Ours(PassSuite):
    requirements = claims("meaning", "idempotent")


class TestCanonicalise(Ours):
    step = "canonicalise"


class TestShardOverOneRank(Ours):
    """Without a mesh; what a mesh makes is compared with one rank in tests/passes/test_shard_models.py."""

    step = "shard"


class TestFold(Ours):
    step = "fold"


class TestPackSiblings(Ours):
    step = "pack_siblings"


class TestFuse(Ours):
    step = "fuse"


class TestBorderFusion(Ours):
    step = "border_fusion"


class TestQuantise(PassSuite):
    """The numbers change, and by how much is in tests/passes/test_quantise.py."""

    step = Quantise(policy=quantise_policy("int8"))
    requirements = claims("idempotent")


class TestLiftWeights(Ours):
    """What is lifted cannot be lifted again."""

    step = "lift_weights"
    requirements = claims("meaning")


class TestSelectOutputs(Ours):
    step = "select_outputs"


class TestAssumeUnpadded(Ours):
    step = AssumeUnpadded()


class TestSpecialise(Ours):
    step = Specialise(seq=1)
    seq = 1


class TestServingLayout(PassSuite):
    """Inputs and states are others afterwards; that the numbers are not is in tests/passes/test_serving_layout.py."""

    step = ServingLayout()
    requirements = claims()

    def sample(self, draw: Draw) -> Sample:
        return filled(toy_graph(HYBRID, f64), draw, {"batch": 1, "seq": 2, "past": 0})


class TestAssign(Ours):
    step = "assign"


class TestTransfers(Ours):
    step = "transfers"


def test_every_pass_is_here() -> None:
    assert set(TABLE) == TESTED
