"""What the NumPy backend's data movements promise besides their values: views where a view will do."""

import numpy as np
import pytest

import deltaloom.ops  # noqa: F401 - fills the registry
from deltaloom.backends.numpy import shape
from deltaloom.graph.registry import ops


def test_without_padding_the_input_itself_is_the_result():
    op = ops.get("mask_padding")()
    x = np.ones((2, 3, 5), np.float32)
    assert shape.mask_padding(op, x, np.ones((2, 7), bool)) is x
    earlier = np.ones((2, 7), bool)
    earlier[0, :4] = False
    assert shape.mask_padding(op, x, earlier) is x, "padding before these columns does not concern them"


def test_padding_is_zeroed_in_a_copy():
    op = ops.get("mask_padding")()
    x = np.ones((2, 3, 5), np.float32)
    valid = np.ones((2, 7), bool)
    valid[0, :5] = False
    masked = shape.mask_padding(op, x, valid)
    assert x.all() and not masked[0, 0].any() and masked[0, 1:].all() and masked[1].all()


@pytest.mark.parametrize(
    ("name", "attributes"), [("unflatten", {"sizes": (2, 3)}), ("flatten", {"axes": 2}), ("split", {"sizes": (2, 4), "axis": -1})]
)
def test_results_are_views(name, attributes):
    x = np.arange(60.0).reshape(2, 5, 6)
    results = getattr(shape, name)(ops.get(name)(**attributes), x)
    for result in results if isinstance(results, tuple) else (results,):
        assert np.shares_memory(result, x)
