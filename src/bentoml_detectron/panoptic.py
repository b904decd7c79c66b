"""A segmentation of a whole image into things and stuff, in plain NumPy: `PanopticSegmentation` and its `Segment`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron import masks as rle_masks
from bentoml_detectron import results_checks as checks
from bentoml_detectron import results_json
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.masks import RLE

MOST_SEGMENT = (1 << 24) - 1
"""The highest segment id: three bytes, as COCO's panoptic PNG has them."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment of a panoptic segmentation.

    Attributes:
        id: Its value in the map; above 0.
        class_id: The contiguous training id, of a thing or of stuff.
        class_name: "" only where the model carries no names.
        is_thing: Whether it is one countable object.
        area: In pixels.
        score: In [0, 1], of a thing; None for stuff, and where the model gives none.
        category_id: The dataset's own id, where the model carries it.
        detection: The index of the detection that it is the segment of, if there is one.

    Raises:
        InvalidArgumentError: (``ValueError``) One has another type, or is out of range.
    """

    id: int
    class_id: int
    class_name: str
    is_thing: bool
    area: int
    score: float | None = None
    category_id: int | None = None
    detection: int | None = None

    def __post_init__(self) -> None:
        _set(self, "id", checks.whole("a segment's id", self.id, 1, MOST_SEGMENT))
        _set(self, "class_id", checks.whole("a segment's class_id", self.class_id, 0))
        _set(self, "area", checks.whole("a segment's area", self.area, 0))
        _set(self, "class_name", checks.names("a segment's class_name", [self.class_name], 1)[0])
        if not isinstance(self.is_thing, (bool, np.bool_)):
            raise InvalidArgumentError(
                f"a segment's is_thing is {self.is_thing!r}; it must be True or False", value=self.is_thing
            )
        _set(self, "is_thing", bool(self.is_thing))
        if self.score is not None:
            _set(self, "score", checks.score(self.score))
        if self.category_id is not None:
            _set(self, "category_id", checks.whole("a segment's category_id", self.category_id, -(1 << 63)))
        if self.detection is not None:
            _set(self, "detection", checks.whole("a segment's detection", self.detection, 0))


@dataclass(frozen=True, slots=True, eq=False)
class PanopticSegmentation:
    """Each pixel's segment.

    Attributes:
        ids: (H, W) int32, each pixel's segment id; 0 where there is none.
        segments: The segments, whose ids are those of the map.
    """

    ids: NDArray[np.int32]
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        _set(self, "ids", checks.array("panoptic.ids", self.ids, np.int32, (None, None)))
        given = tuple(self.segments) if isinstance(self.segments, Iterable) else (None,)
        if not all(isinstance(segment, Segment) for segment in given):
            raise InvalidArgumentError(
                f"panoptic.segments is {self.segments!r:.80}; it must hold Segments", value=self.segments
            )
        _set(self, "segments", given)
        known = [segment.id for segment in self.segments]
        if len(set(known)) < len(known):
            raise InvalidArgumentError(f"segment ids are {known}; each must be unique", value=known)
        lowest, highest = (int(self.ids.min()), int(self.ids.max())) if self.ids.size else (0, 0)
        is_known = np.zeros(min(max(highest, 0), MOST_SEGMENT) + 1, np.bool_)
        is_known[[each for each in [0, *known] if each < len(is_known)]] = True
        if lowest < 0 or highest > MOST_SEGMENT or not is_known[self.ids].all():
            raise InvalidArgumentError(f"panoptic.ids must hold only 0 and the ids of its segments, {known}", value=known)

    def __reduce__(self) -> tuple[Any, ...]:
        return checks.restored, (PanopticSegmentation, self.ids, self.segments)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PanopticSegmentation):
            return NotImplemented
        return self.segments == other.segments and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.ids.shape
        return f"PanopticSegmentation({len(self.segments)} segments in {width}x{height})"

    def rle(self, segment_id: int) -> RLE:
        """One segment's mask."""
        return rle_masks.encode(self.ids == segment_id)

    def to_png(self) -> bytes:
        """The map as COCO's panoptic PNG: an id is red + 256 green + 65536 blue."""
        return results_json.panoptic_png(self.ids)

    def segments_info(self) -> list[dict[str, Any]]:
        """COCO's ``segments_info``; category ids are the dataset's where the model carries them."""
        return [
            {
                "id": segment.id,
                "category_id": segment.class_id if segment.category_id is None else segment.category_id,
                "isthing": int(segment.is_thing),
                "area": segment.area,
                **({} if segment.score is None else {"score": segment.score}),
            }
            for segment in self.segments
        ]

    def relinked(self, chosen: NDArray[np.int64]) -> PanopticSegmentation:
        """The same segmentation, its segments pointing at detections as they are counted in a choice of them.

        Args:
            chosen: (M,) the indices that the chosen detections had.
        """
        place = {old: new for new, old in reversed([*enumerate(chosen.tolist())])}  # the first of one chosen twice
        segments = [
            segment if segment.detection is None else replace(segment, detection=place.get(segment.detection))
            for segment in self.segments
        ]
        return PanopticSegmentation(self.ids, tuple(segments))


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)
