"""Detectron2's predictor behind FastAPI and uvicorn: ``python with_fastapi.py PORT``."""

from __future__ import annotations

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from shared import pixels, spell

from bentoml_detectron import demo

predictor = demo.predictor()
app = FastAPI()


@app.post("/predict")
def predict(image: UploadFile) -> list[dict[str, Any]]:  # not async: it runs in a thread, and the event loop stays free
    return spell(predictor(pixels(Image.open(image.file))))


@app.get("/readyz")
def ready() -> str:
    return "ready"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
