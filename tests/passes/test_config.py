"""The compile configuration from plain tables: what is understood, what is refused and with which sentence."""

from typing import Any

import pytest

from deltaloom.graph.errors import ConfigError
from deltaloom.passes.config import CompileConfig, backend_order, compile_config
from deltaloom.passes.table import PROGRAM, SHARED

FUSE = {"pass": "fuse", "rules": ["packed_swiglu"]}


def test_an_empty_table_is_the_default() -> None:
    assert compile_config({}) == CompileConfig()
    assert (CompileConfig().pipeline, CompileConfig().program, CompileConfig().cache) == (SHARED, PROGRAM, "off")


def test_every_key_of_a_table_arrives() -> None:
    table = {
        "backends": ["torch", "numpy"], "dtype": "bfloat16", "device": "cuda", "threads": 3, "prefill_chunk": 7,
        "kernels": {"linear": ["numpy"]}, "pipeline": ["canonicalise", FUSE, "quantise", "lift_weights"],
        "skip": ["fuse"], "fuel": 2, "mesh": {"tp": 1}, "quantise": {"*": "plain"}, "keep_quantized": False,
        "cache": "/x", "dump": "/y",
    }  # fmt: skip
    made = compile_config(table)
    assert made.backends == ("torch", "numpy") and made.kernels == {"linear": ("numpy",)}
    assert made.pipeline == ("canonicalise", FUSE, "quantise", "lift_weights")
    assert made.steps[0] == ("canonicalise", "quantise", "lift_weights")
    for key in ("dtype", "device", "threads", "prefill_chunk", "fuel", "mesh", "quantise", "keep_quantized", "cache", "dump"):
        assert getattr(made, key) == table[key]


def test_backends_in_one_text() -> None:
    assert backend_order("torch, numpy") == backend_order(["torch", "numpy"]) == ("torch", "numpy")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"treads": 3}, "unknown key 'treads'; did you mean 'threads'"),
        ({"zzz": 3}, "unknown key 'zzz'; known are backends, dtype"),
        ({"backends": ["a", ""]}, "a name in it is empty"),
        ({"fuel": -1}, "fuel is -1, expected at least 0"),
        ({"fuel": 1.5}, "fuel is 1.5, expected a whole number"),
        ({"threads": 0}, "threads is 0, expected 1 to"),
        ({"mesh": "tp=2"}, "mesh is 'tp=2', expected a table"),
        ({"mesh": {"tp": True}}, "mesh is .*, expected a table"),
        ({"mesh": {"tq": 2}}, "mesh has an axis 'tq'; known are tp"),
        ({"mesh": {"tp": 0}}, "has 0 ranks"),
        ({"quantise": "int3"}, "no scheme 'int3'"),
        ({"quantise": 8}, "quantise is 8; expected a scheme"),
        ({"keep_quantized": "yes"}, "keep_quantized is 'yes', expected true or false"),
        ({"cache": ""}, "cache is empty"),
        ({"cache": True}, "cache is True, expected 'off'"),
        ({"skip": [1]}, "skip is .1., expected a name or a list"),
        ({"kernels": []}, "kernels must be a table"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compile_config(table)
