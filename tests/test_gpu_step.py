"""The accuracy check of benchmarks/gpu_step.py, on a small config under Triton's interpreter."""

import os
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]


def test_forced_routing_takes_the_error_of_other_experts_away(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = __import__("gpu_step")
    noted, forced = [], []
    note, force = program.Routing.note, program.Routing.force
    monkeypatch.setattr(program.Routing, "note", lambda *given: noted.append(given[1].op.name) or note(*given))
    monkeypatch.setattr(program.Routing, "force", lambda *given: forced.append(force(*given)) or forced[-1])
    config = str(ROOT / "tests" / "golden" / "next_base" / "config.json")
    flags = ["--layers", "4", "--batch", "2", "--context", "3", "--device", "cpu", "--dtype", "float32", "--check", "--seed", "5"]
    monkeypatch.setattr("sys.argv", ["gpu_step.py", config, *flags])
    program.main()
    errors = re.findall(r"(torch|cuda) in float32, (own|float32's) routing: relative error (\S+),", capsys.readouterr().out)
    assert [error[:2] for error in errors] == [("torch", "own"), ("cuda", "own"), ("torch", "float32's"), ("cuda", "float32's")]
    assert all(float(error[2]) < 1e-5 for error in errors)
    assert sum(name in program.ROUTERS for name in noted) == 4


@pytest.mark.parametrize("normalize", [True, False])
def test_a_router_that_is_forced_to_its_own_choice_gives_what_its_op_gives(monkeypatch, normalize):
    import numpy as np
    import torch

    from deltaloom.ops.fused_moe import GatedRouter
    from deltaloom.ops.moe import RouterTopK

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    program = __import__("gpu_step")
    logits = np.random.default_rng(0).standard_normal((1, 5, 9)).astype(np.float32)
    for kind in (RouterTopK, GatedRouter):
        op = kind(k=3, normalize=normalize)
        assert op.name in program.ROUTERS
        found = tuple(torch.from_numpy(np.asarray(one)) for one in op.reference(logits))
        node, routing = type("Node", (), {"op": op}), program.Routing()
        routing.note(node, [torch.from_numpy(logits)], found)
        weights, ids, *rest = routing.force(
            node, [torch.from_numpy(logits)], (torch.zeros_like(found[0]), found[1] * 0, *found[2:])
        )
        assert torch.equal(ids, found[1]) and torch.allclose(weights, found[0], atol=1e-6) and len(rest) == len(found) - 2
