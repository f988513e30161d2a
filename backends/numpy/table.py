"""The table that the kernel files of this folder fill."""

from __future__ import annotations

from deltaloom.passes.kernel import KernelTable

table = KernelTable("numpy")
