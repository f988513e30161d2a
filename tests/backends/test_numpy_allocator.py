"""Memory that arrays give back stays with the process, so that the next ones cause no page faults."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys
import numpy as np
from deltaloom.backends import backend

if sys.argv[1] == "with":
    backend("numpy")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        arrays = [np.ones(1 << 18) for _ in range(8)]
        del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the page faults of Linux")
def test_freed_arrays_cause_no_new_page_faults() -> None:
    found = {}
    for mode in ("with", "without"):
        run = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        found[mode] = int(run.stdout)
    assert found["with"] <= found["without"] / 10 + 50
