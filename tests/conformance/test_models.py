"""Our model families, by the suite that every family is held to; the checkpoints are those of the goldens."""

from pathlib import Path

from deltaloom.models.families import FAMILIES
from deltaloom.testing import ModelSuite, claims

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


class Ours(ModelSuite):
    requirements = claims("inventory")


class TestQwen3(Ours):
    model = "qwen3"
    checkpoint = GOLDEN / "qwen3_dense"


class TestQwen3Moe(Ours):
    model = "qwen3_moe"
    checkpoint = GOLDEN / "qwen3_moe"


class TestQwen3Next(Ours):
    model = "qwen3_next"
    checkpoint = GOLDEN / "next_mtp"


def test_every_family_is_here() -> None:
    assert set(FAMILIES) == {suite.model for suite in (TestQwen3, TestQwen3Moe, TestQwen3Next)}
