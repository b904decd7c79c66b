"""Every family of Detectron2's zoo that a pure-Python build can run: saved, loaded, and the same outputs bit for bit.

The configs are the zoo's own, made narrower, with random weights; see ``tests/zoo.py``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

import bentoml
import pytest
import torch
from detectron2.structures import Boxes, Instances

from support import assert_same, built, picture, run_python, tensors
from zoo import PROJECTS, ZOO, point_rend, zoo_config


def outputs(module: torch.nn.Module, precomputed_proposals: bool = False):
    """What a module makes of one fixed image; the image is fed to it in its own channel order."""
    image = torch.as_tensor(picture(128, 128).transpose(2, 0, 1).copy())
    request = {"image": image, "height": 120, "width": 130}
    if precomputed_proposals:
        corners = torch.tensor([[4.0, 4, 60, 70], [30, 20, 120, 110]])
        request["proposals"] = Instances((128, 128), proposal_boxes=Boxes(corners), objectness_logits=torch.zeros(2))
    torch.manual_seed(0)  # PointRend draws points in training alone; nothing else draws
    with torch.no_grad():
        return module([request])


def check(cfg, name: str) -> None:
    module = built(cfg)
    fast_rcnn = cfg.MODEL.LOAD_PROPOSALS
    expected = outputs(module, fast_rcnn)
    assert all(torch.isfinite(value.float()).all() for value in tensors(expected).values())
    saved = bentoml.detectron.save_model("family", module, cfg)
    try:
        assert_same(outputs(bentoml.detectron.load_model(saved), fast_rcnn), expected)
    finally:
        bentoml.models.delete(saved.tag)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO.values(), ids=ZOO.keys())
def test_zoo_family(name):
    check(zoo_config(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("config", PROJECTS.values(), ids=PROJECTS.keys())
def test_project(config):
    check(config(), config.__name__)


@pytest.mark.slow
def test_project_loads_in_a_process_that_did_not_import_it():
    """The manifest names the modules of Detectron2 that define the model's parts, and loading imports those."""
    cfg = point_rend()
    saved = bentoml.detectron.save_model("project", built(cfg), cfg)
    code = "import bentoml, sys; m = bentoml.detectron.load_model(sys.argv[1]); print(type(m.roi_heads.mask_head).__module__)"
    assert run_python(code, str(saved.tag)).stdout.strip() == "detectron2.projects.point_rend.mask_head"


def test_what_needs_compiled_ops_says_so():
    """Rotated boxes need them; the pure build names the op and the official install line."""
    from detectron2.layers import nms_rotated

    if not importlib.metadata.version("detectron2").endswith("+pure"):
        pytest.skip("this Detectron2 has its compiled ops")
    with pytest.raises(ImportError, match=r"nms_rotated.*git\+https://github.com/facebookresearch/detectron2"):
        nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)
