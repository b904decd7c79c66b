"""Prepares images for a model: decodes and scales them, and computes their padded shape. It needs no PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image

from bentoml_detectron import images as pictures
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.errors import ImageError, InvalidArgumentError
from bentoml_detectron.images import ImageLike, Limits
from bentoml_detectron.options import Options, options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LEAST_STRIDE = 32  # pixels to which images are padded in groups, for models that ask for no multiple

Batch = Literal["padded", "exact"]
Observe = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image as the model takes it.

    Attributes:
        index: Its place in the call.
        pixels: (h, w, 3) uint8, in the model's own channel order and size.
        size: Height and width of the image that was given.
        shape: Height and width that it has in the model, padding included; images of one shape may run together.
        options: What is wanted of it.
    """

    index: int
    pixels: NDArray[np.uint8]
    size: tuple[int, int]
    shape: tuple[int, int]
    options: Options


@dataclass(frozen=True, slots=True)
class Padding:
    """To what a model pads images, at the right and below.

    Attributes:
        stride: A multiple of so many pixels along each side; 0 or 1 where it asks for none.
        square: A square of so many pixels a side, as ViTDet's; 0 where it asks for none.
    """

    stride: int = 0
    square: int = 0


class Preparation:
    """What a predictor does with an image before the model sees it; all of it by any number of threads.

    Attributes:
        input: Channel order and size that the model takes.
        padding: To what it pads.
        dataset: Class names and ids; None where the model carries none.
        batch: Which images go through the model together.
        limits: Of images, encoded or not.
    """

    def __init__(
        self,
        image_input: Input,
        padding: Padding,
        dataset: Dataset | None = None,
        *,
        batch: Batch = "padded",
        limits: Limits | None = None,
    ) -> None:
        """Takes what is known of a model.

        Args:
            image_input: Channel order and size that it takes.
            padding: To what it pads.
            dataset: Class names and ids.
            batch: As in `Predictor`.
            limits: Of images, encoded or not; `images.Limits()` unless given.

        Raises:
            InvalidArgumentError: (``ValueError``) An argument is out of range.
        """
        if batch not in ("padded", "exact"):
            raise InvalidArgumentError(f"batch={batch!r}; give 'padded' or 'exact'", value=batch)
        if image_input.format not in ("BGR", "RGB"):
            raise InvalidArgumentError(
                f"the model takes images as {image_input.format!r}, but the predictor supports only BGR and RGB",
                value=image_input.format,
            )
        if limits is not None and not isinstance(limits, Limits):
            raise InvalidArgumentError(f"limits must be bentoml.detectron.Limits, not {type(limits).__name__}", value=limits)
        self.input = image_input
        self.padding = padding
        self.dataset = dataset
        self.batch = batch
        self.limits = limits or Limits()

    def close(self) -> None:
        """Gives back what is held for the model elsewhere; here, nothing is."""

    def options(
        self,
        *,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        top_k: int | None = None,
    ) -> Options:
        """Checks what is wanted of one image; arguments and errors as in `Predictor.__call__`."""
        return options(self.dataset, score_threshold=score_threshold, classes=classes, top_k=top_k)

    def prepare(
        self,
        image: ImageLike,
        wanted: Options,
        index: int = 0,
        observe: Observe = lambda stage, seconds: None,
    ) -> Prepared:
        """Decodes an image and scales it to the model's size, as ``DefaultPredictor`` does.

        Args:
            image: As in `Predictor.__call__`.
            wanted: What is wanted of it.
            index: Its place in the call.
            observe: Is told how long the stages "decode" and "preprocess" took, in seconds.

        Raises:
            ImageError: It cannot be used.
        """
        start = time.perf_counter()
        picture, order = pictures.decoded(image, self.limits, index=index)
        between = time.perf_counter()
        observe("decode", between - start)
        height, width = picture.height, picture.width
        if self.input.min_size_test > 0:
            shape = self._scaled(height, width)
            if min(shape) < 1:
                raise ImageError(
                    f"{width}x{height} is too long and thin: scaled to the model's {self.input.max_size_test} pixels, "
                    "it has none left on its short side; crop it",
                    index=index,
                    value=(height, width),
                )
            # What Detectron2's ResizeTransform does with an array, which it makes a picture for it.
            picture = picture.resize(shape[::-1], Image.Resampling.BILINEAR)
        if 0 < self.padding.square < max(picture.size):  # Detectron2 would cut one, and fail with two
            raise ImageError(
                f"{width}x{height} is scaled to {picture.width}x{picture.height}, but the model takes at most "
                f"{self.padding.square} pixels per side; save it with a config that resizes to that",
                index=index,
                value=(height, width),
            )
        pixels = pictures.pixels(picture, swapped=order != self.input.format)
        prepared = Prepared(index, pixels, (height, width), self._padded(*pixels.shape[:2]), wanted)
        observe("preprocess", time.perf_counter() - between)
        return prepared

    def pixels_of(self, height: int, width: int) -> int:
        """Pixels, padding included, that an image of that size has in the model."""
        padded_height, padded_width = self._padded(*self._scaled(height, width))
        return padded_height * padded_width

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image of this one has in the model, without padding."""
        if self.input.min_size_test <= 0:
            return height, width
        return scaled(height, width, self.input.min_size_test, self.input.max_size_test)

    def _padded(self, *shape: int) -> tuple[int, int]:
        """The shape that an image of this one has in the model, as far as grouping goes."""
        if self.padding.square > 0:  # ViTDet
            return self.padding.square, self.padding.square
        stride = self.padding.stride if self.padding.stride > 1 else _LEAST_STRIDE
        height, width = (-(-length // stride) * stride for length in shape)
        return height, width


def scaled(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """The height and width in pixels to which an image of `height` times `width` pixels, 1 or more each, is scaled.

    Its shorter side gets `shortest` pixels, but its longer one no more than `longest`. Rounded as Detectron2's
    ``ResizeShortestEdge`` rounds, operation by operation.
    """
    factor = shortest / min(height, width)
    sides = (float(shortest), factor * width) if height < width else (factor * height, float(shortest))
    if max(sides) > longest:
        factor = longest / max(sides)
        sides = (sides[0] * factor, sides[1] * factor)
    return int(sides[0] + 0.5), int(sides[1] + 0.5)
