"""`draw`: the picture with what was found on it, by the supervision library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bentoml_detectron import images
from bentoml_detectron.errors import DependencyMissingError, InvalidArgumentError
from bentoml_detectron.images import ImageLike
from bentoml_detectron.results import VOID, Detections

if TYPE_CHECKING:
    import supervision as sv
    from numpy.typing import NDArray

__all__ = ["draw"]

OPACITY = 0.5


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
        InvalidArgumentError: (``ValueError``) The image is of another size.
    """
    try:
        import supervision as sv
    except ModuleNotFoundError as exc:
        raise DependencyMissingError("drawing needs supervision: pip install 'bentoml-detectron[draw]'") from exc
    scene: Any = np.array(images.load(image))
    if scene.shape[:2] != found.image_size:
        raise InvalidArgumentError(
            f"the image is {scene.shape[1]}x{scene.shape[0]}, the detections are on one of "
            f"{found.image_size[1]}x{found.image_size[0]}; draw on the image that they were found on",
            value=scene.shape[:2],
        )
    palette = sv.ColorPalette.DEFAULT
    _overlay(scene, found, np.array([color.as_bgr() for color in palette.colors], np.uint8))
    if not len(found):
        return np.asarray(scene, np.uint8)
    if found.boxes.shape[1] == 5:
        return np.asarray(_rotated(scene, found, palette), np.uint8)
    detections = found.to_supervision()
    if found.masks is not None and found.panoptic is None:
        scene = sv.MaskAnnotator(palette, OPACITY).annotate(scene, detections)
    scene = sv.BoxAnnotator(palette).annotate(scene, detections)
    if labels:
        scene = sv.LabelAnnotator(palette, text_color=sv.Color.BLACK).annotate(scene, detections, _labels(found))
    if found.keypoints is not None:
        points = sv.KeyPoints(xy=found.keypoints[:, :, :2].copy(), class_id=found.class_ids.copy())
        scene = sv.VertexAnnotator(color=sv.Color.GREEN).annotate(scene, points)
    return np.asarray(scene, np.uint8)


def _labels(found: Detections) -> list[str]:
    rows = zip(found.class_names, found.class_ids.tolist(), found.scores.tolist(), strict=True)
    return [f"{name or label} {score:.2f}" for name, label, score in rows]


def _overlay(scene: NDArray[np.uint8], found: Detections, colors: NDArray[np.uint8]) -> None:
    """Blends the colors of segments, or of a semantic map's classes, into the picture."""
    if found.panoptic is not None:
        table = np.zeros(max((segment.id for segment in found.panoptic.segments), default=0) + 1, np.int64)
        for segment in found.panoptic.segments:
            table[segment.id] = segment.class_id + (0 if segment.is_thing else len(colors) // 2)
        classes, known = table[found.panoptic.ids], found.panoptic.ids > 0
    elif found.semantic is not None:
        classes = found.semantic.astype(np.int64)
        known = classes != VOID[str(found.semantic.dtype)]
    else:
        return
    blended = (scene[known] * (1 - OPACITY) + colors[classes[known] % len(colors)] * OPACITY).astype(np.uint8)
    scene[known] = blended


def _rotated(scene: NDArray[np.uint8], found: Detections, palette: sv.ColorPalette) -> Any:
    """Outlines of rotated boxes, whose corners follow Detectron2's ``RotatedBoxes``: degrees counter-clockwise."""
    import supervision as sv

    x, y, width, height, angle = found.boxes.T.astype(np.float64)
    theta = np.deg2rad(angle)
    for row in range(len(found)):
        sides = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width[row] / 2, height[row] / 2]
        cosine, sine = np.cos(theta[row]), np.sin(theta[row])
        corners = sides @ np.array([[cosine, -sine], [sine, cosine]]) + [x[row], y[row]]
        color = palette.by_idx(int(found.class_ids[row]))
        scene = sv.draw_polygon(scene, corners.round().astype(np.int64), color)
    return scene
