"""``bentoml detectron demo``: saves the demo model, loads it back, and draws what it finds on a sample image."""

from __future__ import annotations

from pathlib import Path

import click

from bentoml_detectron.errors import InvalidArgumentError

SCORE_THRESHOLD = 0.6
SCALE = 4


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
    from PIL import Image

    from bentoml_detectron import demo, draw, load_predictor, masks, save_model

    if not output.absolute().parent.is_dir():
        raise InvalidArgumentError(
            f"there is no folder {output.parent}; create it, or give another --output", value=str(output)
        )
    if output.suffix.lower() not in Image.registered_extensions():
        raise InvalidArgumentError(
            f"{output} is not the name of an image file; give one, as --output found.png", value=str(output)
        )
    saved = save_model("digits-demo", demo.predictor())
    click.echo(f"Saved {saved.tag}")
    path = demo.images()[image]
    small = Image.open(path).convert("RGB")
    # As large as looks good; the model scales it back to its own size.
    picture = small.resize((small.width * SCALE, small.height * SCALE), Image.Resampling.BICUBIC)
    found = load_predictor(saved)([picture], score_threshold=SCORE_THRESHOLD)[0]
    click.echo(f"Loaded it back, and found {len(found)} digits in {path.name}, {SCALE} times enlarged:\n")
    click.echo(f"{'digit':<7}{'score':>6}   {'box (x0, y0, x1, y1)':<28}{'pixels':>7}")
    for name, score, box, mask in zip(found.class_names, found.scores, found.boxes, found.masks or [], strict=True):
        corners = ", ".join(f"{value:.0f}" for value in box)
        click.echo(f"{name:<7}{score:>6.2f}   {corners:<28}{masks.area(mask):>7}")
    try:
        Image.fromarray(draw(picture, found)[:, :, ::-1]).save(output)
    except OSError as exc:
        raise InvalidArgumentError(f"cannot write {output}: {exc}; give another --output", value=str(output)) from exc
    click.echo(f"\nWrote {output}")
