"""An evaluation as tables: its metrics, overall and by class, and how far it is from another evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bentoml_detectron.evaluation.comparison import Comparison, Difference
from bentoml_detectron.evaluation.statistics import Evaluation

__all__ = ["Table", "tables"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts: the first column's are on the left, all others on the right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = [self.title]
        for first, *others in (self.header, *self.rows):
            cells = [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(others, widths[1:], strict=True))]
            lines.append("  ".join(cells))
        return "\n".join(lines)


def tables(evaluation: Evaluation, comparison: Comparison | None = None) -> Iterator[Table]:
    """A table of all tasks' metrics and one of each task's classes; of a comparison one more each."""
    metrics = dict.fromkeys(metric for task in evaluation.tasks.values() for metric in task.metrics)
    over_all = tuple(
        (each, *(_number(task.metrics.get(each, math.nan)) for task in evaluation.tasks.values())) for each in metrics
    )
    yield Table(f"all classes, {len(evaluation.images)} images", ("", *evaluation.tasks), over_all)
    for name, task in evaluation.tasks.items():
        rows = tuple((each, *map(_number, values), f"{count:,}") for each, values, count in task.rows())
        yield Table(f"{name}, by class", ("class", *task.columns, task.unit), rows)
        if comparison is not None and name in comparison.metrics:
            yield _differences(name, comparison)


def _differences(task: str, comparison: Comparison) -> Table:
    percent = f"{100 * comparison.confidence:g}%"
    metrics = comparison.metrics[task]
    rows = [(f"all {name}", *_cells(each)) for name, each in metrics.items()]
    for name, columns in comparison.per_class[task].items():
        rows += [(f"{name} {column}", *_cells(each)) for column, each in list(columns.items())[:1]]
    return Table(f"{task}, difference", ("", "difference", f"{percent} from", "to", "clear"), tuple(rows))


def _cells(each: Difference) -> tuple[str, ...]:
    return (_signed(each.value), _signed(each.low), _signed(each.high), "yes" if each.is_clear else "no")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:+.4f}"
