"""The input and output of `local`: chunks of images, and the outcome of each image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from bentoml_detectron.dataset.sources import Item
from bentoml_detectron.errors import DetectronError, InvalidArgumentError
from bentoml_detectron.results import Detections

CHUNK = 100
"""Images of a chunk, unless a caller says otherwise."""


def check_chunk(size: int) -> int:
    """The same.

    Raises:
        InvalidArgumentError: (``ValueError``) No chunk is so small.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(f"chunk is {size!r}; give 1 or more images", value=size)
    return size


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some images that follow each other.

    Attributes:
        number: From 0.
        start: The first one's position in the dataset, from 1.
        items: At least one.
    """

    number: int
    start: int
    items: Sequence[Item]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one image.

    Attributes:
        chunk: Its chunk's number.
        position: In the dataset, from 1.
        item: The image.
        image: Its path, or its encoded bytes; None where there are none.
        result: `Detections`, or why there are none.
    """

    chunk: int
    position: int
    item: Item
    image: str | bytes | None
    result: Detections | DetectronError


@dataclass(slots=True)
class Clock:
    """Seconds since `start`, of which the model was busy for `busy`."""

    start: float = field(default_factory=time.perf_counter)
    busy: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.start
