"""``bentoml detectron save``: saves a model from a config file and weights to BentoML's model store."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bentoml_detectron.cli import options

if TYPE_CHECKING:
    from bentoml import Model

    from bentoml_detectron.from_files import Built

_SHOWN = 5  # names in a line


# As in Detectron2's own tools, all that comes after the first KEY are overrides, a value of -1 too.
@click.command("save", context_settings={"allow_interspersed_args": False})
@click.option("--config-file", required=True, metavar="FILE", type=click.Path(),
              help="The config: a .yaml file, a name from Detectron2's model zoo, or a LazyConfig's .py file.")  # fmt: skip
@click.option("--weights", metavar="FILE", type=click.Path(),
              help="The trained weights: .pth, or the model zoo's .pkl; by default, those named in the config.")  # fmt: skip
@click.option("--name", required=True, metavar="TAG", help="The saved model's name, or name:version.")
@click.option("--classes-from", metavar="FILE", type=click.Path(path_type=Path),
              help="A COCO annotation file to take the class names from.")  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Run the .py file of a LazyConfig.")
@click.argument("overrides", nargs=-1, metavar="[KEY VALUE]...")
def command(
    config_file: str,
    weights: str | None,
    name: str,
    classes_from: Path | None,
    trust_remote_code: bool,
    overrides: tuple[str, ...],
) -> None:
    """Save a model from a config file, weights and overrides, in the form that Detectron2's own tools take.

    Overrides come last: KEY VALUE pairs, or key=value for a LazyConfig. Nothing is downloaded, and no file is unpickled.

    \b
    Examples:
      bentoml detectron save --config-file output/config.yaml --weights output/model_final.pth --name street
      bentoml detectron save --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml \\
        --weights model_final_f10217.pkl --name mask_rcnn MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.5
      bentoml detectron save --config-file config.yaml --weights model.pth --name street --classes-from train.json
      bentoml detectron save --config-file retinanet.py --weights model.pth --name retinanet \\
        --trust-remote-code model.num_classes=10
    """
    from bentoml_detectron import imports, save_model

    with imports.for_less():
        from bentoml_detectron import from_files

    # What Detectron2 says of names and shapes is in the summary, or in the error.
    for library in ("detectron2", "fvcore"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "results will have no class names")  # the summary says so, with what helps here
        built = from_files.build(
            config_file, weights, overrides, classes_from=classes_from, trust_remote_code=trust_remote_code
        )
        saved = save_model(name, built.checkpointables, built.config)
    click.echo(f"Saved {saved.tag}")
    for label, text in _summary(saved, built):
        click.echo(f"  {label:<11} {text}")
    click.echo(f"\nNext: bentoml detectron serve {saved.tag}{options.trusting(built.untrusted)}")


def _summary(saved: Model, built: Built) -> list[tuple[str, str]]:
    """What was saved, as a label and a text a line."""
    from bentoml_detectron.artifact import manifest

    content = manifest.read(Path(saved.path))
    parameters = sum(each.numel() for each in built.module.parameters())
    size = sum(each.size for each in content.files.values())
    image = content.input
    classes = (content.dataset and (content.dataset.thing_classes or content.dataset.stuff_classes)) or []
    lines = [
        ("model", f"{type(built.module).__name__}, {parameters:,} parameters, {size / 1e6:,.1f} MB"),
        ("weights", str(built.weights)),
        ("input", f"{image.format}, shorter edge {image.min_size_test} pixels, longer at most {image.max_size_test}"),
        ("classes", f"{len(classes)}: {_some(classes)}" if classes else "unnamed; name them with --classes-from FILE"),
        ("self-test", "recorded" if content.self_test else "none: the model does not run on an image alone"),
    ]
    if built.unused:
        lines.append(("not used", f"{len(built.unused)} of the file's weights: {_some(built.unused)}"))
    return lines


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
