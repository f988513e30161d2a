"""Serving programs against the base programs: any mix of sequences in one step gives what each gives alone."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltaloom
from deltaloom.graph.types import QuantType
from deltaloom.models.bundled import model_folder
from deltaloom.runtime.packing import Segment
from deltaloom.testing.serving import ServedModel
from deltaloom.testing.serving_world import World

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = [("next_base", "main"), ("next_dense_mix", "main"), ("next_mtp", "main"), ("next_mtp", "mtp"), ("qwen3_moe", "main")]
CLOSE = {"float64": 1e-9, "float32": 1e-3}
"""Largest deviation of a logit; these have a standard deviation of 1 to 3, and rounding differs with the chunks."""


class Alone:
    """The logits of a whole sequence by the base program, in the dtype of the programs."""

    def __init__(self, folder: Path, part: str, backend: str, dtype: str, quantise: str = "") -> None:
        config = deltaloom.CompileConfig(backends=(backend,), dtype=dtype, quantise=quantise or {})
        self.model = deltaloom.load(folder, config=config)
        self.vocabulary = self.model.config.vocab_size
        self.known: dict[tuple[int, ...], Any] = {}
        rng = np.random.default_rng(4)
        self.hidden = rng.standard_normal((self.vocabulary, self.model.config.hidden_size))
        self.executor = self.model.main if part == "main" else self.model.mtp.executor

    def __call__(self, tokens: tuple[int, ...]) -> Any:
        if tokens not in self.known:
            ids = np.asarray([tokens])
            inputs = {"token_ids": ids} if self.executor is self.model.main else self.features(ids)
            results = self.executor.run(inputs, self.executor.new_state(1), None, ("logits",))
            self.known[tokens] = results["logits"][0]
        return self.known[tokens]

    def features(self, ids: Any) -> dict[str, Any]:
        """The inputs of an MTP head: a hidden row for each token, made up from its id."""
        return {"next_ids": ids, "hidden": self.hidden[ids]}


@cache
def pair(variant: str, part: str, backend: str = "numpy", dtype: str = "float64", fused: bool = True) -> tuple[ServedModel, Alone]:
    folder, outputs = GOLDEN / variant, ("logits", "last_logits")
    skip = () if fused else ("fold", "fuse", "border_fusion")
    served = ServedModel(folder, part=part, backend=backend, dtype=dtype, outputs=outputs, skip=skip)
    return served, Alone(folder, part, backend, dtype)


def world(variant: str, part: str, seed: int, backend: str = "numpy", dtype: str = "float64", *, fused: bool = True) -> World:
    served, alone = pair(variant, part, backend, dtype, fused)
    features = alone.features if part == "mtp" else None
    return World(served, alone, vocabulary=alone.vocabulary, seed=seed, features=features)


@pytest.mark.parametrize(("variant", "part"), CASES)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_mix_of_sequences_gives_what_each_gives_alone(variant: str, part: str, seed: int) -> None:
    assert world(variant, part, seed).steps(12) < CLOSE["float64"]


@pytest.mark.parametrize(
    ("backend", "dtype", "fused"), [("numpy", "float64", False), ("numpy", "float32", True), ("torch", "float64", True)]
)
def test_so_it_is_without_fusion_in_other_dtypes_and_on_other_backends(backend: str, dtype: str, fused: bool) -> None:
    if backend != "numpy":
        pytest.importorskip("torch")
    for seed in range(3):
        assert world("next_base", "main", seed, backend, dtype, fused=fused).steps(12) < CLOSE[dtype]


@pytest.mark.parametrize("quantise", ["int8", "int4", "fp8"])
def test_so_it_is_with_quantised_weights(quantise: str) -> None:
    served = ServedModel(GOLDEN / "next_base", outputs=("logits", "last_logits"), quantise=quantise)
    assert any(isinstance(value.type.dtype, QuantType) for value in served.programs[1].graph.regions["linear_layer"].params)
    alone = Alone(GOLDEN / "next_base", "main", "numpy", "float64", quantise)
    for seed in range(2):
        assert World(served, alone, vocabulary=alone.vocabulary, seed=seed).steps(12) < CLOSE["float64"]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_bodies_are_as_small_as_those_of_the_base_program(backend: str) -> None:
    """Fused ops get their serving forms, with kernels of their own; nothing is taken apart where all have as many tokens."""
    if backend != "numpy":
        pytest.importorskip("torch")
    served, _ = pair("next_base", "main", backend)
    for each in (1, 4):
        regions = served.programs[each].graph.regions
        assert {name: len(region.nodes) for name, region in regions.items()} == {"linear_layer": 8, "attention_layer": 9}
        kernels = {node.op.name: node.placement.kernel for region in regions.values() for node in region.nodes if node.placement}
        assert kernels["packed_gated_delta_net"] == f"{backend}.packed_gated_delta_net"
        assert kernels["gated_paged_attention"] == f"{backend}.gated_paged_attention"


def test_the_steps_are_of_every_kind() -> None:
    seen: Counter[str] = Counter()
    for seed in range(4):
        one = world("next_dense_mix", "main", seed)
        one.steps(12)
        seen += one.seen
    assert min(seen[kind] for kind in ("mixed", "1", "4", "fork", "in place", "drafts refused")) >= 3


def test_what_was_freed_and_is_read_again_shows() -> None:
    """The poison works: without it the tests above could not tell a slot that is read too late."""
    served, _ = pair("next_base", "main", dtype="float32")
    for free in ("slots", "blocks"):
        pools = served.pools(slots=4, blocks=4)
        served.step(pools, [Segment((3, 4, 5), 0, (1,), write_slots={2: 2})])
        getattr(pools, f"free_{free}")([2 if free == "slots" else 1])
        with np.errstate(invalid="ignore"):
            after = served.step(pools, [Segment((6,), 3, (1,), 2, {0: 3})], tokens_each=1)
        assert np.isnan(after["last_logits"]).any()


def test_one_token_of_large_slots_works_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels copy small states into a batch; here even those are taken for large."""
    monkeypatch.setattr("deltaloom.backends.numpy.serving.IN_PLACE", 0)
    for seed in range(6):
        assert world("next_dense_mix", "main", seed).steps(12) < CLOSE["float64"]


ITEMS: list[dict[str, Any]] = json.loads((GOLDEN / "tiny_next" / "reference_generations.json").read_text())["items"]


def test_the_tiny_model_reproduces_reference_generations_in_company() -> None:
    """Eight prompts, prefilled in chunks of different lengths while others decode already; then all decode together."""
    served = ServedModel(model_folder("tiny-next"), dtype="float32", block_size=16)
    items = ITEMS[::5]
    pools = served.pools(slots=len(items) + 1, blocks=256)
    free, tokens, done = iter(range(1, 256)), [list(item["prompt_ids"]) for item in items], [0] * len(items)
    blocks: list[list[int]] = [[] for _ in items]
    for _ in range(200):
        left = [i for i, item in enumerate(items) if len(tokens[i]) - len(item["prompt_ids"]) < len(item["output_ids"])]
        if not left:
            break
        segments = []
        for i in left:
            new = tokens[i][done[i] : done[i] + 7 + i]
            blocks[i] += [next(free) for _ in range(-(-(done[i] + len(new)) // 16) - len(blocks[i]))]
            segments.append(Segment(new, done[i], blocks[i], i + 1 if done[i] else -1, {len(new) - 1: i + 1}))
        each = 1 if all(len(segment.token_ids) == 1 for segment in segments) else None
        logits = served.step(pools, segments, tokens_each=each)["last_logits"][0]
        for row, (i, segment) in enumerate(zip(left, segments)):
            done[i] = segment.end
            if done[i] == len(tokens[i]):
                tokens[i].append(int(logits[row].argmax()))
    assert [t[len(item["prompt_ids"]) :] for t, item in zip(tokens, items)] == [item["output_ids"] for item in items]
