"""What plugins offer takes part: ops in graphs and their texts, kernels, rules and passes in a compile, backends, the cache."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from plugins.distributions import Site

import deltaloom.ops  # noqa: F401 - puts the built-in ops into the registry
from deltaloom import CompileConfig, Plugin, compile
from deltaloom.backends import backend
from deltaloom.backends.numpy.backend import NumpyBackend
from deltaloom.graph import plugins
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import CompileError, ConfigError, GraphError, PluginError
from deltaloom.graph.ir import Graph
from deltaloom.graph.op import Array, Op
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.plugins import registered
from deltaloom.graph.registry import ops
from deltaloom.graph.serialize import from_json, to_json
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import TensorType, f32
from deltaloom.passes.cache_key import cache_key
from deltaloom.passes.config import compile_config
from deltaloom.passes.fuse.passes import Fuse
from deltaloom.passes.kernel import Kernel, KernelTable, find_kernel, kernels_for, size
from deltaloom.passes.pipeline import Context, Pass
from deltaloom.passes.rewrite.rule import Rule, rules
from deltaloom.passes.table import SHARED
from deltaloom.runtime.compile import CompiledModel


class Relu2(Op):
    """max(x, 0) squared."""

    name: ClassVar[str] = "lab.relu2"

    def infer(self, x: TensorType) -> TensorType:
        return x

    def reference(self, x: Array) -> Array:
        result: Array = np.square(np.maximum(x, 0))
        return result


class Relu2Twice(Relu2):
    """max(x, 0) squared, squared again."""

    name: ClassVar[str] = "lab.relu2_twice"

    def reference(self, x: Array) -> Array:
        result: Array = np.maximum(x, 0) ** 4
        return result


class FuseTwice(Rule):
    """One after another become one."""

    name: ClassVar[str] = "lab.fuse_twice"

    def pattern(self, g: Any, x: Any) -> Any:
        return g.lab.relu2(g.lab.relu2(x))

    def rewrite(self, g: Any, m: Any) -> Any:
        return g.lab.relu2_twice(m.x)


@dataclass(frozen=True)
class Halve(Pass):
    """Note how often it should be done."""

    name: ClassVar[str] = "lab.halve"
    establishes: ClassVar[tuple[str, ...]] = ("halved",)
    times: int = 1

    def run(self, graph: Graph, ctx: Context) -> Graph:
        return replace(graph, name=f"{graph.name}_{self.times}")


class IdleHalve(Halve):
    """The same, of a plugin called idle."""

    name: ClassVar[str] = "idle.halve"


class LabBackend(NumpyBackend):
    """NumPy by another name."""

    name = "labnum"

    def kernels(self) -> list[Kernel]:
        return [replace(kernel, backend=self.name) for kernel in super().kernels()]


class Mislabelled(NumpyBackend):
    """Kernels of another backend."""

    name = "labnum"


class OtherNumpy(NumpyBackend):
    """NumPy, replaced."""


LAB = Plugin(
    "lab",
    ops={"lab.relu2": Relu2, "lab.relu2_twice": Relu2Twice},
    rules={"lab.fuse_twice": FuseTwice},
    passes={"lab.halve": Halve},
    backends={"labnum": LabBackend},
)
BARE = dataclasses.replace(LAB, rules={})
BATCH, SEQ = symbol("batch"), symbol("seq")
X = np.array([[[-2.0, 0.5, 3.0], [1.0, -0.25, 0.0]]], np.float32)


def table_of(*functions: tuple[str, Callable[..., Any]], backend: str = "numpy", **options: Any) -> KernelTable:
    """Kernels for ops by name."""
    table = KernelTable(backend)
    for op, function in functions:
        table.kernel(op, **options)(function)
    return table


def doubled() -> Graph:
    """relu2 of relu2 of silu."""
    g = GraphBuilder("two")
    x = g.input("x", f32[BATCH, SEQ, 3])
    g.output("y", g.lab.relu2(g.lab.relu2(g.silu(x))))
    return g.build()


def run(model: CompiledModel) -> Array:
    """The output ``y`` of the prefill program for ``X``."""
    executor = model.bind({})
    return executor.run({"x": X}, executor.new_state(1), None, ("y",))["y"]


def kernels(model: CompiledModel) -> list[str]:
    return [row.kernel for row in model.explain("prefill")]


SILU = X / (1 + np.exp(-X))
TRUTH = np.maximum(SILU, 0) ** 4


def test_a_dotted_op_in_a_graph_its_text_and_its_json() -> None:
    with registered(BARE):
        graph = doubled()
        text = print_graph(graph)
        assert "%relu2: f32[batch, seq, 3] = lab.relu2(%silu)" in text and "%relu2_2" in text
        assert parse_graph(text) == graph and from_json(to_json(graph)) == graph
        assert "lab.relu2" in ops and "lab.relu3" not in ops and "nolab.relu2" not in ops
        assert Relu2 in list(ops) and Relu2 not in list(ops.built_in())
        with pytest.raises(
            PluginError, match=r"'lab' \(registered in this process\) offers no op 'lab.relu3'; .* lab.relu2, lab.relu2_tw"
        ):
            GraphBuilder("g").lab.relu3  # noqa: B018
    with pytest.raises(GraphError, match="(?s)line .: there is no plugin 'lab'.*lab.relu2"):
        parse_graph(text)
    with pytest.raises(PluginError, match="there is no plugin 'lab'"):
        from_json(to_json(graph))
    with pytest.raises(GraphError, match="there is no op 'lab'"):
        GraphBuilder("g").lab  # noqa: B018


def test_an_op_of_a_plugin_runs_by_its_reference_and_the_source_stands_alone() -> None:
    with registered(BARE):
        model = compile(doubled())
        np.testing.assert_allclose(run(model), TRUTH, rtol=1e-5)
        assert kernels(model) == ["numpy.reference", "numpy.silu"]
        source = model.source("prefill")
        assert "lab_relu2_0 = ops.get('lab.relu2')()" in source
        space: dict[str, Any] = {"__name__": "pasted"}
        exec(source, space)
        assert space["lab_relu2_0"] == Relu2()


def test_names_of_two_ops_in_an_emitted_program_never_fall_together() -> None:
    def op(name: str, times: float) -> type[Op]:
        def reference(self: Op, x: Array) -> Array:
            result: Array = x * np.float32(times)
            return result

        body = {"name": name, "infer": lambda self, x: x, "reference": reference, "__doc__": "x."}
        return type("Times", (Op,), body)

    first, second = op("a.b_c", 2), op("a_b.c", 3)
    with registered(Plugin("a", ops={"a.b_c": first}), Plugin("a_b", ops={"a_b.c": second})):
        g = GraphBuilder("six")
        g.output("y", g.a_b.c(g.a.b_c(g.input("x", f32[BATCH, SEQ, 3]))))
        np.testing.assert_allclose(run(compile(g.build())), X * 6)


def test_rules_of_plugins_are_applied_and_stand_in_the_ledger() -> None:
    with registered(LAB):
        model = compile(doubled())
        np.testing.assert_allclose(run(model), TRUTH, rtol=1e-5)
        assert [node.op.name for node in model.graph("prefill").nodes] == ["silu", "lab.relu2_twice"]
        events = [event for row in model.ledger["shared"] for event in row.events if event.kind == "hit"]
        assert [event.rule for event in events] == ["lab.fuse_twice"]
        without = compile(
            doubled(), CompileConfig(pipeline=tuple({"pass": "fuse", "plugins": False} if s == "fuse" else s for s in SHARED))
        )
        assert [node.op.name for node in without.graph("prefill").nodes] == ["silu", "lab.relu2", "lab.relu2"]
        assert FuseTwice in list(rules.offered()) and rules.get("lab.fuse_twice") is FuseTwice
        assert Fuse(rules=("lab.fuse_twice",), plugins=False).run(doubled(), Context()) != doubled()


def test_kernels_of_plugins_come_after_the_backends_and_before_portable_ones() -> None:
    def fast(op: Op, x: Array) -> Array:
        result: Array = np.square(np.maximum(x, 0))
        return result

    def slow_silu(op: Op, x: Array) -> Array:
        result: Array = x / (1 + np.exp(-x))
        return result

    table = table_of(("lab.relu2", fast), ("silu", slow_silu), ("transpose", slow_silu))
    with registered(dataclasses.replace(BARE, kernels={"numpy": table})):
        names = {op: [kernel.name for kernel in kernels_for(backend("numpy"), op)] for op in ("lab.relu2", "silu")}
        assert names["lab.relu2"] == ["numpy.lab.fast", "numpy.reference"]
        assert names["silu"][-2:] == ["numpy.lab.slow_silu", "numpy.reference"] and names["silu"][0] == "numpy.silu"
        model = compile(doubled())
        assert kernels(model) == ["numpy.lab.fast", "numpy.silu"]
        np.testing.assert_allclose(run(model), TRUTH, rtol=1e-5)
        assert find_kernel(backend("numpy"), "lab.relu2", "numpy.lab.fast") is fast
        exec(model.source("prefill"), {"__name__": "pasted"})
        preferred = compile(doubled(), CompileConfig(use={"kernels.numpy": "lab"}))
        assert kernels(preferred) == ["numpy.lab.fast", "numpy.lab.slow_silu"]
        np.testing.assert_allclose(run(preferred), TRUTH, rtol=1e-5)
    assert [kernel.name for kernel in kernels_for(backend("numpy"), "silu")] == ["numpy.silu", "numpy.reference"]


def test_the_refusal_of_a_plugins_kernel_is_told() -> None:
    def fast(op: Op, x: Array) -> Array:
        raise AssertionError("runs although its guard says no")

    table = table_of(("lab.relu2", fast), when=(size("x", 2, equals=4),))
    with registered(dataclasses.replace(BARE, kernels={"numpy": table})):
        (row,) = [row for row in compile(doubled()).explain("prefill") if row.op == "lab.relu2"]
        assert row.kernel == "numpy.reference"
        assert [(refusal.kernel, refusal.reason) for refusal in row.refusals] == [("numpy.lab.fast", "axis 2 of x is 3, not 4")]


def test_a_broken_table_of_kernels_stops_its_own_ops_and_warns_others(site: Site) -> None:
    wrong = {"path": "no_such_module_of_anyone:table", "kind": Relu2, "backend": table_of(backend="torch")}
    says = {"path": "No module named", "kind": "it is type, expected .*KernelTable", "backend": "kernels for the backend 'torch'"}
    g = GraphBuilder("one")
    g.output("y", g.silu(g.input("x", f32[BATCH, SEQ, 3])))
    for key, target in wrong.items():
        with registered(dataclasses.replace(BARE, kernels={"numpy": target})):
            with pytest.warns(plugins.PluginWarning, match=says[key]):
                compile(g.build()).program("prefill")
            with pytest.raises(PluginError, match=says[key]):
                compile(g.build(), CompileConfig(use={"kernels.numpy": "lab"})).program("prefill")
            with pytest.raises(PluginError, match=f"kernels for the backend 'numpy' of plugin 'lab'.*{says[key]}"):
                compile(doubled()).program("prefill")


def test_passes_of_plugins_run_where_a_pipeline_names_them() -> None:
    config = {"pipeline": [*SHARED, {"pass": "lab.halve", "times": 3}]}
    with registered(LAB):
        model = compile(doubled(), compile_config(config))
        assert model.graph("shared").name == "two_3" and model.ledger["shared"][-1].name == "lab.halve"
        with pytest.raises(ConfigError, match="pass 'lab.halve' has no option 'time'; did you mean 'times'"):
            compile_config({"pipeline": [*SHARED, {"pass": "lab.halve", "time": 3}]})
        with pytest.raises(PluginError, match="offers no pass 'lab.double'"):
            compile_config({"pipeline": [*SHARED, "lab.double"]})
    with pytest.raises(PluginError, match="there is no plugin 'lab'"):
        compile_config(config)


def test_backends_of_plugins_by_name() -> None:
    with registered(BARE):
        model = compile(doubled(), CompileConfig(backends=("labnum",)))
        assert kernels(model) == ["labnum.reference", "labnum.silu"]
        np.testing.assert_allclose(run(model), TRUTH, rtol=1e-5)
        known = "numpy, torch, inductor, cuda, onnx, labnum"
        with pytest.raises(CompileError, match=f"there is no backend 'labnun'; known are {known}"):
            backend("labnun")
    with pytest.raises(CompileError, match="there is no backend 'labnum'; known are numpy, torch, inductor, cuda, onnx$"):
        backend("labnum")
    with registered(dataclasses.replace(BARE, backends={"labnum": Mislabelled})):
        with pytest.raises(CompileError, match="kernel numpy.silu for op silu is among those of the backend 'labnum'; register"):
            compile(doubled(), CompileConfig(backends=("labnum",)))


def test_an_unknown_backend_tells_of_plugins_that_might_have_it(site: Site) -> None:
    site.distribution("dist-broken", {"broken": "no_such_module_of_anyone:plugin"})
    with pytest.warns(plugins.PluginWarning), pytest.raises(CompileError, match="(?s)no backend 'fast'.*'broken'.*No module named"):
        backend("fast")


def test_two_plugins_with_one_backend_and_who_is_chosen() -> None:
    rival = Plugin("rival", backends={"labnum": LabBackend})
    with registered(BARE, rival):
        with pytest.raises(
            PluginError, match=r"'labnum' is offered by the plugin 'lab' .* and plugin 'rival' .*\"backends.labnum\" = \"lab\""
        ):
            backend("labnum")
        assert backend("labnum", use={"backends.labnum": "rival"}).name == "labnum"
        with pytest.raises(ConfigError, match="expected the name of a plugin|use is"):
            compile_config({"use": {"backends.labnum": 3}})


def test_a_built_in_is_replaced_only_when_the_configuration_says_so() -> None:
    with registered(Plugin("lab", backends={"numpy": OtherNumpy})):
        assert type(backend("numpy")) is NumpyBackend
        chosen = CompileConfig(use={"backends.numpy": "lab"})
        g = GraphBuilder("one")
        g.output("y", g.silu(g.input("x", f32[BATCH, SEQ, 3])))
        model = compile(g.build(), chosen)
        assert type(model.driver.ctx.backends[0]) is OtherNumpy
        np.testing.assert_allclose(run(model), SILU, rtol=1e-5)
        space: dict[str, Any] = {"__name__": "pasted"}
        exec(model.source("prefill"), space)
        assert type(space["numpy"]) is OtherNumpy
        assert type(backend("numpy", use={"backends.numpy": "deltaloom"})) is NumpyBackend


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"ops.silu": "lab"}, "use has the key 'ops.silu', expected backends.NAME or kernels.NAME or models.NAME"),
        ({"backends": "lab"}, "use has the key 'backends'"),
        ({"backends.numpy": "lab"}, "offers no backend 'numpy'; of that kind it offers labnum"),
        ({"backends.numpy": "lob"}, "there is no plugin 'lob'; did you mean 'lab'"),
        ({"models.qwen3": "lab"}, "offers no model type 'qwen3'; of that kind it offers none"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(use: dict[str, str], message: str) -> None:
    with registered(BARE), pytest.raises((ConfigError, PluginError), match=message):
        CompileConfig(use=use)


def test_a_class_that_is_none_is_refused_with_what_was_expected() -> None:
    wrong: dict[str, Any] = {"lab.relu2": Relu2Twice, "lab.relu2_twice": Halve}
    broken = Plugin(
        "lab", ops=wrong, rules={"lab.r": Relu2}, passes={"lab.p": Rule}, backends={"labnum": "plugins.distributions:Site"}
    )
    with registered(broken):
        g = GraphBuilder("g")
        with pytest.raises(PluginError, match="calls itself 'lab.relu2_twice'; its name has to be 'lab.relu2'"):
            g.lab.relu2  # noqa: B018
        with pytest.raises(PluginError, match="expected a subclass of deltaloom.graph.op.Op"):
            g.lab.relu2_twice  # noqa: B018
        with pytest.raises(PluginError, match="expected a subclass of deltaloom.passes.rewrite.rule.Rule"):
            rules.get("lab.r")
        with pytest.raises(PluginError, match="expected a frozen dataclass that is a subclass of deltaloom.passes.pipeline.Pass"):
            CompileConfig(pipeline=("lab.p",))
        with pytest.warns(plugins.PluginWarning, match="lab.r"):
            assert list(rules.offered()) == []


def test_what_paths_name_is_imported_when_it_is_needed_and_not_before(site: Site) -> None:
    site.module("paths_lab/__init__", "")
    site.module("paths_lab.plugin", """
        from deltaloom import Plugin
        plugin = Plugin("paths", ops={"paths.same": "paths_lab.op:Same"}, kernels={"torch": "paths_lab.torch_kernels:table"},
                        passes={"paths.none": "paths_lab.passes:No"}, backends={"paths": "paths_lab.backend:No"})
        """)  # fmt: skip
    site.module("paths_lab.op", """
        from deltaloom.graph.op import Op
        class Same(Op):
            name = "paths.same"
            def infer(self, x): return x
            def reference(self, x): return x
        """)  # fmt: skip
    site.distribution("dist-paths", {"paths": "paths_lab.plugin:plugin"})
    g = GraphBuilder("one")
    x = g.input("x", f32[BATCH, SEQ, 3])
    g.silu(x)
    assert site.imported() == set()
    g.output("y", g.paths.same(x))
    assert site.imported() == {"paths_lab", "paths_lab.plugin", "paths_lab.op"}
    np.testing.assert_array_equal(run(compile(g.build())), X)
    assert site.imported() == {"paths_lab", "paths_lab.plugin", "paths_lab.op"}


def test_the_cache_knows_the_plugins_that_take_part(site: Site) -> None:
    site.module(
        "keyed_lab/__init__", "from deltaloom import Plugin\nplugin = Plugin('keyed', rules={'keyed.r': 'keyed_lab.r:R'})\n"
    )
    site.module("keyed_lab.r", "# one\n")
    site.distribution("dist-keyed", {"keyed": "keyed_lab:plugin"}, version="1.5")
    context = Context(CompileConfig(), (backend("numpy"),))
    g = GraphBuilder("one")
    g.output("y", g.silu(g.input("x", f32[BATCH, SEQ, 3])))
    graph = g.build()

    def key() -> dict[str, str]:
        return {name: value for name, value in cache_key(graph, context).components.items() if name.startswith("plugin ")}

    with registered(Plugin("idle", backends={"idle": LabBackend}, passes={"idle.halve": IdleHalve})):
        before = key()
        assert list(before) == ["plugin keyed"] and before["plugin keyed"].startswith("dist-keyed 1.5 ")
        site.module("keyed_lab.r", "# two\n")
        assert key()["plugin keyed"] != before["plugin keyed"]
        pipeline = (*SHARED, "idle.halve")
        idle = cache_key(graph, Context(CompileConfig(pipeline=pipeline), context.backends)).components
        assert "plugin idle" in idle
    with registered(BARE):
        assert "plugin lab" in cache_key(doubled(), context).components


def test_a_cached_program_is_used_again_and_not_after_the_plugin_changed(tmp_path: Path) -> None:
    config = CompileConfig(cache=str(tmp_path / "cache"))
    with registered(LAB):
        compile(doubled(), config).program("prefill")
        again = compile(doubled(), config)
        np.testing.assert_allclose(run(again), TRUTH, rtol=1e-5)
        assert "shared" in again.driver.cached
    with registered(BARE):
        fresh = compile(doubled(), config)
        fresh.program("prefill")
        assert "shared" not in fresh.driver.cached
        assert [node.op.name for node in fresh.graph("prefill").nodes] == ["silu", "lab.relu2", "lab.relu2"]
