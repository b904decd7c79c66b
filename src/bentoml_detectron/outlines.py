"""The contours of a bitmap, along the edges of its pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def outlines(padded: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """The outer contours, as corners (x, y), of a bitmap with an empty border of one pixel that does not count.

    In each row of corners, those at 2i and 2i + 1 are joined by an edge; likewise in each column.
    """
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    crossing = (nw == se) & (ne == sw) & (nw != ne)  # two corners in one place
    at = np.repeat(np.arange(nw.size), ((nw ^ ne ^ sw ^ se) + 2 * crossing).ravel())
    y, x = np.divmod(at, nw.shape[1])
    order = np.arange(len(at))
    # Of the two at a crossing, the first has the edge to the left. It also has the one upwards, unless the pixels that meet are
    # the upper right and the lower left one: then the second has.
    swapped = (crossing & ne)[y, x]
    downwards = np.lexsort((np.where(swapped, -order, order), y, x))
    above_or_below = np.empty_like(order)
    above_or_below[downwards] = downwards[order ^ 1]
    # A contour is first met at its upper left corner, which is in the mask if the contour is an outer one.
    outer, corners, follow = se[y, x].tolist(), list(zip(x.tolist(), y.tolist(), strict=True)), above_or_below.tolist()
    seen = [False] * len(corners)
    found = []
    for start in range(0, len(corners), 2):
        if seen[start]:
            continue
        outline, here = [], start
        while not seen[here]:
            beside = here ^ 1
            seen[here] = seen[beside] = True
            outline += [corners[here], corners[beside]]
            here = follow[beside]
        if outer[start]:
            found.append(outline)
    return found
