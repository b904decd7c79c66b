"""Imports of PyTorch and Detectron2 for less: what is put off, and that it is there when it is asked for."""

from __future__ import annotations

import gc

import pytest

from bentoml_detectron import imports
from support import run_python

LOADED = """
import sys
{}
from bentoml_detectron import demo, load_predictor
assert len(load_predictor("digits")([demo.images()[0].read_bytes()])[0])
print("torch._dynamo" in sys.modules, "torch._dynamo.utils" in sys.modules)
"""
ASKED = """
import sys
from bentoml_detectron import imports

class Meanwhile:
    def find_spec(self, name, path, target=None):
        if name == "torchvision.ops":
            {}

sys.meta_path.insert(0, Meanwhile())
with imports.for_less():
    import torchvision.ops
import torch
from torch._dynamo.utils import is_compile_supported
from torchvision.ops import roi_align
assert "__file__" in vars(sys.modules["torch._dynamo.utils"])
assert torch._dynamo.utils.is_compile_supported is is_compile_supported
module = sys.modules["torchvision.ops.roi_align"]
print(*(module.is_compile_supported(each) == is_compile_supported(each) for each in ("cpu", "cuda", "meta")))
torch._dynamo.reset()
compiled = torch.compile(lambda x, boxes: roi_align(x, [boxes], 2), backend="eager")
x, boxes = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
assert torch.equal(compiled(x, boxes), roi_align(x, [boxes], 2))
"""


@pytest.mark.parametrize("is_enabled", [True, False])
def test_collector_rests_only_meanwhile(is_enabled):
    before = gc.isenabled()
    try:
        (gc.enable if is_enabled else gc.disable)()
        with pytest.raises(KeyError), imports.for_less():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == is_enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", "import torchvision", "import torch._dynamo"])
def test_model_predicts_without_the_compiler_unless_it_was_there(digits_home, before):
    assert run_python(LOADED.format(before), BENTOML_HOME=str(digits_home)).stdout.split() == [str(bool(before))] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "meanwhile",
    [
        "pass",
        "from torch._dynamo.utils import counters",
        "import torch._dynamo",
        "import torch._dynamo.utils as utils; utils.counters",
    ],
)
def test_compiler_is_there_when_it_is_asked_for_also_by_others_meanwhile(meanwhile):
    assert run_python(ASKED.format(meanwhile)).stdout.split() == ["True"] * 3
