"""The public names of the kit, and the strategies that it exports."""

import ast
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import deltaloom.testing
from deltaloom.graph.types import DType, bf16, f32
from deltaloom.graph.verify import verify
from deltaloom.testing import FEATURES, FLOOR, CaseDraw, dtypes, graphs, shapes
from deltaloom.testing.samples import filled, random_sample
from deltaloom.testing.toy_models import HYBRID, toy_graph


def test_public_names_come_from_their_modules() -> None:
    tree = ast.parse(Path(deltaloom.testing.__file__).read_text())
    blocks = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]
    declared = {alias.name: node.module for node in blocks if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == {name: f"deltaloom.testing.{module}" for name, module in deltaloom.testing._MODULES.items()}
    assert sorted(declared) == sorted(deltaloom.testing.__all__)
    for name in declared:
        assert getattr(deltaloom.testing, name) is not None


def test_the_package_itself_imports_nothing() -> None:
    code = "import sys, deltaloom.testing; print([n for n in ('numpy', 'hypothesis', 'pytest', 'torch') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_dtype_that_a_backend_may_claim_has_a_tolerance() -> None:
    assert {dtype.long_name for dtype in FLOOR} <= set(FEATURES)


@given(shapes(rank=(2, 3), largest=9), dtypes(), dtypes(bf16))
def test_shapes_and_dtypes_are_what_was_asked_for(shape: tuple[int, ...], dtype: DType, narrow: DType) -> None:
    assert 2 <= len(shape) <= 3 and all(1 <= size <= 9 for size in shape)
    assert dtype in FLOOR and narrow == bf16


@given(graphs(f32))
def test_graphs_are_legal_and_can_be_evaluated(graph: object) -> None:
    from deltaloom.graph.ir import Graph

    assert isinstance(graph, Graph)
    verify(graph)


@given(st.data())
def test_samples_are_complete(data: st.DataObject) -> None:
    sample = random_sample(CaseDraw(data))
    results = sample.evaluate()
    assert set(results.outputs) == {name for name, _ in sample.graph.outputs}
    assert set(results.states) == set(sample.graph.all_states())


@given(st.data())
def test_a_sample_of_a_model_has_its_sizes(data: st.DataObject) -> None:
    sample = filled(toy_graph(HYBRID, f32), CaseDraw(data), {"batch": 2, "seq": 3, "past": 1})
    assert sample.evaluate().outputs["logits"].shape == (2, 3, HYBRID["vocab_size"])
