"""A CPU backend for deltaloom whose kernels are compiled by numba and read weights in bfloat16."""

from deltaloom.graph.plugins import Plugin

plugin = Plugin(
    "numba",
    api=(1, 0),
    description="CPU backend: products with bfloat16 weights and the delta rule's step, compiled by numba",
    backends={"numba": "deltaloom_numba.backend:NumbaBackend"},
    claims=("float32", "float64", "quantised", "memory", "states", "mixed"),
)
