"""The C library keeps what is freed, unless the environment says no."""

from __future__ import annotations

import platform

import pytest

from support import run_python

FAULTS = """
import resource
import torch
from bentoml_detectron.memory import keep_freed_memory

print(keep_freed_memory())
for _ in range(16):  # what is small and lies between the blocks has found its place by then
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.slow
def test_memory_that_was_freed_is_used_again_without_new_pages():
    """64 MB are 16,384 pages of 4 KB, or 32 of 2 MB; each new one is a fault."""
    kept, faults = run_python(FAULTS).stdout.split()
    assert kept == "True"
    assert int(faults) < 16


@pytest.mark.slow
def test_environment_leaves_the_c_library_as_it_is():
    kept, faults = run_python(FAULTS, BENTOML_DETECTRON_KEEP_MEMORY="0").stdout.split()
    assert kept == "False"
    assert int(faults) >= 32
