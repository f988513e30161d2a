"""How many cases Hypothesis draws: few by default, twenty times as many with `--hypothesis-profile=all`.

Without a GPU Triton's kernels run under its interpreter, which has to be chosen before Triton is imported."""

import os
from pathlib import Path

from hypothesis import settings

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("few", max_examples=10, deadline=None, print_blob=True)
settings.register_profile("all", parent=settings.get_profile("few"), max_examples=200)
settings.load_profile("few")
