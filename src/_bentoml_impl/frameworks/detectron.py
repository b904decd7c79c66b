"""The adapter behind ``bentoml.detectron``, where BentoML looks for it: the names of ``bentoml_detectron`` only.

Each import of ``bentoml.detectron`` runs this file again, so it holds no state. Each name imports what it needs when it is
first used.
"""

from typing import TYPE_CHECKING, Any

import bentoml_detectron

if TYPE_CHECKING:
    from bentoml_detectron import *  # noqa: F403

__all__ = bentoml_detectron.__all__


def __getattr__(name: str) -> Any:
    return getattr(bentoml_detectron, name)


def __dir__() -> list[str]:
    return list(__all__)
