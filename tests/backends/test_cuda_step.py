"""The recorded decode step: the choice of tokens, rows that end, whole generations; under Triton's interpreter where no GPU is."""

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

import deltaloom  # noqa: E402
from deltaloom.backends.cuda import choice, step  # noqa: E402
from deltaloom.backends.cuda.backend import within_memory  # noqa: E402
from deltaloom.graph.errors import CompileError  # noqa: E402
from deltaloom.passes.config import CompileConfig  # noqa: E402
from deltaloom.passes.serving_layout import ServingVariant  # noqa: E402
from deltaloom.runtime import recorded  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"


def inputs_of(write_slots):
    rows = len(write_slots)
    made = {name: torch.zeros(1, rows, dtype=torch.int64, device=DEVICE) for name in ("token_ids", "positions")}
    made |= {name: torch.zeros(rows, dtype=torch.int32, device=DEVICE) for name in ("context_lengths", "read_slots")}
    return {**made, "write_slots": torch.tensor(write_slots, dtype=torch.int32, device=DEVICE)}


def choose(logits, write_slots, allowed=None, chosen=None):
    inputs, kept = inputs_of(write_slots), torch.full((len(logits),), 99, dtype=torch.int64, device=DEVICE)
    given = None if chosen is None else torch.tensor(chosen, device=DEVICE)
    broken = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    choice.advance(torch.tensor(logits, device=DEVICE), allowed, given, kept, broken, inputs)
    assert broken.tolist() == [int(token < 0 and slot > 0) for token, slot in zip(kept.tolist(), write_slots, strict=True)]
    return kept.tolist(), {name: tensor.flatten().tolist() for name, tensor in inputs.items()}


@pytest.mark.parametrize("vocab", [1, 5, choice.PART, choice.PART + 1, 3 * choice.PART - 7])
def test_the_likeliest_token_is_taken_and_ties_go_to_the_lowest_id(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 4, (4, vocab)).astype(np.float32)
    logits[3, vocab // 2] = 9
    tokens, inputs = choose(logits, [1, 0, 3, 2])
    assert tokens == logits.argmax(-1).tolist() == inputs["token_ids"]
    assert inputs["positions"] == inputs["context_lengths"] == [1, 0, 1, 1]
    assert inputs["read_slots"] == [1, -1, 3, 2]


def test_only_allowed_tokens_are_taken():
    logits = np.arange(12, dtype=np.float32)[None]
    assert choose(logits, [1], allowed=7)[0] == [6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_told_of(bad):
    logits = np.ones((2, choice.PART + 3), np.float32)
    logits[1, -1] = bad
    tokens, inputs = choose(logits, [1, 2], allowed=5)
    assert tokens == [0, -1]
    assert inputs["token_ids"][1] == 0


def test_what_was_drawn_is_kept():
    tokens, inputs = choose(np.zeros((2, 9), np.float32), [1, 2], chosen=[4, 8])
    assert tokens == inputs["token_ids"] == [4, 8]


FOLDER = Path(__file__).resolve().parents[1] / "golden" / "next_base"


def models():
    own = CompileConfig(backends=("cuda",), device=DEVICE, dtype="float32")
    return deltaloom.load(FOLDER, config=own), deltaloom.load(FOLDER, backend="numpy", dtype="float32")


def continued(model, ids, mask, count):
    """The likeliest tokens, one after the other, by a call of the model for each."""
    output = model.forward(ids, attention_mask=mask, logits="last")
    found = []
    for _ in range(count):
        found.append(output.logits[:, 0].argmax(-1))
        output = model.forward(found[-1][:, None], state=output.state, logits="last")
    return np.stack(found).tolist()


def test_rows_go_on_as_without_recording_while_pools_grow_and_a_row_ends(monkeypatch):
    monkeypatch.setattr(recorded, "FIRST_BLOCKS", 1)
    model, plain = models()
    ids = np.arange(1, 43).reshape(3, 14) % plain.config.vocab_size
    mask = np.ones((3, 14), int)
    mask[1, :5] = 0
    wanted = continued(plain, ids, mask, 5)
    output = model.forward(ids, attention_mask=mask, logits="last")
    first = output.logits[:, 0].argmax(-1).tolist()
    rows = recorded.RecordedRows(model.main, output.state, allowed=None, draws={})
    assert first == wanted[0]
    for number, tokens in enumerate(rows.steps(first), 1):
        live = [0, 1, 2] if number < 3 else [0, 1]
        assert [tokens[row] for row in live] == [wanted[number][row] for row in live]
        if number == 2:
            rows.free(2)
        if number == 4:
            rows.free(0)
            rows.free(1)
    assert number == 4


def test_another_program_is_refused():
    model, _ = models()
    program, weights = model.main.bound(ServingVariant("mixed", ("last_logits",)))
    with pytest.raises(CompileError, match="made of the serving program decode with the output last_logits"):
        step.DecodeStep(program, weights, {}, {}, batch=1, max_blocks=1, device=torch.device(DEVICE))


def test_a_full_gpu_is_a_memory_error():
    with pytest.raises(MemoryError, match="out of memory"), within_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nmore")
