"""How much memory and time of processors control groups, of either version, leave to this process: a container's limits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
_MEMORY = {
    True: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    False: ("memory.max", "memory.current", "inactive_file"),
}
"""By whether it is version 1: the files of a limit and of what is used, and what of that can be taken back."""


def free_memory(memberships: Path = _MEMBERSHIPS, root: Path = _ROOT) -> Iterator[int]:
    """Bytes that are free in each group that limits memory; what the system can take back at once is free."""
    for group, is_first in _groups("memory", memberships, root):
        limit, used, cached = _MEMORY[is_first]
        try:
            taken = int((group / used).read_text())
            files = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
            yield int((group / limit).read_text()) - taken + int(files[1] if files else 0)
        except (OSError, ValueError):  # it is not there, or has no limit ("max")
            continue


def cores(memberships: Path = _MEMBERSHIPS, root: Path = _ROOT) -> Iterator[float]:
    """Cores' worth of time, such as 1.5, that each group that limits it grants to its processes."""
    for group, is_first in _groups("cpu", memberships, root):
        try:
            if is_first:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (group / "cpu.max").read_text().split()
            if int(quota) > 0 and int(period) > 0:  # version 1 says -1 where there is no limit, version 2 "max"
                yield int(quota) / int(period)
        except (OSError, ValueError):
            continue


def _groups(controller: str, memberships: Path, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folder of each group that may limit what a controller controls, and whether it is one of version 1."""
    try:
        lines = [line.split(":", 2) for line in memberships.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        is_first = controller in controllers.split(",")
        if controllers and not is_first:
            continue
        top = root / controller if is_first else root
        own = Path(path.lstrip("/"))  # in a container it may be as the host has it, and the limit at the top
        for each in (own, *own.parents):
            yield top / each, is_first
