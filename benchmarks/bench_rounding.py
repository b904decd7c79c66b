"""What of bf16's rounding costs the demo model its accuracy, on any processor: float32, rounded where bf16 would round.

Rounded are the weights, norms put into them, of all convolutions and linear layers but the box predictor's, what these take and
give, blocks' sums and the pyramid's, and what RoIAlign reads and weighs with; once with convolutions' biases left as they are,
once with these rounded, too. Features are those of the backbone, on the 20 images that come with the package: error, root mean
square, by the features' own. AP is that of boxes and masks, in points, on those 20, and on images that the model's training
never saw.

Usage::

    python benchmarks/bench_rounding.py [--images 200]
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator

warnings.simplefilter("ignore")

import numpy as np
import torch
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn
from torch.nn import functional

import bench_precision  # which finds train_demo
import train_demo
from bentoml_detectron import Predictor, demo
from bentoml_detectron.artifact import config
from bentoml_detectron.engines.pooler import Pooler

FEW = 20
"""Images that come with the package; the first of all."""


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).float()


def layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module | None]]:
    """Those that are in bf16, with their norms."""
    for name, each in model.named_modules():
        if isinstance(each, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)) and "box_predictor" not in name:
            yield each, getattr(each, "norm", None)


def in_bf16(model: nn.Module, *, biases: bool) -> nn.Module:
    """The same model, rounded; `biases`: those of convolutions, too."""
    model = copy.deepcopy(model)
    for layer, norm in layers(model):
        if norm is None:
            layer.weight.data = rounded(layer.weight.data)
            if layer.bias is not None and (biases or isinstance(layer, nn.Linear)):
                layer.bias.data = rounded(layer.bias.data)
        else:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            layer.weight.data = rounded(layer.weight.data * scale[:, None, None, None]) / scale[:, None, None, None]
            bias = norm.bias - norm.running_mean * scale
            norm.bias.data = norm.bias.data + biases * (rounded(bias) - bias)
        layer.register_forward_pre_hook(lambda _, given: tuple(rounded(each) for each in given))
        layer.register_forward_hook(lambda _, given, found: rounded(found))
    for each in model.modules():
        if isinstance(each, BottleneckBlock):
            each.register_forward_hook(lambda _, given, found: rounded(found))
    model.backbone.forward = pyramid(model.backbone)
    for name in ("box_pooler", "mask_pooler"):
        pooler = Pooler(getattr(model.roi_heads, name))
        getattr(model.roi_heads, name).forward = lambda features, boxes, pooler=pooler: pooler(
            [each.to(torch.bfloat16) for each in features], boxes
        ).float()
    return model


def pyramid(fpn):
    """Its ``forward``, where each level's lateral convolution adds the level above it."""

    def forward(x: torch.Tensor) -> dict[str, torch.Tensor]:
        below, found, above = fpn.bottom_up(x), [], None
        for name, lateral, output in zip(reversed(fpn.in_features), fpn.lateral_convs, fpn.output_convs, strict=True):
            level = lateral(below[name])
            above = level if above is None else rounded(level + functional.interpolate(above, scale_factor=2.0))
            found.insert(0, output(above))
        found += fpn.top_block(found[-1])
        return dict(zip(fpn._out_features, found, strict=True))

    return forward


def features(model: nn.Module, images: list[np.ndarray]) -> list[torch.Tensor]:
    with torch.inference_mode():
        batches = [
            model.preprocess_image([{"image": torch.from_numpy(each.astype(np.float32)).permute(2, 0, 1)}]) for each in images
        ]
        return [level for batch in batches for level in model.backbone(batch.tensor).values()]


def error(found: list[torch.Tensor], due: list[torch.Tensor]) -> float:
    pairs = zip(found, due, strict=True)
    return float(np.mean([float((one - two).square().mean().sqrt() / two.square().mean().sqrt()) for one, two in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    count = parser.parse_args().images
    images = [image for _, image, _ in train_demo.test_images(count)]
    model, known = demo.predictor().model, config.input_of(demo.config())
    due = features(model, images[:FEW])
    models = {
        "nothing": model,
        "all but convolutions' biases": in_bf16(model, biases=False),
        "all": in_bf16(model, biases=True),
    }
    print(f"| rounded | features off by | box AP, {FEW} images | mask AP | box AP, {count} images | mask AP |")
    print("|---|---|---|---|---|---|")
    for name, each in models.items():
        predictor = Predictor(each, known, None, batch="exact")
        row = [100 * error(features(each, images[:FEW]), due)]
        for number in (FEW, count):
            found = bench_precision.aps(
                bench_precision.ground_truth(number), images[:number], lambda image, predictor=predictor: predictor([image])[0]
            )
            row += [found[0], found[3]]
        print(f"| {name} | {row[0]:.2f} % | {' | '.join(f'{value:.2f}' for value in row[1:])} |", flush=True)


if __name__ == "__main__":
    main()
