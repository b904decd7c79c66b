"""The service's OpenAPI 3.1 document. Its schemas are those that the answers are tested against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bentoml_detectron import __version__
from bentoml_detectron.service.requests import MAX_CLASSES, MAX_TOP_K

_SCHEMA = "detections.schema.json"


def schema() -> dict[str, Any]:
    """The JSON Schema of `Detections.to_json`, published as ``docs/detections.schema.json``."""
    package = Path(__file__).parent.parent
    path = package / _SCHEMA
    if not path.is_file():  # an editable install
        path = package.parent.parent / "docs" / _SCHEMA
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def document(name: str, prefix: str = "") -> dict[str, Any]:
    """The document of a service of that name, whose paths have a prefix."""
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    detections = {"application/json": {"schema": {"$ref": "#/components/schemas/Detections"}}}
    found = schema()
    definitions = found.pop("$defs", {})
    found.pop("$schema", None)
    return {
        "openapi": "3.1.0",
        "info": {"title": name, "version": __version__, "description": "A Detectron2 model, served by bentoml-detectron."},
        "servers": [{"url": prefix or "/"}],
        "paths": {
            "/predict": {"post": _call("predict", "What the model detects on an image", detections, error)},
            "/render": {"post": _call("render", "The image with the detections drawn on it", {"image/jpeg": {}}, error)},
            "/info": {
                "get": {
                    "operationId": "info",
                    "summary": "Describe the model",
                    "responses": {
                        "200": {"description": "The model's description", "content": {"application/json": {"schema": _INFO}}},
                        **_errors(error, "401", "503"),
                    },
                }
            },
        },
        "components": {
            "schemas": {
                "Detections": _moved(found),
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "string", "description": "What went wrong, and how to fix it"}},
                },
                **{key: _moved(value) for key, value in definitions.items()},
            },
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


_INFO = {
    "type": "object",
    "required": ["precision"],
    "properties": {"precision": {"enum": ["fp32", "bf16", "fp16", "int8", "auto"]}},
}
# BentoML's clients send null for what was left out, and pages' forms an empty text.
_FIELDS: dict[str, dict[str, Any]] = {
    "score_threshold": {
        "type": ["number", "null", "string"],
        "maxLength": 0,
        "minimum": 0,
        "maximum": 1,
        "description": "Return only detections that score above it",
    },
    "classes": {
        "type": ["array", "null", "string"],
        "maxLength": 0,
        "items": {"type": "string"},
        "description": f"Names or ids of the classes to return, at most {MAX_CLASSES}",
    },
    "top_k": {
        "type": ["integer", "null", "string"],
        "maxLength": 0,
        "minimum": 1,
        "maximum": MAX_TOP_K,
        "description": "Return at most this many detections, the highest-scoring ones",
    },
    "masks": {"enum": ["rle", "polygon", "none"], "default": "rle", "description": "Format of the masks"},
}
_STATUSES = {
    "400": "The request or the image is malformed, or a field is out of range",
    "401": "The token is missing or wrong",
    "408": "The body took too long to arrive",
    "413": "The body or the image is too large, or the image needs more memory than there is",
    "415": "Neither a form nor an image in a supported format",
    "503": "Too many requests are waiting, or the model is not loaded; try again after Retry-After seconds",
    "504": "No answer within the service's time limit; try again",
}


def _call(operation: str, summary: str, answer: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    image = {"type": "string", "contentMediaType": "application/octet-stream", "description": "JPEG, PNG, WebP or BMP"}
    form = {"type": "object", "required": ["image"], "properties": {"image": image, **_FIELDS}, "additionalProperties": False}
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": field, "description": "For images sent as the body"}
            for name, field in _FIELDS.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": form},
                **{f"image/{kind}": {"schema": {}} for kind in ("jpeg", "png", "webp", "bmp")},
                "application/octet-stream": {"schema": {}},
            },
        },
        "responses": {"200": {"description": summary, "content": answer}, **_errors(error, *_STATUSES)},
    }


def _errors(error: dict[str, Any], *statuses: str) -> dict[str, Any]:
    return {status: {"description": _STATUSES[status], "content": error} for status in statuses}


def _moved(value: Any) -> Any:
    """The same schema, its definitions among the document's components."""
    if isinstance(value, dict):
        return {
            key: item.replace("#/$defs/", "#/components/schemas/") if key == "$ref" else _moved(item)
            for key, item in value.items()
        }
    return [_moved(item) for item in value] if isinstance(value, list) else value
