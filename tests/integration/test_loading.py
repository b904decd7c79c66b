"""How a worker gets its predictor: which models it refuses, in which precision it serves, and what it has run before."""

from __future__ import annotations

import os
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

if sys.argv[1]:
    pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
for workers in (1, 2, "cpu_count"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    share_cores(workers)
    print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_workers_divide_the_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_python(SHARES, "").stdout.split() == [str(cores), str(max(1, cores // 2)), "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # then they are as the user has it
    assert run_python(SHARES, "").stdout.split() == [str(cores)] * 3


@pytest.mark.slow
def test_a_worker_takes_no_more_threads_than_a_container_has_cores(monkeypatch, one_core):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_python(SHARES, str(one_core)).stdout.split() == ["1", "1", "1"]
