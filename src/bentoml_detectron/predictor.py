"""`Predictor`: from images to `Detections`, several images at a time, from any number of threads."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import psutil
import torch
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, SemanticSegmentor
from torch import nn

from bentoml_detectron import control_groups
from bentoml_detectron.artifact.manifest import Dataset, Input
from bentoml_detectron.errors import DetectronError, InvalidArgumentError, OutOfMemoryError
from bentoml_detectron.forward import Output, forward
from bentoml_detectron.images import ImageLike, Limits
from bentoml_detectron.model import device_of, usual_device
from bentoml_detectron.options import Options
from bentoml_detectron.outputs import Names, detections
from bentoml_detectron.preparation import Batch, Observe, Padding, Preparation, Prepared
from bentoml_detectron.results import Detections

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bentoml_detectron.engines import Precision

logger = logging.getLogger(__name__)

BYTES_PER_PIXEL = 3000
"""Memory that one pixel of a batch takes at the peak; ``benchmarks/bench_predictor.py`` measures some 300 to 2800."""
MOST_PIXELS_ON_CPU = 400_000
"""Most pixels in a batch on the CPU unless the user says otherwise: batches of small images are faster than one by one, batches
of large ones slower (``benchmarks/bench_predictor.py``)."""


class Predictor(Preparation):
    """A model that takes images and gives `Detections`; made by `load_predictor`.

    Threads may share it: a call changes nothing of it.

    Attributes:
        model: The Detectron2 model, in evaluation mode.
        dataset: Class names and ids; None where the model carries none.
        input: Channel order and size that the model takes.
        max_batch_pixels: As given.
        precision: In which `load_predictor` loaded it, of "auto" the one that was chosen; None of a model that was wrapped.
    """

    def __init__(
        self,
        model: nn.Module,
        image_input: Input,
        dataset: Dataset | None = None,
        *,
        batch: Batch = "padded",
        max_batch_pixels: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: In evaluation mode, on its device.
            image_input: Channel order and size that it takes.
            dataset: Class names and ids.
            batch: Which images go through the model together.

                - "padded": those whose padded shapes are the same. A shape is padded to the multiple that the model asks for,
                  for one image as for many, so none gets more padding than it would have alone. Models that ask for none (C4)
                  are padded to multiples of 32, at the right and below: scores there may differ from those of the image alone,
                  most for what touches these edges. And PyTorch's kernels round differently for batches of different sizes, by
                  some 1e-6 of a score (``benchmarks/bench_predictor.py``).
                - "exact": each on its own, since no other group gives what the image alone gives, bit for bit: the kernels for
                  two images of the same shape are not always those for one.
            max_batch_pixels: Most pixels, padding included, that go through the model together; a larger image goes alone.
                None: as many as half of the memory that is free takes, at `BYTES_PER_PIXEL` bytes each, and on the CPU no
                more than `MOST_PIXELS_ON_CPU`.
            limits: Of images, encoded or not; `images.Limits()` unless given.

        Raises:
            InvalidArgumentError: (``ValueError``) An argument is out of range.
        """
        if max_batch_pixels is not None and not (isinstance(max_batch_pixels, (int, np.integer)) and max_batch_pixels >= 1):
            raise InvalidArgumentError(
                f"max_batch_pixels is {max_batch_pixels!r}; it must be at least 1", value=max_batch_pixels
            )
        if dataset is not None and dataset.stuff_classes and isinstance(model, SemanticSegmentor):
            dataset = dataset.model_copy(update={"thing_classes": None})  # some datasets name things, too: ids are of stuff
        if dataset is not None and isinstance(model, ProposalNetwork):  # its proposals are of no class
            dataset = dataset.model_copy(update={"thing_classes": None, "stuff_classes": None})
        super().__init__(image_input, _padding(model), dataset, batch=batch, limits=limits)
        self.model = model
        self.max_batch_pixels = max_batch_pixels
        self.precision: Precision | None = None
        self._names = Names(dataset)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the thing classes, by contiguous id; of the stuff classes where there are only these."""
        return tuple(self._names.things or self._names.stuff)

    @overload
    def __call__(
        self,
        images: Sequence[ImageLike],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        top_k: int | None = None,
        errors: Literal["raise"] = "raise",
    ) -> list[Detections]: ...

    @overload
    def __call__(
        self,
        images: Sequence[ImageLike],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        top_k: int | None = None,
        errors: Literal["collect"],
    ) -> list[Detections | DetectronError]: ...

    def __call__(
        self,
        images: Sequence[ImageLike],
        *,
        score_threshold: float | None = None,
        classes: Sequence[str | int] | None = None,
        top_k: int | None = None,
        errors: Literal["raise", "collect"] = "raise",
    ) -> list[Detections] | list[Detections | DetectronError]:
        """Predicts on some images.

        Args:
            images: Each an encoded image's bytes, a path, a ``PIL.Image``, or an (H, W, 3) uint8 array in BGR.
            score_threshold: Keep detections that score above this, in [0, 1]. It replaces the model's own threshold, and may be
                lower. For panoptic models it also decides which things enter the map.
            classes: Keep only these classes, by name or contiguous id. They choose among what the model finds: its limit on
                the number of detections, and who covers whom in a panoptic map, are as without them.
            top_k: Keep at most this many detections an image, the highest scores first. It may exceed the model's own limit.
            errors: "raise" the error of the first image that cannot be used, or "collect" each in the image's place.

        Returns:
            One `Detections` an image, in their order. Of a model of none of Detectron2's tasks, its raw output.

        Raises:
            ImageError: An image cannot be used; `ImageError.index` is its place.
            InvalidArgumentError: (``ValueError``) Another argument is out of range, or the model has no such class.
            OutOfMemoryError: One image alone is more than the memory takes.
        """
        if isinstance(images, (str, bytes, bytearray, np.ndarray)) or not isinstance(images, Sequence):
            raise InvalidArgumentError(f"images must be a list, not {type(images).__name__}", value=type(images))
        if errors not in ("raise", "collect"):
            raise InvalidArgumentError(f"errors={errors!r}; give 'raise' or 'collect'", value=errors)
        wanted = self.options(score_threshold=score_threshold, classes=classes, top_k=top_k)
        results = self.predict(images, [wanted] * len(images))
        if errors == "raise":
            for result in results:
                if isinstance(result, DetectronError):
                    raise result
        return results

    def predict(self, images: Sequence[ImageLike], wanted: Sequence[Options]) -> list[Any]:
        """Predicts on some images with options for each; they share batches whatever their options.

        Args:
            images: As in `__call__`.
            wanted: One an image, from `options`.

        Returns:
            One `Detections` an image, in their order; a `DetectronError` in the place of one that could not be used.
        """
        results: list[Any] = [None] * len(images)

        def usable() -> Iterator[Prepared]:
            for index, (image, each) in enumerate(zip(images, wanted, strict=True)):
                try:
                    yield self.prepare(image, each, index)
                except DetectronError as exc:
                    results[index] = exc

        for group in self.groups(usable(), self.budget()):
            for prepared, result in zip(group, self.run(group), strict=True):
                results[prepared.index] = result
        return results

    def groups(self, images: Iterable[Prepared], budget: int) -> Iterator[list[Prepared]]:
        """Images that go through the model together, each as soon as there are enough; by their order and shapes alone.

        What waits for company is kept within the budget of pixels too, however many shapes there are.
        """
        waiting: dict[tuple[int, int], list[Prepared]] = {}
        for prepared in images:
            shape = prepared.shape
            waiting.setdefault(shape, []).append(prepared)
            if self.batch == "exact" or (len(waiting[shape]) + 1) * shape[0] * shape[1] > budget:
                yield waiting.pop(shape)
            elif sum(len(group) * height * width for (height, width), group in waiting.items()) > budget:
                yield waiting.pop(max(waiting, key=lambda each: len(waiting[each]) * each[0] * each[1]))
        yield from waiting.values()

    def budget(self) -> int:
        """Most pixels, padding included, that may go through the model together now."""
        if self.max_batch_pixels is not None:
            return self.max_batch_pixels
        device = device_of(self.model)
        most = MOST_PIXELS_ON_CPU if device.type == "cpu" else sys.maxsize
        return max(1, min(most, free_memory(device) // 2 // BYTES_PER_PIXEL))

    def run(self, group: Sequence[Prepared], observe: Observe = lambda stage, seconds: None) -> list[Any]:
        """Runs images of one padded shape through the model together; in halves, where that takes too much memory.

        Args:
            group: At least one image.
            observe: Is told how long the stages "forward" and "postprocess" took, in seconds.

        Returns:
            One `Detections` an image; a `DetectronError` in the place of one that failed.
        """
        start = time.perf_counter()
        outputs = None
        try:
            outputs = self._forward(group)
        except (MemoryError, RuntimeError) as exc:
            if not _is_out_of_memory(exc):
                raise
        # Here the exception is gone, and with it what it held.
        if outputs is None and len(group) == 1:
            return [_too_large(group[0])]
        if outputs is None:
            logger.warning("out of memory with %d images in a batch; continuing with half as many", len(group))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(group) // 2
            return [*self.run(group[:half], observe), *self.run(group[half:], observe)]
        between = time.perf_counter()
        results = []
        for each in group:
            results.append(self._result(outputs.pop(0), each))  # which leaves its memory to the rest
        for place, each in enumerate(group):
            if len(group) > 1 and isinstance(results[place], OutOfMemoryError):  # it may have been for the others' sake
                logger.warning("out of memory with the results of %d images; running one image alone", len(group))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                (results[place],) = self.run([each])
        observe("forward", between - start)
        observe("postprocess", time.perf_counter() - between)
        return results

    def _forward(self, group: Sequence[Prepared]) -> list[Output]:
        device = device_of(self.model)
        if type(self.model) is GeneralizedRCNN and self.model.proposal_generator is None:
            raise InvalidArgumentError(
                "the model needs precomputed box proposals with each image, and a predictor has none; call the model "
                "from load_model",
                value="GeneralizedRCNN",
            )
        with torch.inference_mode(), usual_device():
            inputs = [
                {"image": on_device(each.pixels, device), "height": each.size[0], "width": each.size[1]} for each in group
            ]
            return forward(self.model, inputs, [each.options for each in group])

    def _result(self, output: Output, prepared: Prepared) -> Any:
        divisor = getattr(getattr(self.model, "meta", None), "label_divisor", 1000)
        try:
            with torch.inference_mode(), usual_device():
                return detections(output, prepared.size, prepared.options, self._names, divisor)
        except DetectronError as exc:  # such as boxes that are no numbers; the others are not lost for it
            return exc
        except (MemoryError, RuntimeError) as exc:
            if not _is_out_of_memory(exc):
                raise
        return _too_large(prepared)


def _padding(model: nn.Module) -> Padding:
    """What a model's backbone asks for."""
    backbone = getattr(model, "backbone", None)
    square = (getattr(backbone, "padding_constraints", None) or {}).get("square_size", 0)
    return Padding(stride=getattr(backbone, "size_divisibility", 0), square=square)


def on_device(pixels: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """(h, w, 3) pixels as the model takes them, (3, h, w) float32; a GPU gets them while this thread goes on.

    Laid out as DefaultPredictor's tensor is, so that PyTorch picks the same kernels.
    """
    if device.type != "cuda":
        return torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))
    pinned = torch.empty(pixels.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    pinned.numpy()[:] = pixels  # PyTorch keeps it until the copy is done
    return pinned.to(device, non_blocking=True).permute(2, 0, 1).float()


def _too_large(prepared: Prepared) -> OutOfMemoryError:
    height, width = prepared.size
    return OutOfMemoryError(
        f"image {prepared.index}: {width}x{height} needs more memory than is available; use a smaller image, or free "
        "memory on this machine",
        value=prepared.size,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; of the CPU also within each control group that this process runs in."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for what comes next
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return max(0, min([int(psutil.virtual_memory().available), *control_groups.free_memory()]))


def _is_out_of_memory(exc: BaseException) -> bool:
    """Whether PyTorch, or Python, ran out of memory; for the CPU PyTorch has no class for it."""
    return isinstance(exc, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(exc)
