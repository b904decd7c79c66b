"""Detectron2's predictor behind LitServe: ``python with_litserve.py PORT``."""

from __future__ import annotations

import sys
from typing import Any

import litserve
import numpy as np
from PIL import Image
from shared import pixels, spell

from bentoml_detectron import demo


class Digits(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.predictor = demo.predictor()

    def decode_request(self, request):  # LitServe reads the annotation; without one, it takes forms
        return pixels(Image.open(request["image"].file))

    def predict(self, image: np.ndarray) -> dict[str, Any]:
        return self.predictor(image)

    def encode_response(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        return spell(output)


if __name__ == "__main__":
    server = litserve.LitServer(Digits(), accelerator="cpu", healthcheck_path="/readyz")
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
