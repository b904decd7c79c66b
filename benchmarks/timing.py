"""What the benchmarks share: one way timed, two ways timed in turn, and how their ratios are told."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable


def seconds(way: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def pairs(first: Callable[[], object], second: Callable[[], object], count: int) -> list[tuple[float, float]]:
    """Seconds of two ways, in turn."""
    return [(seconds(first), seconds(second)) for _ in range(count)]


def spread(ratios: Iterable[float], digits: int = 1) -> str:
    """The median of some ratios, with the least and the largest."""
    found = sorted(ratios)
    median = statistics.median(found)
    return f"{median:,.{digits}f} (min {found[0]:,.{digits}f}, max {found[-1]:,.{digits}f})"


def compare(ours: Callable[[], object], way: Callable[[], object], count: int) -> tuple[list[float], float, str]:
    """Times a way against ours, in turn.

    Returns:
        The seconds of ours; the median of the way's, in milliseconds; and how many times as long it takes, pair by pair.
    """
    both = pairs(ours, way, count)
    milliseconds = statistics.median(second for _, second in both) * 1e3
    return [first for first, _ in both], milliseconds, spread(second / first for first, second in both)
