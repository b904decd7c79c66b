"""Detections: what they may hold, how they leave Python and come back, and what of a text from elsewhere is refused."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import pickle
import struct
import sys
import tracemalloc
import zlib
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bentoml_detectron import masks
from bentoml_detectron.errors import DependencyMissingError, DetectronMissingError, InvalidArgumentError
from bentoml_detectron.results import VOID, Detections, PanopticSegmentation, Segment
from support import run_python

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((Path(__file__).parents[2] / "docs" / "detections.schema.json").read_text())
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from(
    [-0.0, 1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, 16777216.0]
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
WHOLE = st.integers(-(2**63), 2**63 - 1)


def found(count=2, size=(6, 8), **changes):
    """Detections with every part but panoptic and semantic."""
    rng = np.random.default_rng(0)
    parts = {
        "image_size": size,
        "boxes": rng.uniform(0, 5, (count, 4)).astype(np.float32),
        "scores": np.linspace(0.9, 0.1, count, dtype=np.float32),
        "class_ids": np.arange(count),
        "class_names": tuple("abcdefgh"[:count]),
        "category_ids": np.arange(count) + 10,
        "masks": [masks.encode(bitmap) for bitmap in rng.random((count, *size)) > 0.5],
        "keypoints": rng.uniform(0, 5, (count, 3, 3)).astype(np.float32),
    }
    return Detections(**{**parts, **changes})


def whole(**changes):
    """Detections with every part."""
    ids = np.zeros((6, 8), np.int32)
    ids[:3], ids[4:] = 2**24 - 1, 7
    segments = (
        Segment(2**24 - 1, 0, "a", True, 24, 0.5, 10, 1),
        Segment(7, 3, "sky", False, 16),
    )
    semantic = np.full((6, 8), -1, np.int16)
    semantic[2] = 300
    return found(**{"panoptic": PanopticSegmentation(ids, segments), "semantic": semantic, **changes})


@st.composite
def detections(draw):
    """Random `Detections`: each optional part there or not, and numbers of all kinds."""
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    count = draw(st.integers(0, 3))

    def maybe(strategy):
        return draw(st.none() | strategy)

    def floats(*shape):
        return arrays.arrays(np.float32, (count, *shape), elements=FINITE)

    ids = draw(st.lists(st.integers(1, 2**24 - 1), max_size=3, unique=True))
    optional = st.none() | st.floats(0, 1), st.none() | WHOLE, st.none() | st.integers(0, count - 1) if count else st.none()
    segments = [
        Segment(each, draw(st.integers(0, 2**63 - 1)), draw(NAMES), draw(st.booleans()), draw(st.integers(0, 99)),
                *map(draw, optional))
        for each in ids
    ]  # fmt: skip
    panoptic = arrays.arrays(np.int32, size, elements=st.sampled_from([0, *ids]))
    return Detections(
        image_size=size,
        boxes=draw(floats(draw(st.sampled_from([4, 5])))),
        scores=draw(floats()),
        class_ids=draw(arrays.arrays(np.int64, count, elements=st.integers(0, 2**63 - 1))),
        class_names=tuple(draw(st.lists(NAMES, min_size=count, max_size=count))),
        masks=maybe(arrays.arrays(np.bool_, (count, *size)).map(lambda each: [masks.encode(bitmap) for bitmap in each])),
        keypoints=maybe(floats(draw(st.sampled_from([0, 1, 17])), 3)),
        panoptic=maybe(panoptic.map(lambda each: PanopticSegmentation(each, tuple(segments)))),
        semantic=maybe(arrays.arrays(draw(st.sampled_from([np.uint8, np.int16])), size)),
        category_ids=maybe(arrays.arrays(np.int64, count, elements=WHOLE)),
    )


def test_without_detections_there_are_no_coco_results_whatever_the_model_gives():
    assert found(0, class_names=()).to_coco(1) == []


def same_bits(one, other):
    """Whether two `Detections` have the same bytes, shapes and dtypes; == does not tell -0.0 from 0.0."""
    for each in fields(Detections):
        first, second = getattr(one, each.name), getattr(other, each.name)
        if isinstance(first, np.ndarray):
            assert (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes()), each.name
        else:
            assert first == second, each.name
    return True


# --- what they are


def test_importing_needs_neither_torch_nor_detectron2():
    run_python("""
import sys
sys.modules["torch"] = sys.modules["detectron2"] = sys.modules["supervision"] = None
import numpy as np
from bentoml_detectron.results import Detections
found = Detections((4, 5), [[0, 1, 2, 3]], [0.5], [1], ("a",), [{"size": [4, 5], "counts": "d0"}])
assert Detections.from_json(found.to_json()) == found
found.polygons(), found.to_coco(1), found[:1], repr(found)
""")


def test_fields_cannot_be_set():
    with pytest.raises(FrozenInstanceError):
        found().scores = np.zeros(2, np.float32)


@pytest.mark.parametrize("name", ["boxes", "scores", "class_ids", "category_ids", "keypoints", "semantic"])
def test_arrays_are_read_only_and_the_callers_stay_writable(name):
    given = np.array(getattr(whole(), name))
    kept = getattr(whole(**{name: given}), name)
    assert not kept.flags.writeable
    assert given.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        kept[...] = 0


def test_the_panoptic_map_is_read_only_and_the_callers_stays_writable():
    given = np.zeros((2, 3), np.int32)
    assert not PanopticSegmentation(given, ()).ids.flags.writeable
    assert given.flags.writeable


def test_the_callers_masks_can_change():
    given = list(found().masks)
    kept = found(masks=given)
    given[0]["counts"] = "0"
    given.clear()
    assert kept == found()


def test_lists_and_other_number_types_are_taken_where_nothing_is_lost():
    one = Detections([4, 5], [[0, 1, 2, 3]], [1], np.array([2], np.uint8), ["a"], category_ids=np.array([3], np.int16))
    assert one.boxes.dtype == one.scores.dtype == np.float32
    assert one.class_ids.dtype == one.category_ids.dtype == np.int64
    assert one.class_names == ("a",)


def test_tensors_are_taken():
    import torch

    assert found(scores=torch.tensor([0.5, 0.25])).scores.tolist() == [0.5, 0.25]


def test_an_empty_list_is_no_detections():
    none = Detections((4, 5), [], [], [], (), [], [])
    assert none.boxes.shape == (0, 4)
    assert len(none) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", (0, 8)),
        ("image_size", (6, 2**16 + 1)),
        ("image_size", (6.0, 8)),
        ("image_size", ("6", "8")),
        ("image_size", (True, 8)),
        ("image_size", (6,)),
        ("image_size", None),
        ("boxes", np.zeros((2, 3), np.float32)),
        ("boxes", np.zeros((3, 4), np.float32)),
        ("boxes", np.zeros((2, 4), bool)),
        ("boxes", np.zeros((2, 4), complex)),
        ("boxes", [[1, 2, 3, 4], [1, 2]]),
        ("boxes", np.full((2, 4), np.nan)),
        ("boxes", np.full((2, 4), 1e300)),
        ("boxes", np.full((2, 4), 2**24 + 1)),
        ("boxes", None),
        ("boxes", "1234"),
        ("scores", 0.5),
        ("scores", None),
        ("scores", [[0.5], [0.5]]),
        ("scores", [0.5, np.inf]),
        ("scores", ["0.5", "0.5"]),
        ("class_ids", [0.0, 1.0]),
        ("class_ids", [0]),
        ("class_ids", [-1, 0]),
        ("class_ids", [True, False]),
        ("class_ids", np.array([2**63, 0], np.uint64)),
        ("class_names", ("a",)),
        ("class_names", "ab"),
        ("class_names", ("a", 1)),
        ("class_names", ("a", "\ud800")),
        ("class_names", None),
        ("category_ids", [0.5, 1]),
        ("category_ids", [1]),
        ("masks", [{"size": [6, 8], "counts": "`1"}]),
        ("masks", [{"size": [8, 6], "counts": "`1"}] * 2),
        ("masks", [{"size": [6, 8], "counts": b"`1"}] * 2),
        ("masks", [{"size": 6, "counts": "`1"}] * 2),
        ("masks", [{"counts": "`1"}] * 2),
        ("masks", np.zeros((2, 6, 8), bool)),
        ("masks", 5),
        ("keypoints", np.zeros((2, 3, 2), np.float32)),
        ("keypoints", np.zeros((1, 3, 3), np.float32)),
        ("keypoints", np.full((2, 3, 3), np.inf)),
        ("semantic", np.zeros((6, 8), np.int64)),
        ("semantic", np.zeros((6, 8), np.uint16)),
        ("semantic", np.zeros((8, 6), np.uint8)),
        ("semantic", [[0] * 8] * 6),
        ("panoptic", PanopticSegmentation(np.zeros((8, 6), np.int32), ())),
        ("panoptic", PanopticSegmentation(np.zeros((6, 8), np.int32), (Segment(1, 0, "", True, 1, detection=2),))),
        ("panoptic", np.zeros((6, 8), np.int32)),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, value):
    with pytest.raises(InvalidArgumentError, match=name.removesuffix("s").removesuffix("_name")) as caught:
        found(**{name: value})
    assert caught.value.value is not None or value is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"id": 0}, "id"),
        ({"id": 2**24}, "id"),
        ({"id": "1"}, "id"),
        ({"id": True}, "id"),
        ({"class_id": -1}, "class_id"),
        ({"class_id": 1.0}, "class_id"),
        ({"class_name": None}, "class_name"),
        ({"is_thing": 1}, "is_thing"),
        ({"area": -1}, "area"),
        ({"score": 1.5}, "score"),
        ({"score": float("nan")}, "score"),
        ({"score": "1"}, "score"),
        ({"category_id": 2**63}, "category_id"),
        ({"detection": -1}, "detection"),
    ],
)
def test_a_segment_is_checked(change, name):
    with pytest.raises(InvalidArgumentError, match=name):
        Segment(**{"id": 1, "class_id": 0, "class_name": "", "is_thing": True, "area": 0, **change})


@pytest.mark.parametrize(
    ("ids", "segments"),
    [
        ([[1]], ()),
        ([[-1]], ()),
        ([[2**24]], ()),
        ([[0]], (Segment(1, 0, "", True, 1), Segment(1, 1, "", True, 1))),
        ([[0.5]], ()),
        ([0], ()),
        ([[0]], ({"id": 1},)),
        ([[0]], None),
    ],
)
def test_a_panoptic_map_holds_the_ids_of_its_segments_alone(ids, segments):
    with pytest.raises(InvalidArgumentError, match=r"segment|panoptic\.ids"):
        PanopticSegmentation(np.array(ids), segments)


def test_numpys_numbers_in_a_segment_become_pythons():
    segment = Segment(np.int64(1), np.int32(0), "", np.bool_(True), np.int64(4), np.float32(0.5), np.int64(3), np.int64(0))
    assert [type(getattr(segment, each.name)) for each in fields(Segment)] == [int, int, str, bool, int, float, int, int]


def test_equal_where_every_part_is():
    assert whole() == whole()
    for name, value in [("scores", [0.9, 0.2]), ("class_names", ("a", "c")), ("masks", None), ("panoptic", None)]:
        assert whole(**{name: value}) != whole()
    assert whole() != "whole"


@pytest.mark.parametrize("value", [whole(), whole().panoptic], ids=["Detections", "PanopticSegmentation"])
def test_not_hashable(value):
    with pytest.raises(TypeError, match="unhashable"):
        hash(value)


def test_repr_is_short():
    assert repr(whole()) == "Detections(2 in 8x6: a 0.90, b 0.10; masks; keypoints; panoptic; semantic)"
    assert repr(found(8, masks=None, keypoints=None)) == "Detections(8 in 8x6: a 0.90, b 0.79, c 0.67, ...)"
    assert repr(Detections((6, 8), [], [], [], ())) == "Detections(0 in 8x6)"
    assert repr(whole().panoptic) == "PanopticSegmentation(2 segments in 8x6)"


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_equal_and_read_only(way):
    copied = way(whole())
    assert copied == whole()
    assert not copied.boxes.flags.writeable
    assert not copied.panoptic.ids.flags.writeable


# --- choosing


@pytest.mark.parametrize(
    ("index", "names"),
    [
        (slice(1, None), "bcd"),
        (slice(None, None, -1), "dcba"),
        ([2, 0], "ca"),
        ([-1], "d"),
        (np.array([True, False, True, False]), "ac"),
        ([False] * 4, ""),
        ([], ""),
        ((0, 1), "ab"),
        (np.array([3], np.uint8), "d"),
    ],
)
def test_chosen_detections_keep_every_part(index, names):
    some = found(4)[index]
    places = ["abcd".index(name) for name in names]
    assert some.class_names == tuple(names)
    assert some.masks == [found(4).masks[place] for place in places]
    for name in ("boxes", "scores", "class_ids", "category_ids", "keypoints"):
        assert np.array_equal(getattr(some, name), getattr(found(4), name)[places])


@pytest.mark.parametrize("index", [0, 4, [4], [-5], [True], [0.5], [[0]], "a", None, slice("a", None), [[0], [1, 2]]])
def test_what_chooses_no_detections_is_refused(index):
    with pytest.raises(InvalidArgumentError):
        found(4)[index]


def test_segments_follow_their_detections():
    assert [segment.detection for segment in whole()[[1, 0]].panoptic.segments] == [0, None]
    assert [segment.detection for segment in whole()[:1].panoptic.segments] == [None, None]
    assert np.array_equal(whole()[:1].panoptic.ids, whole().panoptic.ids)


# --- JSON there and back


@pytest.mark.slow
@given(detections())
@settings(deadline=None, max_examples=300)
def test_json_there_and_back_is_without_loss_and_fits_the_schema(one):
    text = one.to_json()
    SCHEMA.validate(json.loads(text))
    assert same_bits(Detections.from_json(text), one)


@given(detections())
@settings(deadline=None, max_examples=50)
def test_json_without_masks_comes_back_without_them(one):
    text = one.to_json(masks="none")
    SCHEMA.validate(json.loads(text))
    back = Detections.from_json(text.encode())
    assert back.masks is None
    assert np.array_equal(back.boxes, one.boxes)


@given(detections())
@settings(deadline=None, max_examples=50)
def test_json_with_polygons_fits_the_schema_and_has_them(one):
    content = json.loads(one.to_json(masks="polygon"))
    SCHEMA.validate(content)
    assert content["masks"] == (None if one.masks is None else one.polygons())


@pytest.mark.slow
@given(detections())
def test_json_that_a_client_has_parsed_is_read_as_its_text_is(one):
    assert Detections.from_json(json.loads(one.to_json())) == one


@pytest.mark.parametrize("thing", [{1: np.float32(1)}, {"image_size": {1, 2}}, {"scores": [float("nan")]}], ids=str)
def test_what_no_client_has_parsed_is_refused(thing):
    with pytest.raises(InvalidArgumentError, match="cannot be a service's answer"):
        Detections.from_json(thing)


@pytest.mark.parametrize("image_id", [1.7, None, np.float64(2)], ids=str)
def test_ids_of_images_are_whole_numbers_or_strings(image_id):
    with pytest.raises(InvalidArgumentError, match=r"image_id is .*; give a whole number or a string"):
        found().to_coco(image_id)
    assert [type(each["image_id"]) for each in found(1).to_coco(np.int64(2)) + found(1).to_coco("a")] == [int, str]


def test_json_with_polygons_is_not_read_back():
    with pytest.raises(InvalidArgumentError, match="RLE"):
        Detections.from_json(whole().to_json(masks="polygon"))


def test_the_one_float32_that_parsers_get_wrong_survives():
    """7.038531e-26: its shortest text, read as float64 and rounded, is the next float32."""
    value = np.array([0x15AE43FD], np.uint32).view(np.float32)
    assert np.float32(float(str(value[0]))) != value[0]
    one = Detections((4, 5), [[value[0]] * 4, [-value[0]] * 4], np.tile(value, 2), [0, 0], ("", ""))
    assert same_bits(Detections.from_json(one.to_json()), one)


def test_an_unknown_way_to_write_masks_is_refused():
    with pytest.raises(InvalidArgumentError, match="bitmap"):
        found().to_json(masks="bitmap")


# --- JSON from anyone


def changed(**changes):
    return json.dumps({**json.loads(whole().to_json()), **changes})


def png(width, height, data, bits=8, color=0, extra=b""):
    """A PNG in base64, with whatever as its compressed pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return base64.b64encode(content).decode()


def semantic(text, dtype="uint8"):
    return {"dtype": dtype, "png": text}


GOOD = json.loads(whole().to_json())
ROWS = zlib.compress(bytes(6 * 9))
BIG = {"image_size": [30000, 30000], "masks": None, "panoptic": None}

HOSTILE = {
    "empty": "",
    "no bytes": b"",
    "no text": 5,
    "no object": "[]",
    "null": "null",
    "not UTF-8": b"\xff\xfe{}",
    "cut short": whole().to_json()[:-5],
    "two texts": whole().to_json() + "{}",
    "NaN": whole().to_json().replace("0.9", "NaN", 1),
    "Infinity": whole().to_json().replace("0.9", "-Infinity", 1),
    "a number beyond float64": whole().to_json().replace("0.9", "1e999", 1),
    "a number beyond float32": whole().to_json().replace("0.9", "1e39", 1),
    "a number of 5000 digits": whole().to_json().replace("0.9", "9" * 5000, 1),
    "a number of 400 digits": whole().to_json().replace("0.9", "9" * 400, 1),
    "an equal key": whole().to_json().replace("{", '{"scores":[],', 1),
    "an equal key in a mask": whole().to_json().replace('"size":[6,8]', '"size":[6,8],"size":[6,8]', 1),
    "an equal key, spelled otherwise": whole().to_json().replace("{", '{"sc\\u006fres":[],', 1),
    "deep lists": "[" * 100_000 + "]" * 100_000,
    "deep objects": '{"boxes":' * 100_000,
    "deep boxes": changed(boxes=0).replace('"boxes": 0', '"boxes": ' + "[" * 500 + "]" * 500),
    "an unknown key": changed(extra=1),
    "a half surrogate": changed(class_names=["a", "\ud800"]),
    **{f"without {name}": json.dumps({k: v for k, v in GOOD.items() if k != name}) for name in list(GOOD)[:6]},
    **{f"{name} is {value!r}": changed(**{name: value})
       for name in GOOD for value in ("x", 1, True, 1.5, {}, [[[[1]]]], [None], ["x", "y"], [1], [True, True], [{}, {}])
       if (name, value) != ("keypoint_count", 3) and (name, value) != ("class_names", ["x", "y"])},
    "true among the scores": changed(scores=[0.5, True]),
    "a class id that is no whole number": changed(class_ids=[0, 1.0]),
    "a class id beyond int64": changed(class_ids=[0, 2**63]),
    "an image without pixels": changed(image_size=[0, 8]),
    "an image of another size": changed(image_size=[8, 6]),
    "a box too few": changed(boxes=GOOD["boxes"][:1]),
    "boxes of the other format": changed(box_format="xywha"),
    "no boxes but empty lists": changed(boxes=[[], []]),
    "keypoints that are not counted": changed(keypoint_count=None),
    "a wrong keypoint count": changed(keypoint_count=2),
    "a keypoint count without keypoints": changed(keypoints=None),
    "more keypoints than an array can have": json.dumps({**json.loads(found(0).to_json()), "keypoint_count": 10**30}),
    "as many keypoints as memory has bytes": json.dumps({**json.loads(found(0).to_json()), "keypoint_count": 2**62}),
    **{f"the mask {mask!r:.60}": changed(masks=[mask, GOOD["masks"][1]]) for mask in [
        {"size": [6, 8], "counts": "0"}, {"size": [6, 8], "counts": ""}, {"size": [6, 8], "counts": "\x00"},
        {"size": [6, 8], "counts": [48]}, {"size": [6, 8], "counts": "ooooooooo1"}, {"size": [6, 8], "counts": "é"},
        {"size": [2**15, 2**15], "counts": "PPPP1"}, {"size": [6, 8, 1], "counts": "`1"}, {"size": [6], "counts": "`1"},
        {"size": [6, 8], "counts": "`1", "area": 1}, {"size": [6, 8]}, {"size": [6.0, 8], "counts": "`1"}, "`1", [],
        {"size": [6, 8], "counts": "0" * 10**6}]},
    "a semantic map of no known dtype": changed(semantic=semantic(GOOD["semantic"]["png"], "float32")),
    "a semantic map of the other dtype": changed(semantic=semantic(GOOD["semantic"]["png"])),
    "a semantic map with more": changed(semantic={**GOOD["semantic"], "void": 255}),
    "a map that is no base64": changed(semantic=semantic("!!!!")),
    "a map that is no ASCII": changed(semantic=semantic("é")),
    "a map that is no PNG": changed(semantic=semantic(base64.b64encode(bytes(100)).decode())),
    "a map of nothing": changed(semantic=semantic("")),
    "a map cut in its header": changed(semantic=semantic(png(8, 6, ROWS)[:24])),
    "a map cut short": changed(semantic=semantic(png(8, 6, ROWS[:-8]))),
    "a map without pixels": changed(semantic=semantic(png(8, 6, b""))),
    "a map with too few rows": changed(semantic=semantic(png(8, 6, zlib.compress(bytes(9))))),
    "a map with too many rows": changed(semantic=semantic(png(8, 6, zlib.compress(bytes(9 * 9))))),
    "a map that unpacks to more": changed(semantic=semantic(png(8, 6, zlib.compress(bytes(10**8))))),
    "a map with a text": changed(semantic=semantic(png(8, 6, ROWS, extra=b"\0\0\0\3tEXta\0b" + struct.pack(
        ">I", zlib.crc32(b"tEXta\0b"))))),
    "a map with a wrong checksum": changed(semantic=semantic(png(8, 6, ROWS, extra=b"\0\0\0\0IDAT\0\0\0\0"))),
    "a map of another size": changed(semantic=semantic(png(6, 8, zlib.compress(bytes(8 * 7))))),
    "a map in color": changed(semantic=semantic(png(8, 6, zlib.compress(bytes(6 * 25)), color=2))),
    "a map in gray where color is due": changed(panoptic={"png": png(8, 6, ROWS), "segments": []}),
    "a map that claims 30000x30000": changed(semantic=semantic(png(30000, 30000, ROWS))),
    "a map of 30000x30000 for an image that is": changed(**BIG, semantic=semantic(png(30000, 30000, ROWS))),
    "a map of 10000x10000 without pixels": changed(**{**BIG, "image_size": [10000, 10000]},
                                                   semantic=semantic(png(10000, 10000, ROWS))),
    "a panoptic map of a too large image": changed(image_size=[65536, 65536], masks=None, semantic=None),
    "a panoptic map of 65536x65536": changed(image_size=[65536, 65536], masks=None, semantic=None, panoptic={
        "png": png(65536, 65536, ROWS, color=2), "segments": []}),
    "a panoptic map whose ids no segment has": changed(panoptic={**GOOD["panoptic"], "segments": []}),
    **{f"the segment {change}": changed(panoptic={**GOOD["panoptic"], "segments": [
        {**GOOD["panoptic"]["segments"][0], **change}, GOOD["panoptic"]["segments"][1]]})
       for change in [{"id": "7"}, {"id": 7}, {"detection": 2}, {"score": 2}, {"is_thing": 1}, {"extra": 1}, {"area": 1.5}]},
    "a segment that is a list": changed(panoptic={**GOOD["panoptic"], "segments": [[]]}),
    "segments that are an object": changed(panoptic={**GOOD["panoptic"], "segments": {}}),
}  # fmt: skip


def test_what_the_hostile_texts_are_made_of_is_read():
    """None of them is refused for another fault than its own."""
    assert Detections.from_json(changed()) == whole()
    assert Detections.from_json(changed(semantic=semantic(png(8, 6, ROWS)))).semantic.max() == 0


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_is_refused_in_little_memory(name):
    text = HOSTILE[name]
    tracemalloc.start()
    with pytest.raises(InvalidArgumentError) as caught:
        Detections.from_json(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    assert peak < 20_000_000 + 100 * (len(text) if isinstance(text, (str, bytes)) else 0)


def test_a_map_that_is_too_short_for_its_pixels_is_not_unpacked():
    """Pillow's memory is not traced, so the process's own counts: 900 MB for the map of 30000x30000."""
    run_python(
        """
import resource, sys
from pathlib import Path
from bentoml_detectron.errors import InvalidArgumentError
from bentoml_detectron.results import Detections
import PIL.PngImagePlugin
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for text in sys.argv[1:]:
    try:
        Detections.from_json(text)
    except InvalidArgumentError:
        continue
    raise SystemExit("it was read")
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
""",
        HOSTILE["a map of 30000x30000 for an image that is"],
        HOSTILE["a map of 10000x10000 without pixels"],
    )


def test_a_map_of_one_color_is_read_though_it_is_short():
    one = Detections((2000, 3000), [], [], [], (), semantic=np.zeros((2000, 3000), np.uint8))
    assert Detections.from_json(one.to_json()) == one
    tightest = changed(**{**BIG, "image_size": [2000, 3000]}, semantic=semantic(
        png(3000, 2000, zlib.compress(bytes(2000 * 3001), 9))))  # fmt: skip
    assert Detections.from_json(tightest).semantic.shape == (2000, 3000)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "png", "id", "x"]), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw):
    """The text of random `Detections` with one to three of its values, somewhere inside, replaced, doubled or left out."""
    content = json.loads(draw(detections()).to_json())
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and place[key] and draw(st.integers(0, 3)):
                place = place[key]
                continue
            what = draw(st.sampled_from(["replace", "drop", "again"]))
            if what == "replace":
                place[key] = draw(JUNK)
            elif what == "drop":
                del place[key]
            elif isinstance(place, list):
                place.append(place[key])
            break
    return json.dumps(content)


@pytest.mark.slow
@given(mutated())
@settings(deadline=None, max_examples=400)
def test_a_changed_text_is_either_read_as_the_schema_has_it_or_refused(text):
    try:
        one = Detections.from_json(text)
    except InvalidArgumentError:
        return
    SCHEMA.validate(json.loads(text))
    assert Detections.from_json(one.to_json()) == one


@given(st.binary(max_size=40), st.integers(0, 10**6), st.integers(0, 20))
@settings(deadline=None, max_examples=200)
def test_a_damaged_text_is_either_read_or_refused(junk, place, removed):
    text = whole().to_json().encode()
    place %= len(text)
    with contextlib.suppress(InvalidArgumentError):
        Detections.from_json(text[:place] + junk + text[place + removed :])


# --- the schema


def test_the_schema_is_one():
    SCHEMA.check_schema(SCHEMA.schema)


@pytest.mark.parametrize("mode", ["rle", "polygon", "none"])
@pytest.mark.parametrize("one", [whole(), found(), found(0), Detections((6, 8), np.empty((0, 5)), [], [], ())], ids=repr)
def test_what_is_written_fits_the_schema(one, mode):
    SCHEMA.validate(json.loads(one.to_json(masks=mode)))


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"image_size": [6]},
        {"image_size": [6, 8, 3]},
        {"image_size": [0, 8]},
        {"box_format": "xywh"},
        {"boxes": [[1, 2, 3]]},
        {"scores": ["0.5"]},
        {"class_ids": [-1]},
        {"class_names": [None]},
        {"class_names": None},
        {"masks": [[[1, 2, 3, 4]]]},
        {"masks": [{"size": [6, 8], "counts": "~"}]},
        {"masks": [{"size": [6, 8], "counts": "0", "area": 1}]},
        {"masks": [{"size": [6, 8], "counts": "0"}, []]},
        {"keypoints": [[[1, 2]]]},
        {"panoptic": {"png": "", "segments": []}},
        {"panoptic": {**GOOD["panoptic"], "segments": [{"id": 0}]}},
        {"semantic": {**GOOD["semantic"], "dtype": "int64"}},
    ],
    ids=repr,
)
def test_what_is_malformed_does_not_fit_the_schema(change):
    assert SCHEMA.is_valid(GOOD)
    assert not SCHEMA.is_valid({**GOOD, **change})


def test_the_schema_describes_every_property():
    assert [name for name, each in SCHEMA.schema["properties"].items() if "description" not in each] == []
    assert list(SCHEMA.schema["properties"]) == list(GOOD)


# --- other libraries


def test_polygons_are_those_of_each_mask():
    assert found().polygons() == [masks.to_polygons(mask) for mask in found().masks]


def test_without_masks_there_are_no_polygons():
    with pytest.raises(InvalidArgumentError, match="no masks"):
        found(masks=None).polygons()


def test_supervision_gets_every_part():
    one = found()
    given = one.to_supervision()
    assert np.array_equal(given.xyxy, one.boxes)
    assert np.array_equal(given.confidence, one.scores)
    assert np.array_equal(given.class_id, one.class_ids)
    assert given.data["class_name"].tolist() == ["a", "b"]
    assert np.array_equal(np.asarray(given.mask), [masks.decode(mask) for mask in one.masks])
    assert given.xyxy.flags.writeable


def test_masks_reach_supervision_whole_though_they_leave_their_box():
    bitmap = np.zeros((6, 8), bool)
    bitmap[1:5, 2:7] = True
    one = Detections((6, 8), [[3, 2, 5, 4]], [1], [0], ("a",), [masks.encode(bitmap)])
    assert np.array_equal(np.asarray(one.to_supervision().mask)[0], bitmap)


@given(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)).flatmap(lambda size: arrays.arrays(np.bool_, size)))
@settings(deadline=None, max_examples=50)
def test_supervisions_masks_are_those_that_it_reads_itself(bitmaps):
    import supervision as sv

    count, *size = bitmaps.shape
    rles = [masks.encode(bitmap) for bitmap in bitmaps]
    one = Detections(tuple(size), np.zeros((count, 4)), np.ones(count), [0] * count, ("",) * count, rles)
    given = one.to_supervision().mask
    itself = sv.CompactMask.from_coco_rle(rles, np.tile([0.0, 0, size[1], size[0]], (count, 1)), tuple(size))
    assert np.array_equal(given.to_dense(), itself.to_dense())
    assert np.array_equal(given.area, itself.area)


@pytest.mark.parametrize("masks_", [None, []])
def test_supervision_gets_nothing_where_nothing_was_found(masks_):
    given = Detections((6, 8), [], [], [], (), masks_).to_supervision()
    assert len(given) == 0
    assert given.is_empty()


def test_rotated_boxes_are_nothing_for_supervision():
    with pytest.raises(InvalidArgumentError, match="rotated"):
        Detections((6, 8), [[1, 2, 3, 4, 5]], [1], [0], ("a",)).to_supervision()


def test_without_supervision_the_install_line_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(DependencyMissingError, match="pip install supervision"):
        found().to_supervision()


def test_without_detectron2_there_are_no_instances(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.structures", None)
    with pytest.raises(DetectronMissingError, match="Install it"):
        found().to_instances()


def test_instances_have_every_part_and_can_be_written():
    one = found()
    instances = one.to_instances()
    assert instances.image_size == (6, 8)
    assert np.array_equal(instances.pred_boxes.tensor, one.boxes)
    assert np.array_equal(instances.pred_masks, [masks.decode(mask) for mask in one.masks])
    assert np.array_equal(instances.pred_keypoints, one.keypoints)
    instances.pred_boxes.tensor[0] = 0
    assert one == found()


def test_instances_have_rotated_boxes_where_they_are():
    from detectron2.structures import RotatedBoxes

    instances = Detections((6, 8), [[1, 2, 3, 4, 5]], [1], [0], ("a",)).to_instances()
    assert isinstance(instances.pred_boxes, RotatedBoxes)
    assert instances.pred_boxes.tensor.tolist() == [[1, 2, 3, 4, 5]]


def test_a_segments_mask_is_where_its_id_is():
    one = whole().panoptic
    assert np.array_equal(masks.decode(one.rle(7)), one.ids == 7)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([np.uint8, np.int16]), st.randoms(use_true_random=False))
def test_semantic_map_as_one_rle_a_class(height, width, dtype, random):
    labels = [[random.choice([0, 3, 7, VOID[np.dtype(dtype).name]]) for _ in range(width)] for _ in range(height)]
    semantic = np.array(labels, dtype)
    rles = found(0, (height, width), masks=None, semantic=semantic).semantic_rles()
    again = np.full((height, width), VOID[np.dtype(dtype).name], dtype)
    for class_id, rle in rles.items():
        pixels = masks.decode(rle)
        assert pixels.any()
        again[pixels] = class_id
    assert np.array_equal(again, semantic)


def test_rles_of_no_semantic_map_are_an_error_that_says_so():
    with pytest.raises(InvalidArgumentError, match="no semantic map"):
        found().semantic_rles()
