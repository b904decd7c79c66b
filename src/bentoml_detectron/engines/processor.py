"""The features of this machine's processor."""

from __future__ import annotations

import re
from pathlib import Path


def features() -> frozenset[str]:
    """Names of its features as Linux gives them, such as ``amx_bf16``; none where it does not say."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(found[1].split()) if found else frozenset()
