"""``bentoml detectron demo``: from a predictor to the store and back to an annotated picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bentoml_detectron.errors import InvalidArgumentError

if TYPE_CHECKING:
    import numpy as np

SCORE_THRESHOLD = 0.6


@click.command("demo")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default="demo.png", show_default=True,
              help="Where to write the annotated picture.")  # fmt: skip
@click.option("--image", type=click.IntRange(0, 19), default=3, show_default=True, help="Which of the 20 sample images.")
def command(output: Path, image: int) -> None:
    """Save the demo model, load it back and detect handwritten digits.

    \b
    Example:
      bentoml detectron demo --image 7 --output digits.png
    """
    import numpy as np
    from PIL import Image

    from bentoml_detectron import demo, load_model, save_model

    saved = save_model("digits-demo", demo.predictor())
    click.echo(f"Saved {saved.tag}")
    path = demo.images()[image]
    pixels = np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]
    instances = load_model(saved.tag)(pixels)["instances"].to("cpu")
    instances = instances[instances.scores >= SCORE_THRESHOLD]
    click.echo(f"Loaded it back, and found {len(instances)} digits in {path.name}:\n")
    click.echo(f"{'digit':<7}{'score':>6}   {'box (x0, y0, x1, y1)':<28}{'pixels':>7}")
    for box, score, label, mask in _rows(instances):
        corners = ", ".join(f"{value:.0f}" for value in box)
        click.echo(f"{demo.CLASSES[label]:<7}{score:>6.2f}   {corners:<28}{int(mask.sum()):>7}")
    try:
        _draw(pixels, instances, demo.CLASSES).save(output)
    except OSError as exc:
        raise InvalidArgumentError(f"cannot write {output}: {exc}; give another --output", value=str(output)) from exc
    click.echo(f"\nWrote {output}")


def _rows(instances: Any) -> zip[tuple[Any, ...]]:
    return zip(
        instances.pred_boxes.tensor.numpy(), instances.scores.tolist(), instances.pred_classes.tolist(),
        instances.pred_masks.numpy(), strict=True,
    )  # fmt: skip


def _draw(pixels: np.ndarray[Any, Any], instances: Any, classes: tuple[str, ...]) -> Any:
    """The picture, four times as large, with boxes, masks and labels; `pixels` are BGR."""
    try:
        import supervision as sv
    except ModuleNotFoundError as exc:
        from bentoml.exceptions import MissingDependencyException

        raise MissingDependencyException("drawing needs supervision: pip install 'bentoml-detectron[draw]'") from exc
    import numpy as np
    from PIL import Image

    scale = 4
    scene = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1])).resize(
        (pixels.shape[1] * scale, pixels.shape[0] * scale), Image.Resampling.BICUBIC
    )
    detections = sv.Detections(
        xyxy=instances.pred_boxes.tensor.numpy() * scale,
        mask=instances.pred_masks.numpy().repeat(scale, 1).repeat(scale, 2),
        confidence=instances.scores.numpy(),
        class_id=instances.pred_classes.numpy(),
    )
    labels = [f"{classes[label]} {score:.2f}" for _, score, label, _ in _rows(instances)]
    scene = sv.MaskAnnotator().annotate(scene, detections)
    scene = sv.BoxAnnotator().annotate(scene, detections)
    return sv.LabelAnnotator(text_color=sv.Color.BLACK).annotate(scene, detections, labels)
