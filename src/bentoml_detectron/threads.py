"""How long PyTorch's threads spin while they wait for each other, which an environment variable decides."""

from __future__ import annotations

import os

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
