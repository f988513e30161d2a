"""What a compiled function leaves on the tensors of its caller: nothing, and nothing of theirs is lost."""

import pytest

torch = pytest.importorskip("torch")

from deltaloom.backends.torch import inductor  # noqa: E402
from deltaloom.backends.torch.inductor import InductorBackend  # noqa: E402
from deltaloom.passes.kernel import Appended  # noqa: E402


def test_what_others_wrote_on_a_tensor_stays():
    """The compiler's marks are set on aliases, and cleared there: not on the caller's tensors."""
    backend = InductorBackend("cpu")

    def segment(x, w_mix, cache):
        return (x @ w_mix, cache.data[:, :, :1] + 1)

    x, weight, data = torch.ones(3, 2), torch.ones(2, 2), torch.zeros(2, 2, 4, 2)
    for tensor in (x, weight, data):
        tensor.note = "ours"
    y, z = backend.finish(segment, "segment")(x, weight, Appended(data, backend.length(1)))
    assert y.tolist() == [[2.0, 2.0]] * 3 and z.shape == (2, 2, 1, 2)
    assert [tensor.__dict__ for tensor in (x, weight, data)] == [{"note": "ours"}] * 3


def calls(backend, function, *sizes):
    """Runs of a function of everything that a segment can be given: x [batch, seq, 3], a mask of ``columns``, a fixed state and a
    cache with room for ``capacity``."""
    for batch, seq, columns, capacity in sizes:
        x, valid, state = torch.ones(batch, seq, 3), torch.ones(batch, columns, dtype=torch.bool), torch.zeros(batch, 4, 5)
        cache = Appended(torch.zeros(batch, 2, capacity, 3), backend.length(1))
        y, mask, total, data = function(x, torch.ones(3, 2), valid, state, cache)
        assert y.tolist() == [[[3.0, 3.0]] * seq] * batch and mask.shape == (batch, columns)
        assert total.shape == state.shape and data.shape == cache.data.shape


def segment(x, w_mix, valid, state, cache):
    return (x @ w_mix, ~valid, state + 1, cache.data + 1)


@pytest.mark.parametrize(
    "later",
    [(4, 3, 7, 9), (2, 5, 7, 9), (2, 3, 8, 9), (2, 3, 7, 18), (5, 6, 11, 30)],
    ids=["batch", "tokens", "mask", "capacity", "everything"],
)
def test_the_first_call_of_a_class_compiles_for_all_of_it(later):
    """No size may be a constant: torch would notice at the second call and compile again."""
    torch.compiler.reset()
    backend = InductorBackend("cpu")
    calls(backend, backend.finish(segment, "segment"), (2, 3, 7, 9), later)
    assert backend.compilations() == {"segment": 1}


def test_only_the_first_call_of_a_class_is_marked(monkeypatch):
    marked = []
    monkeypatch.setattr(inductor, "maybe_mark_dynamic", lambda tensor, axis: marked.append(axis))
    backend = InductorBackend("cpu")
    function = backend.finish(lambda x: (x,), "small")
    monkeypatch.setattr(function, "_run", lambda x: (x,))
    counts = []
    for shape in ((2, 3), (4, 5), (1, 3), (1, 7), (2, 9), (1, 1), (1, 1)):
        function(torch.ones(shape))
        counts.append(len(marked))
    assert counts == [2, 2, 3, 3, 3, 3, 3]
