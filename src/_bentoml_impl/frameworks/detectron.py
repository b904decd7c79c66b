"""Where BentoML looks for the adapter behind ``bentoml.detectron``: the names of ``bentoml_detectron``, and nothing else.

Each import of ``bentoml.detectron`` runs this file again, so it holds none of its own; each name brings what it needs when it
is first used.
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
