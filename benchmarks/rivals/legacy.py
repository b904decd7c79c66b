"""BentoML's own adapter behind a legacy service: ``bentoml serve legacy:service``, where ``theirs`` is what it saved."""

from __future__ import annotations

from typing import Any

import bentoml
from bentoml._internal.frameworks import detectron as adapter
from bentoml.io import JSON
from bentoml.io import Image as ImageInput
from PIL import Image
from shared import pixels, spell

model = bentoml.models.get("theirs:latest")
# Not model.to_runner(), which finds this package's adapter where it is installed.
runner = bentoml.legacy.Runner(adapter.get_runnable(model), name="theirs", models=[model])
service = bentoml.legacy.Service("theirs", runners=[runner])


@service.api(input=ImageInput(), output=JSON())
async def predict(image: Image.Image) -> list[dict[str, Any]]:
    return spell(await runner.async_run(pixels(image)))
