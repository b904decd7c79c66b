"""How a worker gets its predictor: which models it refuses, in which precision it serves, and what it has run before."""

from __future__ import annotations

from typing import get_args

import bentoml
import pytest
import torch

from bentoml_detectron import demo, engines, model
from bentoml_detectron.engines import eager, has_bf16
from bentoml_detectron.errors import InvalidArgumentError, InvalidModelError
from bentoml_detectron.options import PRECISIONS
from bentoml_detectron.predictor import Predictor
from bentoml_detectron.service import Settings, loading
from support import built, run_python
from zoo import ZOO, zoo_config

needs_bf16 = pytest.mark.skipif(not has_bf16(), reason="the processor does not compute in bf16")
every_precision = pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
IMAGE = demo.images()[3]
FAMILIES = [
    pytest.param(lambda name=ZOO[label]: zoo_config(name), id=label)
    for label in ("Faster R-CNN, C4", "Mask R-CNN, FPN", "Cascade Mask R-CNN", "Keypoint R-CNN", "RetinaNet", "Panoptic FPN",
                  "RPN, FPN", "Semantic FPN", "Fast R-CNN, FPN")
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(demo_predictor) -> bentoml.Model:
    return bentoml.detectron.save_model("loading", demo_predictor)


@every_precision
def test_it_serves_what_load_predictor_gives(precision, saved):
    served = loading.load_tested(saved, Settings(precision=precision))
    assert served([IMAGE]) == bentoml.detectron.load_predictor(saved, precision=precision)([IMAGE])


@every_precision
@pytest.mark.slow
@pytest.mark.parametrize("make", FAMILIES)
def test_every_family_passes_its_self_test(make, precision):
    cfg = make()
    saved = bentoml.detectron.save_model("family", built(cfg), cfg)
    loading.warm_up(loading.load_tested(saved, Settings(precision=precision)))


@every_precision
def test_model_that_finds_something_else_is_refused(precision, saved, monkeypatch):
    def changed(*given):
        module = load(*given)
        with torch.no_grad():
            model.module_of(module).roi_heads.box_predictor.bbox_pred.bias.add_(1.0)
        return module

    load = model.load
    monkeypatch.setattr(model, "load", changed)
    with pytest.raises(InvalidModelError, match="fails its self-test: only"):
        loading.load_tested(saved, Settings(precision=precision))


def test_faster_model_that_finds_something_else_is_refused(saved, monkeypatch):
    def worse(graph, precision):
        run = compiled(graph, precision)
        return lambda inputs: [each * 1.2 for each in run(inputs)]

    compiled = eager.compiled
    monkeypatch.setattr(eager, "compiled", worse)
    monkeypatch.setitem(engines.TOLERANCES, "fp32", 1.0)
    with pytest.raises(InvalidModelError, match="fails its self-test: accelerated, only"):
        loading.load_tested(saved, Settings())


def test_precision_that_is_none_is_refused(saved):
    with pytest.raises(InvalidArgumentError, match="precision='fp8'"):
        loading.load_tested(saved, Settings(precision="fp8"))


def test_warm_up_runs_the_model_at_its_size(saved):
    class Noting(Predictor):
        def run(self, group, *given):
            shapes.extend(each.shape for each in group)
            return super().run(group, *given)

    shapes = []
    loaded = loading.load_tested(saved, Settings())
    loading.warm_up(Noting(loaded.model, loaded.input, loaded.dataset))
    assert shapes == [(192, 192)] * 2


def test_precisions_are_those_of_the_engines():
    """Written once more where PyTorch is not imported."""
    assert get_args(engines.Precision) == PRECISIONS


SHARES = """
import os, pathlib, sys, torch
from bentoml_detectron.service.loading import share_cores

cores = len(os.sched_getaffinity(0))

def shares():
    for workers in (1, 2, "cpu_count"):
        torch.set_num_threads(cores)
        share_cores(workers)
        yield torch.get_num_threads()

assert [*shares()] == [cores, max(1, cores // 2), 1]
os.environ["OMP_NUM_THREADS"] = "7"
assert [*shares()] == [cores] * 3  # as the user has it
del os.environ["OMP_NUM_THREADS"]
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
assert [*shares()] == [1, 1, 1]
"""


@pytest.mark.slow
def test_workers_divide_the_cores_that_a_container_has(monkeypatch, one_core):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run_python(SHARES, str(one_core))
