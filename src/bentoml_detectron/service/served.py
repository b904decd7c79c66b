"""The service of ``bentoml detectron serve``. Workers import this module; an environment variable says what to serve."""

from __future__ import annotations

import json
import os
from typing import Any

from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.service import SERVED_VARIABLE, Settings, get_service


def _service() -> Any:
    text = os.environ.get(SERVED_VARIABLE)
    if text is None:
        raise InvalidArgumentError(f"{SERVED_VARIABLE} is not set; start this service with: bentoml detectron serve TAG")
    told = json.loads(text)
    fields = {**told["settings"], "trusted": tuple(told["settings"]["trusted"])}
    return get_service(told["tag"], settings=Settings(**fields), workers=told["workers"])


service = _service()
