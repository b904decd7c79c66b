"""Nested lists, tuples and dicts of tensors as flat lists, so that one engine can run modules of any signature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch

from bentoml_detectron.engines.quantized import Quantized


def tensors(nested: Any) -> list[Any]:
    """The tensors in nested lists, tuples and dicts, in order.

    Raises:
        TypeError: Something else is in there.
    """
    if isinstance(nested, (torch.Tensor, Quantized)):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, (list, tuple)):
        raise TypeError(f"expected a tensor, not {type(nested).__name__}")
    return [tensor for each in nested for tensor in tensors(each)]


def rebuild(nested: Any) -> Callable[[list[torch.Tensor]], Any]:
    """A function that puts as many tensors as are in `nested` where these are in there."""

    def build(nested: Any, flat: Iterator[Any]) -> Any:
        if isinstance(nested, dict):
            return {name: build(each, flat) for name, each in nested.items()}
        if isinstance(nested, (list, tuple)):
            return type(nested)([build(each, flat) for each in nested])
        return next(flat)

    skeleton = build(nested, repeat(None))  # holds no tensors
    return lambda flat: build(skeleton, iter(flat))
