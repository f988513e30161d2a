"""How the NumPy backend cuts arrays into blocks of rows: every element once, small arrays whole."""

import numpy as np
import pytest

from deltaloom.backends.numpy.elementwise import BLOCK, by_rows
from deltaloom.backends.numpy.threads import use_threads


@pytest.fixture(autouse=True, params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    yield use_threads(request.param)
    use_threads(None)


def counted(calls):
    def run(out, x):
        calls.append(out.shape)
        out += x

    return run


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (0, 3), (2, 3, 5), (2 * BLOCK,), (3 * BLOCK,), (2, BLOCK)], ids=str)
def test_what_is_small_or_flat_is_one_call(shape):
    calls: list[tuple[int, ...]] = []
    out = np.ones(shape)
    assert by_rows(counted(calls), out, np.full(shape, 2.0)) is out
    assert calls == [shape] and (out == 3).all()


@pytest.mark.parametrize("shape", [(2, BLOCK + 1), (7, 300, 333), (BLOCK, 3), (3, 2 * BLOCK), (1, 3 * BLOCK)], ids=str)
def test_what_is_large_is_cut_and_every_element_done_once(shape):
    calls: list[tuple[int, ...]] = []
    out = np.ones(shape)
    assert by_rows(counted(calls), out, np.full(shape, 2.0)) is out
    assert (out == 3).all()
    assert sum(rows for rows, _ in calls) == out.size // shape[-1]
    assert all(columns == shape[-1] and (rows == 1 or rows * columns <= BLOCK) for rows, columns in calls)
    assert len(calls) > 1 or shape[0] == 1
