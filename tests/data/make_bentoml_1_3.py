"""Wrote the models in bentoml_1_3/, with BentoML 1.3.22's own adapter.

Run in an empty folder, where BentoML 1.3.22 is installed beside Detectron2: ``BENTOML_HOME=$PWD/home python
make_bentoml_1_3.py``; then move ``home/models/old_*/*/`` here. The config names its weights by
the relative path ``model_final.pth``.
"""

import sys
from pathlib import Path

import torch
from bentoml._internal.frameworks import detectron as adapter
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support import small_cfg

cfg = small_cfg()
torch.manual_seed(13)
torch.save({"model": build_model(cfg).state_dict()}, "model_final.pth")
cfg.MODEL.WEIGHTS = "model_final.pth"
predictor = DefaultPredictor(cfg)
print(adapter.save_model("old_predictor", predictor))
print(adapter.save_model("old_module", predictor.model, config=cfg))
