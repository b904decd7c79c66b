"""The example of BentoML's own documentation, as its users have it, in a fresh interpreter."""

from __future__ import annotations

import pytest

from support import run_python

pytestmark = pytest.mark.slow

EXAMPLE = """
import bentoml
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
model_url = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
cfg = get_cfg()
cfg.merge_from_file(model_zoo.get_config_file(model_url))
cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.5
cfg.MODEL.WEIGHTS = CHECKPOINT
cloned = cfg.clone()
cloned.MODEL.DEVICE = "cpu"
predictor = DefaultPredictor(cloned)
bento_model = bentoml.detectron.save_model("mask_rcnn", predictor)
loaded_predictor = bentoml.detectron.load_model("mask_rcnn:latest")
model_ref = bentoml.detectron.get("mask_rcnn:latest")
"""
MAKE_CHECKPOINT = """
import sys, torch
from detectron2 import model_zoo
from detectron2.modeling import build_model
cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
cfg.MODEL.DEVICE = "cpu"
torch.save({"model": build_model(cfg).state_dict()}, sys.argv[1])
"""
CHECKS = """
import torch
assert bentoml.detectron.save_model.__module__.startswith("bentoml_detectron")
assert model_ref.tag == bento_model.tag
assert type(loaded_predictor) is DefaultPredictor
state = predictor.model.state_dict()
assert all(torch.equal(value, state[name]) for name, value in loaded_predictor.model.state_dict().items())
print("done")
"""


def test_example_runs_as_it_stands_without_a_deprecation_warning(tmp_path):
    checkpoint = tmp_path / "model_final.pth"
    run_python(MAKE_CHECKPOINT, str(checkpoint))
    code = "import warnings\nwarnings.simplefilter('always')\n" + EXAMPLE.replace("CHECKPOINT", repr(str(checkpoint))) + CHECKS
    result = run_python(code, BENTOML_HOME=str(tmp_path / "home"))
    assert result.stdout.strip().endswith("done")
    assert "BentoMLDeprecationWarning" not in result.stderr
    ours = [line for line in result.stderr.splitlines() if "Warning" in line and "bentoml_detectron" in line]
    assert not ours
