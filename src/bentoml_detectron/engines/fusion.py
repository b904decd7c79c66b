"""Convolutions that also add and rectify, instead of doing so in passes of their own over memory.

PyTorch has such operators for its compiler, for x86 processors (oneDNN's post-ops). In bf16 a pass over a feature map can take
as long as the convolution that made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from detectron2.layers import Conv2d
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import nn
from torch.nn import functional

from bentoml_detectron.engines.packed import Packed
from bentoml_detectron.engines.quantized import Quantized, mapped

Computes: TypeAlias = Callable[[Any, bool, Any], Any]
"""Computes a convolution of its first argument, rectified or not, plus the third, which may be overwritten."""
CONVOLUTIONS = (Conv2d, nn.Conv2d)
"""Detectron2's and PyTorch's; subclasses may compute something else."""
_COMPUTES, _PACKED, _BIAS = "_computes", "_packed", "_float_bias"  # attributes of convolutions
_LAYOUTS = 2
"""Of a convolution's weights that are kept beside the plain ones."""
_BLOCKS = (BasicBlock, BottleneckBlock)
_OPERATORS = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight", "_get_mkldnn_serialized_md")


def is_there() -> bool:
    """Whether this PyTorch has the operators."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and all(hasattr(torch.ops.mkldnn, name) for name in _OPERATORS)


def fuse(module: nn.Module) -> nn.Module:
    """Lets the convolutions of a module do what follows them; changes it and gives it back.

    Modules get other ``forward`` functions and stay where they are, since Detectron2 keeps some in lists beside.
    """
    each: Any
    following = set(_following_blocks(module))
    for each in list(module.modules()):
        if type(each) is BottleneckBlock and all(_is_plain(conv) for conv in (each.conv1, each.conv2, each.conv3)):
            each.forward = partial(_residual, each, (each.conv1, each.conv2), each.conv3, each in following)
        elif type(each) is BasicBlock and all(_is_plain(conv) for conv in (each.conv1, each.conv2)):
            each.forward = partial(_residual, each, (each.conv1,), each.conv2, each in following)
        elif type(each) is FPN and all(_is_plain(conv) for conv in (*each.lateral_convs, *each.output_convs)):
            for conv in each.output_convs:
                conv.forward = partial(convolved, conv)
            each.forward = partial(_pyramid, each)
        elif type(each) is BasicStem and _is_plain(each.conv1):
            each.forward = partial(_stem, each)
        elif isinstance(each, nn.Sequential):
            children = list[Any](each)
            for first, then in pairwise(children):
                _follow(first, then)
            for three in zip(children, children[1:], children[2:], strict=False):
                if _enlarges(*three):
                    _predict_before_enlarging(*three)
        elif type(each) is Conv2d and isinstance(each.activation, nn.ReLU) and is_convolution(each):
            each.forward = partial(convolved, each, relu=True)
    for each in module.modules():
        if type(each) in CONVOLUTIONS and not is_fused(each):
            _keep_from_one_column(each)
    return module


def _following_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Blocks of a stage that take what the block before them has made, and nobody else takes."""
    for stage in module.modules():
        if isinstance(stage, nn.Sequential):
            yield from (then for first, then in pairwise(stage) if type(first) in _BLOCKS and type(then) in _BLOCKS)


def _follow(first: Any, then: Any) -> None:
    """Lets the first of two modules do some of what the next one does."""
    if _is_plain(first) and type(then) is nn.ReLU:
        first.forward = partial(convolved, first, relu=True)
        _skip(then)
    elif type(first) is nn.Flatten and isinstance(then, nn.Linear) and (first.start_dim, first.end_dim) == (1, -1):
        _flatten_channels_last(first, then)


def _skip(module: Any) -> None:
    module.forward = _same


def _same(x: Any) -> Any:
    return x


def is_skipped(module: Any) -> bool:
    """Whether what is before a module does what it did."""
    return module.forward is _same


def is_fused(module: Any) -> bool:
    """Whether a module's convolutions do what follows them."""
    return isinstance(module.forward, partial)


@lru_cache
def adds_float_biases() -> bool:
    """Whether a convolution in bf16 may add a bias in float32 to its sums, which are float32, too."""
    x, weight = torch.ones(1, 16, 2, 2, dtype=torch.bfloat16), torch.full((16, 16, 1, 1), -1 / 16, dtype=torch.bfloat16)
    bias = torch.full((16,), 1 + 2**-12)  # 1, in bf16
    try:
        with torch.inference_mode():
            y = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [0, 0], [1, 1], [1, 1], 1, "none", [], "")
    except RuntimeError:
        return False
    return bool((y == 2**-12).all())


def keep_float_biases(module: nn.Module) -> None:
    """Lets fused convolutions add their biases in float32, also when all else is bf16 from now on.

    A norm's mean, which a bias has in it, may be many times what is left when it is taken away. A rounding of it is the same on
    all of a map, and does not average out as that of its pixels does.
    """
    for conv in module.modules():
        if type(conv) in CONVOLUTIONS and isinstance(conv.bias, torch.Tensor):
            conv.__dict__[_BIAS] = conv.bias.detach().float().clone()


def compute_by(conv: nn.Module, computes: Computes) -> None:
    """Has a fused convolution computed in another way."""
    conv.__dict__[_COMPUTES] = computes


def _flatten_channels_last(flatten: Any, linear: Any) -> None:
    """Flattens what is channels-last as it lies, without a copy; the first call puts the weights into that order."""
    is_permuted = False

    def flat(x: torch.Tensor) -> torch.Tensor:
        nonlocal is_permuted
        if x.ndim != 4:
            return x.flatten(1)
        if not is_permuted:  # by the call that tries the part, before any thread shares it
            weight = linear.weight.view(len(linear.weight), *x.shape[1:])
            linear.weight = nn.Parameter(weight.permute(0, 2, 3, 1).flatten(1).contiguous(), requires_grad=False)
            is_permuted = True
        return x.permute(0, 2, 3, 1).flatten(1)

    flatten.forward = flat


def _enlarges(deconv: Any, relu: Any, predictor: Any) -> bool:
    """Whether they are the end of a mask head: each pixel becomes a square of pixels of its own, rectified and classified."""
    return (
        type(deconv) is nn.ConvTranspose2d
        and deconv.kernel_size == deconv.stride
        and (deconv.padding, deconv.output_padding, deconv.dilation, deconv.groups) == ((0, 0), (0, 0), (1, 1), 1)
        and type(relu) is nn.ReLU
        and _is_plain(predictor)
        and (predictor.kernel_size, predictor.stride, predictor.padding) == ((1, 1), (1, 1), (0, 0))
    )


def _predict_before_enlarging(deconv: Any, relu: Any, predictor: Any) -> None:
    """Computes the squares' pixels as channels, classifies them there, and puts only the classes' maps where they go."""
    rows, columns = deconv.kernel_size
    within, channels = deconv.in_channels, deconv.out_channels
    # On no device: random weights, which are not needed, would take numbers from the caller's generator.
    pixels = nn.Conv2d(within, rows * columns * channels, 1, bias=deconv.bias is not None, device="meta")
    weight = deconv.weight.permute(2, 3, 1, 0).reshape(-1, within, 1, 1)  # by row, column and channel of the square
    pixels.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if deconv.bias is not None:
        pixels.bias = nn.Parameter(deconv.bias.detach().repeat(rows * columns), requires_grad=False)
    deconv.pixels = pixels  # so that it gets the type and layout of the rest
    deconv.weight = deconv.bias = None

    def enlarged(x: torch.Tensor) -> torch.Tensor:
        """The squares in a row each, (N, C, H, W * rows * columns)."""
        y = in_floats(pixels, x, relu=True, add=None).permute(0, 2, 3, 1)
        return y.reshape(len(x), x.shape[2], x.shape[3] * rows * columns, channels).permute(0, 3, 1, 2)

    def predicted(x: torch.Tensor) -> torch.Tensor:
        count, _, height, width = x.shape
        width //= rows * columns
        y = in_floats(predictor, x, relu=False, add=None).permute(0, 2, 3, 1)
        y = y.reshape(count, height, width, rows, columns, predictor.out_channels).transpose(2, 3)
        return y.reshape(count, height * rows, width * columns, predictor.out_channels).permute(0, 3, 1, 2)

    deconv.forward = enlarged
    _skip(relu)
    predictor.forward = predicted


def is_convolution(module: Any) -> bool:
    """Whether it is a convolution over zeros, with nothing between it and its activation."""
    return (
        type(module) in CONVOLUTIONS
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and getattr(module, "norm", None) is None
    )


def _is_plain(module: Any) -> bool:
    return is_convolution(module) and getattr(module, "activation", None) is None


def convolved(conv: Any, x: Any, relu: bool = False, add: Any = None) -> Any:
    """A convolution, plus another tensor, which may be overwritten, rectified; in the way that was set for it."""
    computes: Computes | None = conv.__dict__.get(_COMPUTES)
    if computes is not None:
        return computes(x, relu, add)
    x, add = (each.to(conv.weight.dtype) if isinstance(each, Quantized) else each for each in (x, add))
    return in_floats(conv, x, relu, add)


def in_floats(conv: Any, x: torch.Tensor, relu: bool, add: torch.Tensor | None) -> torch.Tensor:
    """A convolution in the type of its weights; what is added gets the result."""
    if not x.numel():
        y = functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y  # there is nothing to add to
    if _has_one_column(conv, x):
        y = in_floats(conv, _with_another(conv, x), relu, None if add is None else functional.pad(add, (0, 1)))
        return _first_column(y)
    packed: Packed = conv.__dict__.get(_PACKED) or conv.__dict__.setdefault(_PACKED, _packed(conv))
    how = (packed.of(x.shape), conv.__dict__.get(_BIAS, conv.bias), conv.padding, conv.stride, conv.dilation, conv.groups)
    result: torch.Tensor
    if add is None:
        result = torch.ops.mkldnn._convolution_pointwise(x, *how, "relu" if relu else "none", [], "")
    else:
        add = add.contiguous(memory_format=torch.channels_last)  # as it is already, but for maps of a pixel
        result = torch.ops.mkldnn._convolution_pointwise_(add, x, *how, "add", 1.0, "relu" if relu else None, [], None)
    return result


def _packed(conv: Any) -> Packed:
    how = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def pack(size: torch.Size) -> torch.Tensor:
        weight: torch.Tensor = torch.ops.mkldnn._reorder_convolution_weight(conv.weight, *how, list(size))
        return weight

    return Packed(pack, conv.weight, _LAYOUTS)


def _has_one_column(conv: Any, x: torch.Tensor) -> bool:
    """Whether oneDNN's kernel would give numbers out of the blue.

    Those for bf16 and AMX do where windows have strides and the output is one pixel wide and many high, in PyTorch's own
    convolution, too. So such inputs get more zeros on the right.
    """
    if x.dtype != torch.bfloat16 or x.ndim != 4 or max(conv.stride) == 1 or max(conv.kernel_size) == 1:
        return False
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    window = conv.dilation[1] * (conv.kernel_size[1] - 1) + 1
    return bool((x.shape[3] + 2 * conv.padding[1] - window) // conv.stride[1] == 0)


def _with_another(conv: Any, x: torch.Tensor) -> torch.Tensor:
    """The input, wide enough for another column of output."""
    return functional.pad(x, (0, conv.stride[1]))


def _first_column(y: torch.Tensor) -> torch.Tensor:
    return y[..., :1].contiguous(memory_format=torch.channels_last)


def _keep_from_one_column(conv: Any) -> None:
    """Lets a convolution that is not fused see to it itself."""
    own = conv.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not _has_one_column(conv, x):
            result: torch.Tensor = own(x)
            return result
        how = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return followed(conv, _first_column(functional.conv2d(_with_another(conv, x), conv.weight, conv.bias, *how)))

    conv.forward = forward


def followed(conv: Any, y: torch.Tensor) -> torch.Tensor:
    """What Detectron2's convolution makes of what it has computed: its norm and its activation, if it has these."""
    for then in (getattr(conv, "norm", None), getattr(conv, "activation", None)):
        y = y if then is None else then(y)
    return y


def _residual(block: Any, first: tuple[Any, ...], last: Any, owns: bool, x: Any) -> Any:
    """As a block's ``forward``; `owns` what it takes, which it may overwrite."""
    take = getattr(first[0].__dict__.get(_COMPUTES), "taken", None)
    x = x if take is None else take(x)  # once for the two that take it
    y = x
    for conv in first:
        y = convolved(conv, y, relu=True)
    shortcut = block.shortcut
    if shortcut is None:
        add = x if owns else mapped(torch.clone, x)
    else:
        add = convolved(shortcut, x) if _is_plain(shortcut) else mapped(torch.clone, shortcut(x))
    return convolved(last, y, relu=True, add=add)


def _pyramid(fpn: Any, x: torch.Tensor) -> dict[str, Any]:
    """As ``FPN.forward``: each level's lateral convolution adds the level above it, made twice as large."""
    below = fpn.bottom_up(x)
    results: list[Any] = []
    above: Any = None
    for name, lateral, output in zip(reversed(fpn.in_features), fpn.lateral_convs, fpn.output_convs, strict=True):
        if above is not None:
            above = mapped(_doubled, above)
        above = convolved(lateral, below[name], add=above)
        if results and fpn._fuse_type == "avg":
            above = above.halved() if isinstance(above, Quantized) else above / 2
        results.insert(0, output(above))
    if fpn.top_block is not None:
        name = fpn.top_block.in_feature
        top = below[name] if name in below else results[fpn._out_features.index(name)]
        if type(fpn.top_block) is LastLevelMaxPool:
            results.append(mapped(_every_other, top))
        else:
            results += fpn.top_block(top.to(next(fpn.top_block.parameters()).dtype) if isinstance(top, Quantized) else top)
    return dict(zip(fpn._out_features, results, strict=True))


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")


def _every_other(x: torch.Tensor) -> torch.Tensor:
    """As ``LastLevelMaxPool``, whose window is one pixel."""
    return x[:, :, ::2, ::2]


def _stem(stem: Any, x: torch.Tensor) -> torch.Tensor:
    y = convolved(stem.conv1, x, relu=True)
    if y.dtype == torch.bfloat16:
        return _largest_of_rectified(y)
    return functional.max_pool2d(y, kernel_size=3, stride=2, padding=1)


def _largest_of_rectified(x: torch.Tensor) -> torch.Tensor:
    """The stem's pooling of what is at least 0: as integers, which have the same order, and are compared faster."""
    numbers = x.permute(0, 2, 3, 1).view(torch.int16)
    return _along(_along(numbers, 1), 2).view(x.dtype).permute(0, 3, 1, 2)


def _along(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest of each second number along an axis and of those beside it."""
    whole = numbers.shape[dim]
    largest = numbers.new_empty([*numbers.shape[:dim], (whole + 1) // 2, *numbers.shape[dim + 1 :]])
    into, even, odd = largest.transpose(0, dim), numbers.transpose(0, dim)[::2], numbers.transpose(0, dim)[1::2]
    torch.maximum(even[: len(odd)], odd, out=into[: len(odd)])
    into[len(odd) :] = even[len(odd) :]
    torch.maximum(into[1:], odd[: len(into) - 1], out=into[1:])
    return largest
