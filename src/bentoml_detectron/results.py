"""What a model found on one image, in plain NumPy: `Detections` and its conversions.

Reading `Detections` needs neither PyTorch nor Detectron2.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from bentoml_detectron import masks as rle_masks
from bentoml_detectron import results_checks as checks
from bentoml_detectron import results_json
from bentoml_detectron.errors import NO_DETECTRON2, DependencyMissingError, DetectronMissingError, InvalidArgumentError
from bentoml_detectron.masks import RLE
from bentoml_detectron.panoptic import PanopticSegmentation, Segment

if TYPE_CHECKING:
    import supervision
    from detectron2.structures import Instances

__all__ = ["RLE", "Detections", "PanopticSegmentation", "Segment"]

VOID = {"uint8": 255, "int16": -1}
"""What a semantic map holds where it says nothing, by its dtype."""


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """What a model found on one image: N detections, in the model's order, which is best score first in Detectron2's.

    Arrays are read-only, and views of those that they were made of where these have the same dtype.

    Attributes:
        image_size: Height and width of the image, in pixels.
        boxes: (N, 4) float32, XYXY in absolute pixels; (N, 5) XYWHA of rotated models: center, size, and degrees
            counter-clockwise.
        scores: (N,) float32, in [0, 1].
        class_ids: (N,) int64, contiguous training ids.
        class_names: One a detection, "" only where the model carries no names.
        category_ids: (N,) int64, the dataset's own ids, where the model carries them.
        masks: One a detection, COCO's compressed RLE at the size of the image.
        keypoints: (N, K, 3) float32: x, y in absolute pixels, and the keypoint's score.
        panoptic: The segmentation of the whole image into things and stuff.
        semantic: (H, W) uint8 or, with more than 255 classes, int16: each pixel's class; 255 or -1 where there is none.

    Raises:
        InvalidArgumentError: (``ValueError``) Dtypes, shapes or lengths do not fit together, or a number is not finite.
    """

    image_size: tuple[int, int]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int64]
    class_names: tuple[str, ...]
    masks: list[RLE] | None = None
    keypoints: NDArray[np.float32] | None = None
    panoptic: PanopticSegmentation | None = None
    semantic: NDArray[np.uint8] | NDArray[np.int16] | None = None
    category_ids: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        size = checks.image_size(self.image_size)
        _set(self, "image_size", size)
        _set(self, "scores", checks.array("scores", self.scores, np.float32, (None,)))
        count = len(self.scores)
        _set(self, "boxes", checks.boxes(self.boxes, count))
        _set(self, "class_ids", checks.array("class_ids", self.class_ids, np.int64, (count,)))
        if count and self.class_ids.min() < 0:
            raise InvalidArgumentError(f"class_ids holds {self.class_ids.min()}; ids must be 0 or more", value=self.class_ids)
        _set(self, "class_names", checks.names("class_names", self.class_names, count))
        if self.category_ids is not None:
            _set(self, "category_ids", checks.array("category_ids", self.category_ids, np.int64, (count,)))
        if self.keypoints is not None:
            _set(self, "keypoints", checks.array("keypoints", self.keypoints, np.float32, (count, None, 3)))
        if self.masks is not None:
            _set(self, "masks", checks.masks(self.masks, count, size))
        if self.semantic is not None:
            dtype = getattr(self.semantic, "dtype", type(self.semantic))
            if dtype not in (np.uint8, np.int16):
                raise InvalidArgumentError(f"semantic must be an array of uint8 or int16, not {dtype}", value=dtype)
            _set(self, "semantic", checks.array("semantic", self.semantic, np.dtype(dtype).type, size))
        if self.panoptic is not None:
            _check_panoptic(self.panoptic, count, size)

    def __reduce__(self) -> tuple[Any, ...]:
        return checks.restored, (Detections, *(getattr(self, each.name) for each in fields(self)))

    def __len__(self) -> int:
        return len(self.scores)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Detections):
            return NotImplemented
        return all(_same(getattr(self, each.name), getattr(other, each.name)) for each in fields(self))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        height, width = self.image_size
        names = [name or str(label) for name, label in zip(self.class_names, self.class_ids.tolist(), strict=True)]
        found = [f"{name} {score:.2f}" for name, score in zip(names[:3], self.scores[:3].tolist(), strict=True)]
        parts = [", ".join(found) + (", ..." if len(self) > 3 else "")] if found else []
        parts += [name for name in ("masks", "keypoints", "panoptic", "semantic") if getattr(self, name) is not None]
        return f"Detections({len(self)} in {width}x{height}{': ' if parts else ''}{'; '.join(parts)})"

    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> Detections:
        """The detections of a slice, of indices, or where a mask is True; maps of the whole image stay as they are.

        Example::

            sure = found[found.scores > 0.6]

        Raises:
            InvalidArgumentError: (``ValueError``) It is none of these, or there are not so many detections.
        """
        chosen = self._chosen(index)
        return Detections(
            self.image_size,
            self.boxes[chosen],
            self.scores[chosen],
            self.class_ids[chosen],
            tuple(self.class_names[i] for i in chosen.tolist()),
            None if self.masks is None else [self.masks[i] for i in chosen.tolist()],
            None if self.keypoints is None else self.keypoints[chosen],
            None if self.panoptic is None else self.panoptic.relinked(chosen),
            self.semantic,
            None if self.category_ids is None else self.category_ids[chosen],
        )

    def _chosen(self, index: Any) -> NDArray[np.int64]:
        try:
            given = index if isinstance(index, slice) else np.asarray(index)
            if isinstance(given, np.ndarray) and given.shape == (0,):
                given = given.astype(np.int64)  # without elements a list has no type
            chosen = np.arange(len(self))[given]
        except (IndexError, TypeError, ValueError) as exc:
            raise InvalidArgumentError(
                f"{index!r:.80} does not select from {len(self)} detections: {exc}", value=index
            ) from exc
        if np.ndim(chosen) != 1:
            raise InvalidArgumentError(
                f"{index!r:.80} is not a list; for a single detection give a list of one, as [0]; to loop over detections, "
                "loop over the attributes, as zip(found.class_names, found.scores)",
                value=index,
            )
        return chosen

    def polygons(self) -> list[list[list[float]]]:
        """Each detection's mask as COCO's polygons, flat x, y lists in absolute pixels; see `masks.to_polygons`.

        Raises:
            InvalidArgumentError: There are no masks.
        """
        if self.masks is None:
            raise InvalidArgumentError("these detections have no masks, so no polygons")
        return [rle_masks.to_polygons(mask) for mask in self.masks]

    def semantic_rles(self) -> dict[int, RLE]:
        """The semantic map as one RLE a class that is there, by class id.

        Raises:
            InvalidArgumentError: There is no semantic map.
        """
        if self.semantic is None:
            raise InvalidArgumentError("these detections have no semantic map, so no masks of its classes")
        there = [each for each in np.unique(self.semantic).tolist() if each != VOID[str(self.semantic.dtype)]]
        return {class_id: rle_masks.encode(self.semantic == class_id) for class_id in there}

    def to_json(self, *, masks: Literal["rle", "polygon", "none"] = "rle") -> str:
        """As one JSON object, described by ``docs/detections.schema.json``; its keys are the attributes, and two more.

        Args:
            masks: As RLE, which `from_json` reads back without loss; as polygons, or not at all, which it cannot.

        Returns:
            The text. Numbers are the shortest that give the same float32; maps are PNG in base64. "box_format" is "xyxy" or
            "xywha", "keypoint_count" is K.
        """
        if masks not in ("rle", "polygon", "none"):
            raise InvalidArgumentError(f"masks={masks!r}; give 'rle', 'polygon' or 'none'", value=masks)
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.masks is not None and masks != "rle":
            parts["masks"] = self.polygons() if masks == "polygon" else None
        if self.panoptic is None:
            return results_json.write(parts)
        return results_json.write({**parts, "panoptic": self.panoptic.ids}, self.panoptic.segments)

    @classmethod
    def from_json(cls, text: str | bytes | bytearray | Mapping[str, Any]) -> Detections:
        """Reads what `to_json` wrote, or a service answered; the text may come from anyone.

        It takes memory in proportion to the text, and for maps to `image_size`, at most 2**28 pixels.

        Args:
            text: JSON, or what a client has parsed of it already. Masks are RLEs.

        Raises:
            InvalidArgumentError: (``ValueError``) It is not such a text, or its parts do not fit together.
        """
        parts, segments = results_json.read(text)
        if "panoptic" in parts:
            parts["panoptic"] = PanopticSegmentation(parts["panoptic"], tuple(Segment(**each) for each in segments))
        return cls(**parts)

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """As COCO results, which pycocotools' ``loadRes`` takes; one dict a detection.

        Category ids are the dataset's where the model carries them. Boxes are XYWH, XYWHA of rotated models. Keypoints are
        pixel indices, half a pixel less than Detectron2's coordinates, as in its ``COCOEvaluator``. To compute the AP of masks,
        remove "bbox" from each dict first, as ``COCOEvaluator`` does; otherwise ``loadRes`` takes the boxes' areas for theirs.

        Raises:
            InvalidArgumentError: (``ValueError``) `image_id` is neither a whole number nor a string.
        """
        try:
            image_id = image_id if isinstance(image_id, str) else operator.index(image_id)  # JSON knows no NumPy numbers
        except TypeError as exc:
            raise InvalidArgumentError(f"image_id is {image_id!r}; give a whole number or a string", value=image_id) from exc
        boxes = self.boxes
        if boxes.shape[1] == 4:
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        categories = self.class_ids if self.category_ids is None else self.category_ids
        columns: dict[str, Sequence[Any]] = {
            "category_id": categories.tolist(), "bbox": boxes.tolist(), "score": self.scores.tolist(),
        }  # fmt: skip
        if self.masks is not None:
            columns["segmentation"] = [{"size": list(mask["size"]), "counts": mask["counts"]} for mask in self.masks]
        if self.keypoints is not None:
            shifted = self.keypoints - np.array([0.5, 0.5, 0], np.float32)
            columns["keypoints"] = shifted.reshape(len(self), 3 * shifted.shape[1]).tolist()  # -1 is no number for none
        return [{"image_id": image_id, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]

    def to_supervision(self) -> supervision.Detections:
        """As the supervision library's detections, for its annotators, trackers and metrics; masks stay compact.

        Raises:
            DependencyMissingError: supervision is not installed.
            InvalidArgumentError: The boxes are rotated.
        """
        try:
            import supervision as sv
        except ModuleNotFoundError as exc:
            raise DependencyMissingError("this needs supervision: pip install supervision") from exc
        if self.boxes.shape[1] != 4:
            raise InvalidArgumentError("supervision's Detections cannot hold rotated boxes; use boxes", value=self.boxes)
        compact = None
        if self.masks is not None:
            crops = [rle_masks.crop(mask) for mask in self.masks]
            corners = np.array([each[:2] for each in crops], np.int32).reshape(-1, 2)
            shapes = np.array([each[3:1:-1] for each in crops], np.int32).reshape(-1, 2)
            compact = sv.CompactMask([each[4].astype(np.int32) for each in crops], shapes, corners, self.image_size)
        return sv.Detections(
            xyxy=self.boxes.copy(),
            mask=compact,
            confidence=self.scores.copy(),
            class_id=self.class_ids.copy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def to_instances(self) -> Instances:
        """As Detectron2's ``Instances``, on the CPU, with the fields that its models give; masks are (N, H, W) bool.

        Raises:
            DetectronMissingError: Detectron2 is not installed.
        """
        try:
            from detectron2.structures import Boxes, Instances, RotatedBoxes
        except ModuleNotFoundError as exc:
            raise DetectronMissingError(NO_DETECTRON2) from exc
        import torch

        boxes = torch.from_numpy(self.boxes.copy())
        instances = Instances(
            self.image_size,
            pred_boxes=Boxes(boxes) if boxes.shape[1] == 4 else RotatedBoxes(boxes),
            scores=torch.from_numpy(self.scores.copy()),
            pred_classes=torch.from_numpy(self.class_ids.copy()),
        )
        if self.masks is not None:
            bitmaps = torch.zeros((len(self), *self.image_size), dtype=torch.bool)
            for bitmap, mask in zip(bitmaps, self.masks, strict=True):
                bitmap.copy_(torch.from_numpy(rle_masks.decode(mask)))
            instances.pred_masks = bitmaps
        if self.keypoints is not None:
            instances.pred_keypoints = torch.from_numpy(self.keypoints.copy())
        return instances


def _set(target: object, name: str, value: object) -> None:
    object.__setattr__(target, name, value)


def _check_panoptic(panoptic: Any, count: int, size: tuple[int, int]) -> None:
    if not isinstance(panoptic, PanopticSegmentation):
        raise InvalidArgumentError(f"panoptic must be a PanopticSegmentation, not {type(panoptic).__name__}", value=panoptic)
    if panoptic.ids.shape != size:
        raise InvalidArgumentError(
            f"panoptic.ids has the shape {panoptic.ids.shape}, but the image is {size}", value=panoptic.ids.shape
        )
    for segment in panoptic.segments:
        if segment.detection is not None and segment.detection >= count:
            raise InvalidArgumentError(
                f"panoptic: {segment} does not refer to one of the {count} detections", value=segment.detection
            )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(type(one) is type(other) and one == other)
