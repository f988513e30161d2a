"""A plugin whose op is right and whose kernel is not."""

from deltaloom import Plugin
from deltaloom.graph.op import Array, Op
from deltaloom.passes.kernel import KernelTable

table = KernelTable("numpy")


@table.kernel("broken_kernel.twice")
def twice(op: Op, x: Array) -> Array:
    result: Array = x * x.dtype.type(2.02)
    return result


plugin = Plugin("broken_kernel", ops={"broken_kernel.twice": "deltaloom_broken.twice:KernelTwice"}, kernels={"numpy": table})
