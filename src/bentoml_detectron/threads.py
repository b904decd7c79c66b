"""How many threads PyTorch should have here, and how long they spin while they wait for each other."""

from __future__ import annotations

import math
import os

from bentoml_detectron import control_groups

_COUNT = "OMP_NUM_THREADS"
_DECIDE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_SPINS = "20000"
"""Turns before a thread sleeps. GNU's OpenMP takes 300,000 unless told, at each of a model's many small steps: wherever
another thread or process wants a core, the one that is waited for does not get it."""


def environment() -> dict[str, str]:
    """What is to be in a process's environment before PyTorch is there; nothing where the user has decided."""
    return {} if decided() else {"GOMP_SPINCOUNT": _SPINS}


def decided() -> dict[str, str]:
    """What of it is in this process's environment already."""
    return {name: os.environ[name] for name in _DECIDE if name in os.environ}


def count() -> dict[str, str]:
    """The same for the number of threads: PyTorch counts the machine's cores, of which a container may be granted fewer."""
    granted = cores()
    return {} if is_count_decided() or granted == len(os.sched_getaffinity(0)) else {_COUNT: str(granted)}


def is_count_decided() -> bool:
    """Whether the user has chosen the number of threads."""
    return _COUNT in os.environ


def cores() -> int:
    """Cores that this process may use at once: part of one, which a container may be granted, counts whole."""
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *control_groups.cores()])))
