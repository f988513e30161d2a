"""The onnx backend: what becomes a model, what is refused and why, which settings reach ONNX Runtime, what an absent one says."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

import deltaloom  # noqa: E402
from deltaloom import backends  # noqa: E402
from deltaloom.backends.onnx.session import SegmentSession  # noqa: E402
from deltaloom.graph.builder import GraphBuilder  # noqa: E402
from deltaloom.graph.errors import CompileError, ConfigError  # noqa: E402
from deltaloom.graph.types import bf16, f32  # noqa: E402
from deltaloom.passes.config import CompileConfig  # noqa: E402
from deltaloom.passes.kernel import find_kernel  # noqa: E402


def compiled(*names: str, **options: object) -> deltaloom.CompiledModel:
    config = CompileConfig(names, dtype="float32", threads=1, **options)
    return deltaloom.compile(deltaloom.build_graph("tiny-next").main, config)


def toy(op: str, **attributes: object):
    g = GraphBuilder("toy")
    g.output("y", getattr(g, op)(g.input("x", f32[2, 6, 8]), **attributes))
    return g.build()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Title and threads of each session that is made."""
    seen: list[tuple[str, int]] = []
    module = __import__("deltaloom.backends.onnx.session", fromlist=["session"])
    made = module.session

    def counted(proto, title, threads):
        seen.append((title, threads))
        return made(proto, title, threads)

    monkeypatch.setattr(module, "session", counted)
    return seen


def test_a_region_is_one_session_for_all_its_layers_and_all_lengths(opened: list[tuple[str, int]]) -> None:
    model = deltaloom.load("tiny-next", config=CompileConfig(("onnx",), dtype="float32", threads=1))
    state = model.new_state(2)
    for count in (5, 3, 17):
        model.forward(np.ones((2, count), np.int64), state=state)
    titles = [title for title, _ in opened]
    assert len(titles) == len(set(titles)) and "linear_layer_0" in titles and "attention_layer_0" in titles
    prefill = len(titles)
    assert prefill <= 5  # two layer bodies; what comes before them, and behind, at the top
    for _ in range(3):
        model.forward(np.ones((2, 1), np.int64), state=state)
    model.forward(np.ones((1, 9), np.int64))
    assert len(opened) <= 2 * prefill


def test_nothing_is_made_before_the_first_call(opened: list[tuple[str, int]]) -> None:
    assert "linear_layer_0(" in compiled("onnx").source("decode")
    assert opened == []


def test_the_number_of_threads_reaches_the_sessions(opened: list[tuple[str, int]]) -> None:
    for threads in (1, 2):
        model = deltaloom.load("tiny-next", config=CompileConfig(("onnx",), dtype="float32", threads=threads))
        model.forward(np.ones((1, 2), np.int64))
        assert {found for _, found in opened} == {threads}
        opened.clear()
    with pytest.raises(ConfigError, match="threads is 0; it must be 1 or more"):
        backends.backend("onnx", threads=0)


def test_another_device_or_dtype_is_refused() -> None:
    with pytest.raises(CompileError, match="the onnx backend runs on the device 'cpu', not on 'cuda'"):
        backends.backend("onnx", device="cuda")
    with pytest.raises(CompileError, match="computes in float32, not in 'bfloat16'.*use --dtype float32"):
        deltaloom.load("tiny-next", backend="onnx", dtype="bfloat16")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_an_absent_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    there = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == package else there(name))
    with pytest.raises(CompileError, match=rf"'onnx' needs the package {package}, .*pip install 'deltaloom\[onnx\]'"):
        backends.backend("onnx")


def test_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions get the same memory in every call, and no copy of it."""
    given: list[np.ndarray] = []
    run = SegmentSession._run
    monkeypatch.setattr(SegmentSession, "_run", lambda self, feed: given.extend(feed.values()) or run(self, feed))
    model = deltaloom.load("tiny-next", config=CompileConfig(("onnx",), dtype="float32", threads=1))
    model.forward(np.ones((1, 2), np.int64))
    first = {array.ctypes.data for array in given if array.nbytes > 100_000}
    given.clear()
    model.forward(np.ones((1, 3), np.int64))
    assert first and first <= {array.ctypes.data for array in given}


def test_serving_programs_are_refused_with_the_reason() -> None:
    with pytest.raises(
        CompileError, match="nobody can run .*packed_causal_conv1d.*\n  onnx: has no kernel for packed_causal_conv1d"
    ):
        compiled("onnx").named("mixed")


def test_in_a_mixed_program_refusals_are_recorded_and_numpy_takes_the_rest() -> None:
    rows = compiled("onnx", "numpy").explain("mixed")
    refused = {row.op: [(r.kernel, r.reason) for r in row.refusals] for row in rows if row.kernel.startswith("numpy")}
    assert ("onnx", "has no kernel for packed_gated_delta_rule") in refused["packed_gated_delta_rule"]
    assert {row.op for row in rows if row.kernel.startswith("onnx")} >= {"linear", "embedding"}


def test_other_dtypes_inside_a_program_are_refused_by_the_guard() -> None:
    kernel = next(k for k in backends.backend("onnx", threads=1).kernels() if k.op == "silu")
    g = GraphBuilder("toy")
    g.output("y", g.silu(g.input("x", bf16[2, 3])))
    assert kernel.refusal(g.build().nodes[0]) == "%x is bf16, and programs for ONNX Runtime are float32"


def test_the_emitted_program_runs_as_it_stands() -> None:
    space: dict[str, object] = {}
    exec(compiled("onnx").source("decode"), space)
    assert callable(space["linear_layer_0"]) and callable(space["qwen3_next"])


def test_a_node_alone_is_what_the_segment_is() -> None:
    from deltaloom.runtime.observe import observe

    executor = deltaloom.load("tiny-next", config=CompileConfig(("onnx",), dtype="float32", threads=1)).main
    ids = {"token_ids": np.arange(2, 8).reshape(2, 3)}
    whole = executor.run(ids, executor.new_state(2), None, ("logits",))["logits"]
    names: list[str] = []
    alone = observe(executor, ids, executor.new_state(2), None, ("logits",), lambda name, *_: names.append(name))["logits"]
    assert len(names) > 20
    np.testing.assert_allclose(alone, whole, atol=1e-5 * np.abs(whole).max())


def test_what_onnx_runtime_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("[ONNXRuntimeError] : no such kernel\nmore")

    monkeypatch.setattr(ort, "InferenceSession", broken)
    model = deltaloom.compile(toy("silu"), CompileConfig(("onnx",), dtype="float32"))
    with pytest.raises(CompileError, match=r"refuses the model of 'toy_0': \[ONNXRuntimeError\] : no such kernel$"):
        model.program("prefill").run(np.zeros((2, 6, 8), np.float32), {"": ()}, {"": ()}, {"": ()})


def test_an_unknown_kernel_is_a_sentence() -> None:
    with pytest.raises(CompileError, match="backend onnx has no kernel 'onnx.portable' for op sample_token"):
        find_kernel(backends.backend("onnx"), "sample_token", "onnx.portable")


def test_an_input_that_is_an_output_is_copied() -> None:
    g = GraphBuilder("toy")
    x = g.input("x", f32[2, 3])
    y = g.silu(x)
    g.output("a", y)
    g.output("b", y)
    program = deltaloom.compile(g.build(), CompileConfig(("onnx",), dtype="float32")).program("prefill")
    given = np.ones((2, 3), np.float32)
    first, second = program.run(given, {"": ()}, {"": ()}, {"": ()})
    np.testing.assert_allclose(first, given / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("op", ["silu", "sigmoid"])
def test_small_results_are_exact_too(op: str) -> None:
    """A norm may follow; ONNX Runtime's own Sigmoid is 17 % off at -15 and 0 from -18 on."""
    program = deltaloom.compile(toy(op), CompileConfig(("onnx",), dtype="float32")).program("prefill")
    x = np.linspace(-80, 80, 96, dtype=np.float32).reshape(2, 6, 8)
    wide = x.astype(np.float64)
    want = 1 / (1 + np.exp(-wide)) * (wide if op == "silu" else 1)
    (found,) = program.run(x, {"": ()}, {"": ()}, {"": ()})
    np.testing.assert_allclose(found, want, rtol=1e-5)
