"""`draw`: the image with what was found drawn on it, by the supervision library and Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from bentoml_detectron import images
from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError
from bentoml_detectron.images import ImageLike
from bentoml_detectron.masks import columns, crop
from bentoml_detectron.results import VOID, Detections, PanopticSegmentation

if TYPE_CHECKING:
    import supervision as sv
    from numpy.typing import NDArray

__all__ = ["draw"]

KEYPOINT_THRESHOLD = 0.05
"""Of the keypoints that are drawn, as in Detectron2's ``Visualizer``."""


def draw(image: ImageLike, found: Detections, *, labels: bool = True) -> NDArray[np.uint8]:
    """Draws detections, segments and keypoints on a picture, a color a class.

    Args:
        image: As `Predictor` takes it, of the size that `found` is of.
        found: What was found on it.
        labels: Whether to write each detection's class and score.

    Returns:
        (H, W, 3) uint8 in BGR; `image` is left as it is.

    Raises:
        DependencyMissingError: supervision is not installed.
        ImageError: The image cannot be used.
        InvalidArgumentError: (``ValueError``) The image is of another size, or `found` is none.
    """
    try:
        import supervision as sv
    except ImportError as exc:
        raise DependencyMissingError(f"drawing needs supervision ({exc}): pip install supervision") from exc
    if not isinstance(found, Detections):
        raise InvalidArgumentError(f"found must be the Detections of one image, not {type(found).__name__}", value=type(found))
    height, width = found.image_size
    limits = images.Limits(max_pixels=max(height * width, images.DEFAULT_LIMITS.max_pixels))
    scene = np.array(images.load(image, limits), order="C")
    if scene.shape[:2] != found.image_size:
        raise InvalidArgumentError(
            f"the image is {scene.shape[1]}x{scene.shape[0]}, but the detections are for one of {width}x{height}; "
            "draw on the image that they were found on",
            value=scene.shape[:2],
        )
    palette = sv.ColorPalette.DEFAULT
    count = len(palette.colors)
    if found.panoptic is not None:
        scene = _blended(scene, _of_segments(found.panoptic, count), palette)
    elif found.semantic is not None:
        scene = _blended(scene, _of_classes(found.semantic, count), palette)
    if not len(found):
        return scene
    if found.masks is not None and found.panoptic is None:
        scene = _blended(scene, _of_masks(found, count), palette)
    return _annotated(scene, found[::-1], palette, labels)  # the best one last, so that it is on top


def _annotated(scene: Any, found: Detections, palette: sv.ColorPalette, labels: bool) -> NDArray[np.uint8]:
    """The picture with boxes, keypoints and labels, in widths that go with its size."""
    import supervision as sv

    detections = _boxes(found)
    side = min(found.image_size)
    scene = sv.OrientedBoxAnnotator(palette, thickness=max(1, round(side / 400))).annotate(scene, detections)
    if found.keypoints is not None:
        visible = found.keypoints[:, :, 2] > KEYPOINT_THRESHOLD
        places = np.clip(found.keypoints[:, :, :2], -_limit(found), _limit(found))
        points = sv.KeyPoints(xy=places, class_id=found.class_ids.copy(), visible=visible)
        scene = sv.VertexAnnotator(color=sv.Color.GREEN, radius=max(2, round(side / 250))).annotate(scene, points)
    if labels:
        scene = _labelled(scene, found, detections.xyxy, palette)
    return np.asarray(scene, np.uint8)


def _labelled(scene: Any, found: Detections, boxes: NDArray[np.float32], palette: sv.ColorPalette) -> Any:
    """The picture with a class and a score above each box, or as near to there as it is inside."""
    import supervision as sv

    rows = zip(found.class_names, found.class_ids.tolist(), found.scores.tolist(), strict=True)
    texts = [f"{name or label} {score:.2f}" for name, label, score in rows]
    scale = min(max(min(found.image_size) / 1600, 0.35), 1.0)
    padding = round(8 * scale)
    # At a scale of 1, text is 27 pixels high and at most 16 a character wide.
    widths = np.array([16 * scale * len(text) + 2 * padding for text in texts])
    x = np.clip(boxes[:, 0], 0, np.maximum(found.image_size[1] - widths, 0))
    y = np.clip(boxes[:, 1], 27 * scale + 2 * padding, found.image_size[0])
    corners = sv.Detections(xyxy=np.stack([x, y, x, y], axis=1), class_id=found.class_ids.copy())
    lights = [np.dot(color.as_bgr(), (0.114, 0.587, 0.299)) for color in palette.colors]  # luma, as in JPEG
    text_colors = sv.ColorPalette([sv.Color.BLACK if light > 110 else sv.Color.WHITE for light in lights])
    annotator = sv.LabelAnnotator(
        palette, text_color=text_colors, text_scale=scale, text_thickness=1 if scale < 0.8 else 2, text_padding=padding
    )
    return annotator.annotate(scene, corners, texts)


def _limit(found: Detections) -> float:
    """A coordinate far outside of the picture, which OpenCV still takes."""
    return 4.0 * max(found.image_size)


def _boxes(found: Detections) -> sv.Detections:
    """Boxes and classes, with the corners by which supervision draws boxes that may be rotated."""
    import supervision as sv
    from supervision.config import ORIENTED_BOX_COORDINATES

    boxes = found.boxes.astype(np.float64)
    if boxes.shape[1] == 4:
        corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]]
    else:
        # As Detectron2's RotatedBoxes: degrees counter-clockwise, on an image whose y goes down.
        center, sides, theta = boxes[:, None, :2], boxes[:, None, 2:4] / 2, np.deg2rad(boxes[:, 4:])
        x, y = np.moveaxis(sides * [[-1, -1], [1, -1], [1, 1], [-1, 1]], 2, 0)
        cosine, sine = np.cos(theta), np.sin(theta)
        corners = center + np.stack([cosine * x + sine * y, cosine * y - sine * x], axis=2)
    corners = np.clip(corners.round(), -_limit(found), _limit(found))
    around = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return sv.Detections(xyxy=around, class_id=found.class_ids.copy(), data={ORIENTED_BOX_COORDINATES: corners})


def _blended(scene: NDArray[np.uint8], colored: NDArray[np.uint8], palette: sv.ColorPalette) -> NDArray[np.uint8]:
    """The picture, half of it a color where the map (H, W) is not 0 but 1 plus the color's index.

    With supervision's ``MaskAnnotator`` for it, all of `draw` takes twice as long; see ``benchmarks/bench_draw.py``.
    """
    colors = Image.fromarray(colored)
    colors.putpalette([0, 0, 0, *(channel for color in palette.colors for channel in color.as_bgr())])
    mixed = Image.fromarray(scene)
    mixed.paste(colors.convert("RGB"), mask=Image.fromarray(colored).point([0] + [128] * 255))
    return np.array(mixed)


def _of_masks(found: Detections, colors: int) -> NDArray[np.uint8]:
    """Each pixel's color for `_blended`: that of the smallest mask there."""
    height, width = found.image_size
    colored = np.zeros((width, height), np.uint8)  # by column, as the runs are
    crops = [crop(mask) for mask in found.masks or []]
    areas = [int(runs[1::2].sum()) for *_, runs in crops]
    for index in np.argsort(areas)[::-1].tolist():
        x, y, across, down, runs = crops[index]
        color = np.uint8(found.class_ids[index] % colors + 1)
        np.copyto(colored[x : x + across, y : y + down], color, where=columns(runs, down, across))
    return np.asarray(Image.fromarray(colored).transpose(Image.Transpose.TRANSPOSE))


def _of_segments(panoptic: PanopticSegmentation, colors: int) -> NDArray[np.uint8]:
    """Each pixel's color for `_blended`; those of stuff are other ones than those of things with the same id."""
    table = np.zeros(max((segment.id for segment in panoptic.segments), default=0) + 1, np.uint8)
    for segment in panoptic.segments:
        table[segment.id] = (segment.class_id + (0 if segment.is_thing else colors // 2)) % colors + 1
    return table[panoptic.ids]


def _of_classes(semantic: NDArray[Any], colors: int) -> NDArray[np.uint8]:
    """Each pixel's color for `_blended`."""
    colored = (semantic.astype(np.int32) % colors + 1).astype(np.uint8)
    colored[semantic == VOID[str(semantic.dtype)]] = 0
    return colored
