"""Laws of a loaded model that goldens cannot see: whole = any split, batch = single, cached = cold, snapshots, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deltaloom
from deltaloom.graph.errors import RequestError
from deltaloom.passes.config import CompileConfig
from deltaloom.runtime.model import Model

BACKENDS = ["numpy", "torch"]
CLOSE = {"rtol": 2e-3, "atol": 2e-3}
"""float32 sums in another order move this model's logits (standard deviation 3) by some 1e-4."""


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Model:
    return deltaloom.load("tiny-next", backend=request.param, dtype="float32")


def tokens(count: int, batch: int = 1, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(5, 4000, (batch, count))


@given(data=st.data())
def test_a_whole_prompt_equals_any_split_of_it(model: Model, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([2, 5, 63, 64, 65, 90]), label="tokens")
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=4), label="cuts"))
    ids = tokens(count, data.draw(st.integers(1, 2), label="batch"), seed=count)
    whole = model.forward(ids, logits="all").logits
    state = model.new_state(len(ids))
    pieces = [model.forward(part, state=state).logits for part in np.split(ids, cuts, axis=1)]
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, **CLOSE)


def test_a_padded_batch_equals_its_rows_alone(model: Model) -> None:
    rows = [tokens(n, seed=n)[0] for n in (1, 7, 40)]
    width = max(map(len, rows))
    ids = np.array([np.pad(row, (width - len(row), 0)) for row in rows])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    state = model.new_state(len(rows))
    together = model.forward(ids, state=state, attention_mask=mask, logits="last").logits
    following = tokens(1, 3, seed=9)
    step = model.forward(following, state=state).logits
    for index, row in enumerate(rows):
        alone = model.new_state(1)
        np.testing.assert_allclose(together[index], model.forward([row], state=alone, logits="last").logits[0], **CLOSE)
        np.testing.assert_allclose(step[index], model.forward(following[index : index + 1], state=alone).logits[0], **CLOSE)


def test_chunked_prefill_equals_one_step(model: Model) -> None:
    chunked = deltaloom.load("tiny-next", config=CompileConfig(backends=model.ctx.config.backends, prefill_chunk=16))
    ids = tokens(45)
    a, b = (m.forward(ids, logits="all", output_hidden_states=True) for m in (model, chunked))
    np.testing.assert_allclose(a.logits, b.logits, **CLOSE)
    np.testing.assert_allclose(a.hidden_states, b.hidden_states, **CLOSE)


def test_outputs_have_the_documented_shapes_and_agree(model: Model) -> None:
    out = model.forward(tokens(5, 2), output_hidden_states=True)
    assert out.logits.shape == (2, 5, 4096) and out.logits.dtype == np.float32
    assert out.hidden_states.shape == (9, 2, 5, 192) and out.final_norm.shape == (2, 5, 192)
    last = model.forward(tokens(5, 2), logits="last")
    np.testing.assert_allclose(last.logits, out.logits[:, -1:], **CLOSE)
    none = model.forward(tokens(5, 2), logits=None)
    assert none.logits is None and none.hidden_states is None and none.state.length == 5


def test_a_copy_is_independent_and_select_picks_rows(model: Model) -> None:
    ids, more = tokens(70, 3), tokens(3, 3, seed=1)
    state = model.new_state(3)
    model.forward(ids, state=state, logits=None)
    saved = state.copy()
    first = model.forward(more, state=state).logits
    again = model.forward(more, state=saved.copy()).logits
    np.testing.assert_array_equal(first, again)
    picked = saved.select([2, 0, 0])
    chosen = model.forward(more[[2, 0, 0]], state=picked).logits
    np.testing.assert_allclose(chosen, first[[2, 0, 0]], **CLOSE)


def test_interleaved_states_do_not_touch_each_other(model: Model) -> None:
    one, two = model.new_state(1), model.new_state(1)
    a, b = tokens(30, seed=1), tokens(30, seed=2)
    mixed = []
    for start in range(0, 30, 10):
        mixed.append(model.forward(a[:, start : start + 10], state=one).logits)
        model.forward(b[:, start : start + 10], state=two)
    np.testing.assert_allclose(np.concatenate(mixed, axis=1), model.forward(a).logits, **CLOSE)


def test_the_mtp_head_can_be_rolled_back(model: Model) -> None:
    assert model.mtp is not None
    ids = tokens(9)
    out = model.forward(ids, output_final_norm=True)
    state = model.mtp.new_state(1)
    where = np.arange(8)[None]
    model.mtp.forward(ids[:, 1:], out.final_norm[:, :8], where, state)
    draft = np.array([[7]]), out.final_norm[:, 8:], np.array([[8]])
    first = model.mtp.forward(*draft, state)
    state.truncate(8)
    second = model.mtp.forward(*draft, state)
    np.testing.assert_array_equal(first["logits"], second["logits"])
    assert first["logits"].shape == (1, 1, 4096) and first["hidden"].shape == (1, 1, 192)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([[4096]], {}, "token id 4096 is outside the vocabulary 0..4095"),
        ([[-1]], {}, "token id -1 is outside"),
        ([[]], {}, "expected whole numbers"),
        ([[1.5]], {}, "expected whole numbers"),
        ([[1], [2, 3]], {}, "rows of different lengths"),
        ([[1, 2]], {"attention_mask": [[1, 1, 1]]}, "attention_mask has shape"),
        ([[1, 2]], {"logits": "first"}, "expected 'all', 'last' or None"),
        ([[1] * 2049], {}, "maximum context length of 2048"),
    ],
)
def test_bad_calls_are_refused_with_a_sentence(model: Model, ids: Any, options: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.forward(ids, **options)


def test_a_recurrent_state_cannot_be_cut(model: Model) -> None:
    state = model.forward(tokens(4)).state
    with pytest.raises(RequestError, match="recurrent and cannot be cut"):
        state.truncate(2)
    with pytest.raises(RequestError, match="2 rows, the state 1"):
        model.forward(tokens(1, 2), state=state)


def test_a_failed_call_makes_the_state_unusable_and_says_so(model: Model) -> None:
    state = model.forward(tokens(4)).state
    state.fixed["model.layers.4."] = ()
    with pytest.raises(ValueError, match="unpack"):
        model.forward(tokens(1), state=state)
    with pytest.raises(RequestError, match="this state is unusable: a call on it failed"):
        model.forward(tokens(1), state=state)


def test_max_model_len_raises_the_limit() -> None:
    small = deltaloom.load("tiny-next", max_model_len=8)
    with pytest.raises(RequestError, match="maximum context length of 8"):
        small.forward(tokens(9))
    assert deltaloom.load("tiny-next", max_model_len=4096).forward(tokens(2100), logits="last").logits.shape == (1, 1, 4096)


@pytest.mark.parametrize("mask", [[[1, 1, 0]], [[1, 0, 1]]])
def test_padding_after_a_token_is_refused_and_leaves_the_state_alone(model: Model, mask: list[list[int]]) -> None:
    state = model.new_state()
    with pytest.raises(RequestError, match="padding after the first token of row 0; pad on the left"):
        model.forward([[5, 6, 7]], state=state, attention_mask=np.array(mask))
    model.forward([[5, 6]], state=state)
    with pytest.raises(RequestError, match="padding after the first token"):
        model.forward([[7, 8]], state=state, attention_mask=np.array([[0, 1]]))
    assert state.length == 2


def test_a_row_that_is_padding_so_far_begins_later(model: Model) -> None:
    state = model.new_state(2)
    model.forward([[5, 6, 7], [5, 6, 7]], state=state, attention_mask=np.array([[0, 0, 0], [1, 1, 1]]))
    late = model.forward([[1, 2], [8, 9]], state=state).logits
    np.testing.assert_allclose(late[:1], model.forward([[1, 2]]).logits, **CLOSE)
    np.testing.assert_allclose(late[1:], model.forward([[5, 6, 7, 8, 9]]).logits[:, 3:], **CLOSE)


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[0, 2, 1]], "something else than 0"),
        ([[-np.inf, 0, 0]], "something else than 0"),
        ([[np.nan, 1, 1]], "something else than 0"),
        ([["0", "1", "1"]], "something else than 0"),
        ([[0], [1, 1]], "cannot be read as an array"),
        (object(), "has shape"),
    ],
)
def test_what_is_no_mask_is_refused(model: Model, mask: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        model.forward([[5, 6, 7]], attention_mask=mask)


def test_a_state_of_something_else_is_refused(model: Model) -> None:
    assert model.mtp is not None
    other = "torch" if model.ctx.backends[0].name == "numpy" else "numpy"
    strange = [
        model.mtp.new_state(),
        deltaloom.load("tiny-next", backend=other, dtype="float32").new_state(),
        deltaloom.load("tiny-next", backend="torch", dtype="bfloat16").new_state(),
    ]
    for state in strange:
        with pytest.raises(RequestError, match="belongs to another model, head, backend or dtype"):
            model.forward([[5]], state=state)
    with pytest.raises(RequestError, match="state is of type dict"):
        model.forward([[5]], state={})  # type: ignore[arg-type]
    for batch in (0, 1.5, "a", True):
        with pytest.raises(RequestError, match="a whole number of sequences"):
            model.new_state(batch)  # type: ignore[arg-type]
    assert model.new_state(2).select(np.array([1, 0])).batch == 2
    with pytest.raises(RequestError, match="do not fit"):
        model.new_state(2).select([0.5])  # type: ignore[list-item]


def test_the_mtp_head_refuses_what_does_not_fit(model: Model) -> None:
    assert model.mtp is not None
    ids, places = np.array([[5, 6]]), np.array([[0, 1]])
    hidden = np.zeros((1, 2, model.config.hidden_size), np.float32)
    good: dict[str, Any] = {"next_ids": ids, "hidden": hidden, "positions": places}
    for change, message in (
        ({"next_ids": ids + 5000}, "outside the vocabulary"),
        ({"next_ids": ids - 9}, "outside the vocabulary"),
        ({"next_ids": ids + 0.5}, "expected whole numbers"),
        ({"next_ids": None}, "expected whole numbers"),
        ({"positions": places - 1}, "they count from 0"),
        ({"hidden": hidden[..., :9]}, "expected"),
        ({"hidden": hidden[..., None]}, "expected"),
        ({"hidden": hidden.astype(np.int64)}, "hidden holds int64"),
    ):
        with pytest.raises(RequestError, match=message):
            model.mtp.forward(**{**good, **change}, state=model.mtp.new_state())
    with pytest.raises(RequestError, match="belongs to another"):
        model.mtp.forward(**good, state=model.new_state())
