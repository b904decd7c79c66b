"""OpenVINO's kernels for the CPU.

Its threads are its own, beside PyTorch's: a part runs in the ones or in the others.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bentoml_detectron.engines.eager import Run, channels_last

if TYPE_CHECKING:
    import openvino

HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}
"""OpenVINO's names; what is not quantized in an int8 model is computed in bf16, where the processor has that."""


def is_installed() -> bool:
    """Whether OpenVINO can be imported."""
    return find_spec("openvino") is not None


class _ChannelsLast(nn.Module):
    """A graph whose four-dimensional tensors go in and out channels-last."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = [each.permute(0, 3, 1, 2) if each.ndim == 4 else each for each in inputs]
        return tuple(each.permute(0, 2, 3, 1) if each.ndim == 4 else each for each in self.graph(*given))


def converted(graph: nn.Module, inputs: Sequence[torch.Tensor], sizes: bool) -> openvino.Model:
    """A graph as OpenVINO's, for any number of images or boxes.

    Args:
        graph: Of tensors.
        inputs: An example of what it takes; float32.
        sizes: Whether heights and widths may be others too.

    Raises:
        Exception: OpenVINO has no equivalent for something in it.
    """
    import openvino as ov

    example = tuple(_given(each.float()) for each in inputs)
    with torch.no_grad():
        traced = torch.jit.trace(_ChannelsLast(graph).eval(), example, check_trace=False)  # type: ignore[no-untyped-call]
    model = ov.convert_model(torch.jit.freeze(traced), example_input=example)
    shapes = {}
    for port, each in zip(model.inputs, example, strict=True):
        shape = [-1, *each.shape[1:]]
        if sizes and each.ndim == 4:
            shape[1:3] = [-1, -1]
        shapes[port] = ov.PartialShape(shape)
    model.reshape(shapes)
    return model


def compiled(model: openvino.Model, precision: str, *, low_outputs: bool) -> Run:
    """Runs OpenVINO's model on as many threads as PyTorch has now.

    Args:
        model: From `converted`, or quantized.
        precision: One of `HINTS`.
        low_outputs: Whether outputs, and inputs where they come so, stay bfloat16; otherwise all are float32.
    """
    import openvino as ov

    options = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    program = ov.Core().compile_model(_typed(model, ov, low_outputs), "CPU", options)
    # A request is of one thread at a time; there are as many as threads that ever ran together.
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        try:
            request = requests.get_nowait()
        except queue.Empty:
            request = program.create_infer_request()
        try:
            held = [_given(each.to(torch.bfloat16) if port.get_element_type() == ov.Type.bf16 else each.float())
                    for port, each in zip(program.inputs, inputs, strict=True)]  # fmt: skip
            for place, each in enumerate(held):
                request.set_input_tensor(place, _shared(ov, each))
            request.infer()
            outputs = [_copied(ov, request.get_output_tensor(place)) for place in range(len(program.outputs))]
        finally:
            requests.put(request)
        return [each.permute(0, 3, 1, 2) if each.ndim == 4 else each for each in outputs]

    return run


def _typed(model: Any, ov: Any, low: bool) -> Any:
    """The model with the dtypes that it shall take and give; itself where these are float32."""
    if not low:
        return model
    typed = ov.preprocess.PrePostProcessor(model.clone())
    for place, port in enumerate(model.outputs):
        if port.get_element_type() == ov.Type.f32:
            typed.output(place).tensor().set_element_type(ov.Type.bf16)
    return typed.build()


def _given(tensor: torch.Tensor) -> torch.Tensor:
    return channels_last(tensor).permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor.contiguous()


def _shared(ov: Any, tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:  # NumPy has no such type
        return ov.Tensor(tensor.view(torch.int16).numpy(), ov.Shape(list(tensor.shape)), ov.Type.bf16)
    return ov.Tensor(tensor.numpy(), shared_memory=True)


def _copied(ov: Any, tensor: Any) -> torch.Tensor:
    """A copy: the request's own memory is used again."""
    if tensor.get_element_type() == ov.Type.bf16:
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())
