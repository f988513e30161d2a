"""Planned memory is what is really allocated: weights, states and arenas of the tiny model, byte for byte."""

import json
import mmap
import shutil
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import deltaloom
from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.dims import symbol
from deltaloom.graph.errors import RequestError
from deltaloom.graph.types import f32
from deltaloom.models.bundled import model_folder
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import plain_variants
from deltaloom.runtime import resident
from deltaloom.runtime.footprint import Footprint, footprint, grown_room, live_bytes
from deltaloom.runtime.model import Model
from deltaloom.runtime.resident import Peak, anonymous, measured

B, S = symbol("batch"), symbol("seq")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights stored in float32, so that some can stay in the file."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(model_folder("tiny-next"), folder, dirs_exist_ok=True)
    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for name in files:
        tensors = load_file(folder / name)
        save_file({key: value.astype(np.float32) for key, value in tensors.items()}, folder / name)
    return folder


def planned(folder: str | Path, model: Model, batch: int, context: int) -> Footprint:
    with Checkpoint.open(model_folder(folder)) as checkpoint:
        known = {name: checkpoint.info(name).dtype for name in checkpoint.names()}
    prefill, decode = (model.main.program(variant) for variant in plain_variants(("last_logits",)))
    tokens = model.ctx.config.prefill_chunk
    programs, home = {"prefill": prefill, "decode": decode}, model.ctx.backends[0]
    return footprint(programs, home, batch=batch, context=context, tokens=tokens, stored=known.__getitem__)


@pytest.mark.parametrize("batch, context, chunk", [(1, 100, 512), (2, 64, 64), (3, 129, 50), (1, 0, 512)])
def test_what_is_planned_is_allocated(wide: Path, batch: int, context: int, chunk: int) -> None:
    made: list[Model] = []

    def make() -> Model:
        made.append(deltaloom.load(wide, config=CompileConfig(threads=1, prefill_chunk=chunk)))
        return made[0]

    found = measured(make, batch=batch, context=context)
    expected = planned(wide, made[0], batch, context)
    assert (found.held, found.mapped) == (expected.held, expected.mapped)
    assert 0 < found.mapped < found.held
    assert found.states == expected.states
    assert found.arenas == sum(one.nbytes for one in expected.working if one.planned) > 0
    assert expected.total == expected.held + expected.states + sum(one.nbytes for one in expected.working)


@pytest.mark.parametrize("quantise", [{}, {"*": "int8"}])
def test_weights_in_another_dtype_are_made(quantise: dict[str, str]) -> None:
    """The bundled model is stored in bfloat16 and computed in float32: nothing can stay in the file."""
    model = deltaloom.load("tiny-next", config=CompileConfig(threads=1, quantise=quantise))
    expected = planned("tiny-next", model, 1, 10)
    assert (model.main.store.held, model.main.store.mapped) == (expected.held, expected.mapped)
    assert expected.mapped == 0


def test_states_follow_from_the_shape() -> None:
    model = deltaloom.load("tiny-next")
    found = planned("tiny-next", model, batch=2, context=200)
    cfg = model.config
    linear = cfg.layer_types.count("linear_attention")
    delta = cfg.linear_num_value_heads * cfg.linear_key_head_dim * cfg.linear_value_head_dim
    channels = 2 * cfg.linear_num_key_heads * cfg.linear_key_head_dim + cfg.linear_num_value_heads * cfg.linear_value_head_dim
    assert found.fixed == 2 * linear * 4 * (delta + channels * (cfg.linear_conv_kernel_dim - 1))
    assert found.token == 2 * (cfg.num_hidden_layers - linear) * 2 * cfg.num_key_value_heads * cfg.head_dim * 4
    assert found.filled == 200 * found.token and found.room == 400


@given(context=st.integers(1, 130), chunk=st.integers(1, 80))
def test_room_is_what_buffers_grow_to(context: int, chunk: int) -> None:
    model = deltaloom.load("tiny-next", config=CompileConfig(threads=1, prefill_chunk=chunk))
    state = model.new_state()
    for count in (context, 1):
        model.forward(np.ones((1, count), np.int64), state=state, logits=None)
    assert grown_room(context, chunk) == state.capacity > context
    assert state.arrays()["model.layers.3.self_attn.key"].shape[2] == context + 1


def test_values_live_from_their_node_to_their_last_use() -> None:
    g = GraphBuilder("chain")
    x = g.input("x", f32[B, S, 16])
    a = g.silu(x)
    b = g.silu(a)
    c = g.add(b, a)
    g.output("out", g.silu(c))
    one = 2 * 3 * 16 * 4
    assert live_bytes(g.build(), {"batch": 2, "seq": 3}) == 3 * one


def test_a_prefill_keeps_no_value_longer_than_needed() -> None:
    """The emitted code deletes what it no longer needs: at most what ``live_bytes`` says is alive when a kernel is called."""
    model = deltaloom.load("tiny-next", config=CompileConfig(threads=1))
    program = model.main.program(plain_variants(("last_logits",))[0])
    deleted = [line.split(None, 1)[1].split(", ") for line in program.source.splitlines() if line.strip().startswith("del ")]
    assert {"embed", "layers_0_x", "x_sum", "mlp_gate_shared_expert_gate"} <= {name for names in deleted for name in names}
    decode = model.main.program(plain_variants(("last_logits",))[1])
    assert "del " not in decode.source


def test_weights_stored_in_the_form_that_is_asked_for_stay_in_the_file() -> None:
    model = deltaloom.load("tiny-next", config=CompileConfig(threads=1, quantise="bf16"))
    expected = planned("tiny-next", model, 1, 4)
    assert (model.main.store.held, model.main.store.mapped) == (expected.held, expected.mapped)
    assert expected.mapped > 0


def test_impossible_sizes_are_refused() -> None:
    model = deltaloom.load("tiny-next")
    with pytest.raises(RequestError, match="batch is 0, expected at least 1"):
        planned("tiny-next", model, 0, 10)
    with pytest.raises(RequestError, match="context is -1, expected at least 0"):
        planned("tiny-next", model, 1, -1)


@pytest.mark.skipif(not anonymous(), reason="this system does not tell the anonymous memory of a process")
def test_the_peak_sees_what_is_gone_at_the_end() -> None:
    with Peak() as peak:
        # Memory of the system's own: the allocator might give what it kept of earlier tests.
        block = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.write(bytes([1]) * len(block))
        inside = anonymous()
        sleep(10 * resident.INTERVAL)
        block.close()
    assert inside - peak.start > 60 << 20
    assert peak.most >= inside


def test_a_system_that_does_not_tell_gives_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "STATUS", tmp_path / "absent")
    found = measured(lambda: deltaloom.load("tiny-next"), batch=1, context=5)
    assert (found.start, found.most, found.over) == (0, 0, None) and found.held > 0
