"""What a process keeps: memory that PyTorch frees, and objects that Python's garbage collector can skip.

A forward pass on the CPU allocates and frees gigabytes of feature maps. glibc returns each large block to the system at once,
which then has to find, clear and map new pages for the next one; ``benchmarks/bench_speed.py`` measures what that costs.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable

KEEP = "BENTOML_DETECTRON_KEEP_MEMORY"
"""Set to 0, this environment variable leaves the C library as it is."""

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees for what it needs next; it holds the most that it ever needed, then.

    It is a setting of the whole process, as glibc has none that is narrower. Threads that allocated before this call keep
    their own arenas, to which it does not apply.

    Returns:
        Whether it does; not with another C library, nor where the environment says no.
    """
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    # A C library that has the function without a setting returns 0 and does nothing.
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1), mallopt(_M_MMAP_MAX, 0)])


def give_back_freed_memory() -> None:
    """Gives what is kept back to the system; the next forward pass then takes longer, as it has to ask for it again."""
    malloc_trim = _function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _function(name: str) -> Callable[..., int] | None:
    """One of the C library's; None where it has none, or the environment says no."""
    if os.environ.get(KEEP) == "0":
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return None
    return found


def spare_from_collection() -> None:
    """Lets Python's garbage collector leave alone what there is now, for a process that has made all that stays.

    Under load it looks every few seconds through the objects that imports make, and nothing else runs meanwhile; requests that
    are refused then wait for it (``benchmarks/bench_overload.py``).
    """
    gc.collect()
    gc.freeze()
