"""A saved model behind BentoML's legacy service, in a server of its own, asked over HTTP."""

from __future__ import annotations

import concurrent.futures
import os
import re
from pathlib import Path

import bentoml
import httpx
import pytest

from servers import served

pytestmark = pytest.mark.slow

SERVICE = """
import bentoml
import numpy as np
import PIL.Image
from bentoml.io import JSON, Image

runner = bentoml.models.get("served:latest").to_runner(max_latency_ms=10_000)
svc = bentoml.legacy.Service("digits", runners=[runner])


@svc.api(input=Image(), output=JSON())
async def predict(image: PIL.Image.Image):
    bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    (result,) = await runner.async_run([bgr]) if BATCHABLE else [await runner.async_run(bgr)]
    instances = result["instances"]
    return {
        "boxes": instances.pred_boxes.tensor.tolist(),
        "scores": instances.scores.tolist(),
        "classes": instances.pred_classes.tolist(),
        "mask_pixels": instances.pred_masks.sum((1, 2)).tolist(),
    }
"""


@pytest.mark.parametrize("batchable", [False, True], ids=["one", "batchable"])
def test_answers_are_the_predictors(batchable, demo_predictor, tmp_path):
    """Eight requests at once get what the predictor gives for each picture, and batchable ones meet in batches."""
    import numpy as np
    from PIL import Image

    from bentoml_detectron import demo

    signatures = {"__call__": {"batchable": True, "batch_dim": 0}} if batchable else None
    bentoml.detectron.save_model("served", demo_predictor, signatures=signatures)
    (tmp_path / "service.py").write_text(SERVICE.replace("BATCHABLE", str(batchable)))
    with served(tmp_path, Path(os.environ["BENTOML_HOME"]), "serve", "service:svc", "--host", "127.0.0.1") as server:
        paths = demo.images()[:8]

        def ask(path: Path) -> dict:
            answer = httpx.post(
                f"{server.url}/predict", files={"image": (path.name, path.read_bytes(), "image/jpeg")}, timeout=60
            )
            assert answer.status_code == 200, answer.text
            return answer.json()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, paths))
        for path, answer in zip(paths, answers, strict=True):
            bgr = np.ascontiguousarray(np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1])
            expected = demo_predictor(bgr)["instances"]
            assert len(answer["scores"]) == len(expected) > 0
            assert answer["classes"] == expected.pred_classes.tolist()
            assert np.allclose(answer["scores"], expected.scores.numpy(), atol=1e-5)
            assert np.allclose(answer["boxes"], expected.pred_boxes.tensor.numpy(), atol=1e-2)
            assert np.allclose(answer["mask_pixels"], expected.pred_masks.sum((1, 2)).numpy(), atol=2)
        if batchable:
            metrics = httpx.get(f"{server.url}/metrics", timeout=10).text
            total, count = (
                sum(float(value) for value in re.findall(rf"adaptive_batch_size_{kind}{{.*}} (\S+)", metrics))
                for kind in ("sum", "count")
            )
            assert total >= 8
            assert count < total, "every image went through the model alone"
