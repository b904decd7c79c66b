"""Results as Parquet: one row per detection, or one row per image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bentoml_detectron import results_json
from bentoml_detectron.dataset import parquet_source
from bentoml_detectron.dataset.prediction import Failure, Prediction, written
from bentoml_detectron.results import Detections

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP = 32_000_000  # bytes in memory
_COMPRESSION = "zstd"


class _Rows:
    """Rows of columns; a piece is a list of rows, a part a Parquet file."""

    def __init__(self, text_ids: bool) -> None:
        self._parquet = parquet_source.require()
        import pyarrow as pa

        image = [
            ("file_name", pa.string()),
            ("image_id", pa.string() if text_ids else pa.int64()),
            ("height", pa.int32()),
            ("width", pa.int32()),
        ]
        self._schema = pa.schema(image + self._columns(pa))

    def _columns(self, pa: Any) -> list[tuple[str, pa.DataType]]:
        raise NotImplementedError

    def _rows(self, found: Detections) -> list[dict[str, Any]]:
        raise NotImplementedError

    def piece(
        self, outcome: Prediction | Failure, position: int, image: str | bytes | None, path: Path
    ) -> list[dict[str, Any]] | None:
        if isinstance(outcome, Failure):
            return None
        found = outcome.detections
        height, width = found.image_size
        named = {"file_name": written(outcome.file_name), "image_id": outcome.image_id, "height": height, "width": width}
        return [{**named, **row} for row in self._rows(found)]

    def part(self, pieces: Sequence[list[dict[str, Any]] | None], path: Path) -> None:
        import pyarrow as pa

        rows = [row for piece in pieces for row in piece or ()]
        self._parquet.write_table(pa.Table.from_pylist(rows, self._schema), path, compression=_COMPRESSION)

    def join(self, parts: Iterable[Path], path: Path) -> None:
        import pyarrow as pa

        with self._parquet.ParquetWriter(path, self._schema, compression=_COMPRESSION) as writer:
            waiting: list[pa.Table] = []
            size = 0
            for part in parts:
                waiting.append(table := self._parquet.read_table(part))
                size += table.nbytes
                if size > _ROW_GROUP:
                    writer.write_table(pa.concat_tables(waiting))
                    waiting, size = [], 0
            if waiting:
                writer.write_table(pa.concat_tables(waiting))


class DetectionRows(_Rows):
    """One row a detection; an image on which nothing was found has none."""

    def _columns(self, pa: Any) -> list[tuple[str, pa.DataType]]:
        return [
            ("detection", pa.int32()),
            ("box", pa.list_(pa.float32())),
            ("score", pa.float32()),
            ("class_id", pa.int64()),
            ("class_name", pa.string()),
            ("category_id", pa.int64()),
            ("mask", pa.string()),
            ("keypoints", pa.list_(pa.float32())),
        ]

    def _rows(self, found: Detections) -> list[dict[str, Any]]:
        count = len(found)
        columns = {
            "detection": range(count),
            "box": found.boxes,
            "score": found.scores.tolist(),
            "class_id": found.class_ids.tolist(),
            "class_name": found.class_names,
            "category_id": [None] * count if found.category_ids is None else found.category_ids.tolist(),
            "mask": [None] * count if found.masks is None else [mask["counts"] for mask in found.masks],
            "keypoints": [None] * count if found.keypoints is None else [each.ravel() for each in found.keypoints],
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class ImageRows(_Rows):
    """One row an image, with all of `Detections`."""

    def _columns(self, pa: Any) -> list[tuple[str, pa.DataType]]:
        numbers = pa.list_(pa.float32())
        segment = [
            ("id", pa.int32()), ("class_id", pa.int64()), ("class_name", pa.string()), ("is_thing", pa.bool_()),
            ("area", pa.int64()), ("score", pa.float64()), ("category_id", pa.int64()), ("detection", pa.int64()),
        ]  # fmt: skip
        return [
            ("boxes", pa.list_(numbers)),
            ("scores", numbers),
            ("class_ids", pa.list_(pa.int64())),
            ("class_names", pa.list_(pa.string())),
            ("category_ids", pa.list_(pa.int64())),
            ("masks", pa.list_(pa.string())),
            ("keypoints", pa.list_(numbers)),
            ("panoptic_png", pa.binary()),
            ("panoptic_segments", pa.list_(pa.struct(segment))),
            ("semantic_png", pa.binary()),
        ]

    def _rows(self, found: Detections) -> list[dict[str, Any]]:
        keypoints = None if found.keypoints is None else [each.ravel() for each in found.keypoints]
        panoptic = found.panoptic
        return [
            {
                "boxes": list(found.boxes),
                "scores": found.scores,
                "class_ids": found.class_ids,
                "class_names": found.class_names,
                "category_ids": found.category_ids,
                "masks": None if found.masks is None else [mask["counts"] for mask in found.masks],
                "keypoints": keypoints,
                "panoptic_png": None if panoptic is None else results_json.panoptic_png(panoptic.ids),
                "panoptic_segments": None if panoptic is None else [asdict(each) for each in panoptic.segments],
                "semantic_png": None if found.semantic is None else results_json.png(np.asarray(found.semantic)),
            }
        ]
