"""Pickles judged by their opcodes: what would take the process down, or never end, is refused before anything is built."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest

from bentoml_detectron.artifact import pickles
from bentoml_detectron.errors import UnsafeFileError

DEEP = b"\x80\x02)" + b"\x85" * (pickles.MAX_DEPTH + 1) + b"."
GROWS_INSIDE = b"\x80\x02]q\x00]q\x01h\x00a0h\x00Na."
"""``inner, outer = [], []; outer.append(inner); inner.append(None)``: what outer unfolds to was counted before."""
LARGE = (2**61 - 1) * 2**10  # its hash is 0, as that of every multiple of 2**61 - 1
ORDINARY = [
    {"a": [1, -2.5, None, True, "text", (1, 2)], "b": {}, 3: 2**63 - 1, -(2**63): []},
    OrderedDict(weight=1, bias=(2, 3)),
    [[1, 2]] * 50,
    list(range(3000)),
    {str(number): number for number in range(3000)},
]


def check(content: bytes) -> None:
    names = {("collections", "OrderedDict")}
    pickles.check(content, "a file", pickles.COMMON, lambda module, name: (module, name) in names)


@pytest.mark.parametrize("value", ORDINARY, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_plain_values_pass(value, protocol):
    check(pickle.dumps(value, protocol))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DEEP, "levels of nested containers"),
        (GROWS_INSIDE, "a container that is modified after it was put into another"),
        *((pickle.dumps({LARGE: 1}, protocol), "more than 64 bits") for protocol in (0, 1, 2)),
        *((pickle.dumps({(1, 2): 3}, protocol), "a key that is not a plain value") for protocol in (0, 1, 2)),
        (pickle.dumps({"a": 1, ("b", 1): 3, "c": 2}, 2), "a key that is not a plain value"),
    ],
)
def test_what_costs_without_end_is_refused(content, said):
    with pytest.raises(UnsafeFileError, match=said):
        check(content)


def test_depth_that_is_allowed_passes():
    check(b"\x80\x02)" + b"\x85" * pickles.MAX_DEPTH + b".")
