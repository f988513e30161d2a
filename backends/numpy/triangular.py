"""Inverses of many small unit lower triangular matrices, by substitution with the batch as the last axis.

So every operation is a long vector: an order below ``np.linalg.inv``. Repeated squaring is no option: powers of the strict part
reach 1e18 with repeated keys.
"""

from __future__ import annotations

import numpy as np

from deltaloom.graph.op import Array


def unit_lower_inverse(matrices: Array) -> Array:
    """``(I + strict_lower(A))^-1`` of every ``A`` in ``matrices`` [count, n, n], with zeros above the diagonal; what lies on
    and above the diagonal of ``A`` is not looked at. Meant for ``n`` up to about 16."""
    lower = np.ascontiguousarray(matrices.transpose(1, 2, 0))
    inverse = np.zeros(lower.shape, lower.dtype)
    for i in range(len(lower)):
        if i:
            np.einsum("jb,jcb->cb", lower[i, :i], inverse[:i, :i], out=inverse[i, :i])
            np.negative(inverse[i, :i], out=inverse[i, :i])
        inverse[i, i] = 1
    return np.ascontiguousarray(inverse.transpose(2, 0, 1))
