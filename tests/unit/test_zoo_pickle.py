"""Reading a zoo file gives what unpickling it gives, array for array, whoever wrote it."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bentoml_detectron import errors
from bentoml_detectron.artifact import zoo_pickle

KINDS = ["?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", ">f4", ">i8"]
FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@st.composite
def array(draw):
    """Any kind of numbers and shape, zero-dimensional and empty ones too, in C's or Fortran's order."""
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    made = draw(arrays.arrays(draw(st.sampled_from(KINDS)), shape))
    return np.asfortranarray(made) if draw(st.booleans()) else made


def written(folder: Path, content: object, protocol: int = 2) -> Path:
    path = folder / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def same(found: np.ndarray, due: np.ndarray) -> bool:
    native = due.astype(due.dtype.newbyteorder("="), order="C")
    return found.dtype == native.dtype and found.shape == native.shape and found.tobytes() == native.tobytes()


@given(model=st.dictionaries(st.text(max_size=20), array(), min_size=1, max_size=5), protocol=st.integers(0, 5))
@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE)
def test_reads_what_was_pickled(model, protocol, tmp_path):
    path = written(tmp_path, {"model": model, "__author__": "who"}, protocol)
    found = zoo_pickle.read(path)
    assert list(found["model"]) == list(model)
    assert all(same(found["model"][name], model[name]) for name in model)
    assert all(each.flags.writeable for each in found["model"].values())
    assert (found["__author__"], found["matching_heuristics"]) == ("who", False)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_what_numpy_1_wrote(protocol, tmp_path):
    """Its modules have other names; the pickle's framing would not survive the shorter ones, so it is left out."""
    model = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    path = tmp_path / "model.pkl"
    pickled = pickle.dumps({"model": model, "__author__": "who"}, protocol=protocol)
    for name in (b"numpy._core.multiarray", b"numpy._core.numeric"):
        short = name.replace(b"_core", b"core")
        pickled = pickled.replace(b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(short)]) + short).replace(
            name, short
        )
    if protocol > 2:
        pickled = pickled[:2] + pickled[11:]
    assert b"numpy.core." in pickled
    path.write_bytes(pickled)
    assert same(zoo_pickle.read(path)["model"]["a"], model["a"])


def python_2(name: str, array: np.ndarray) -> bytes:
    """An item of a dict as Python 2 pickled it: bytes are strings without an encoding."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    shape = b"(" + b"".join(b"K" + bytes([size]) for size in array.shape) + b"t"
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return text(name.encode()) + made + b"(K\x01" + shape + dtype + b"I00\n" + text(array.tobytes()) + b"tb" + b"s"


def test_reads_what_python_2_wrote(tmp_path):
    """Detectron 1's weights: every byte from 0 to 255 in the values, momenta beside them."""
    values = np.arange(64, dtype=np.uint8).repeat(4).view(np.float32).reshape(8, 8)
    values = np.concatenate([values, np.frombuffer(bytes(range(256)), np.float32).reshape(8, 8)])
    pickled = b"\x80\x02}U\x05blobs}" + python_2("conv1_w", values) + python_2("conv1_w_momentum", values) + b"s."
    (tmp_path / "model.pkl").write_bytes(pickled)
    found = zoo_pickle.read(tmp_path / "model.pkl")
    assert list(found["model"]) == ["conv1_w"]
    assert same(found["model"]["conv1_w"], values)
    assert (found["__author__"], found["matching_heuristics"]) == ("Caffe2", True)
    assert same(pickle.loads(pickled, encoding="latin1")["blobs"]["conv1_w"], values)


def test_backbones_of_detectron_1_have_no_blobs_and_converted_ones_say_how_to_match(tmp_path):
    model = OrderedDict(conv1_w=np.ones(3, np.float32))
    assert zoo_pickle.read(written(tmp_path, model))["__author__"] == "Caffe2"
    found = zoo_pickle.read(written(tmp_path, {"model": model, "__author__": "torchvision", "matching_heuristics": True}))
    assert (found["__author__"], found["matching_heuristics"]) == ("torchvision", True)


def test_one_array_under_two_names_is_read_twice(tmp_path):
    shared = np.arange(1000, dtype=np.float64)
    found = zoo_pickle.read(written(tmp_path, {"model": {"a": shared, "b": shared}, "__author__": ""}))["model"]
    assert same(found["a"], shared)
    assert same(found["b"], shared)


@pytest.mark.parametrize("content", [[1], {}, {"model": {}, "__author__": ""}, {"model": [1], "__author__": ""}, {"blobs": 7}])
def test_a_pickle_without_weights_is_said_to_be_one(content, tmp_path):
    with pytest.raises(errors.CorruptFileError) as caught:
        zoo_pickle.read(written(tmp_path, content))
    assert caught.value.file == "model.pkl"


@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans(), protocol=st.integers(0, 5))
@settings(max_examples=400, deadline=None, suppress_health_check=FIXTURE)
def test_a_damaged_file_is_an_error_of_this_package_or_holds_arrays(place, byte, cut, protocol, tmp_path):
    content = bytearray(pickle.dumps({"model": {"a": np.ones((2, 3), np.float32)}, "__author__": ""}, protocol=protocol))
    position = int(place * len(content))
    if cut:
        del content[position:]
    else:
        content[position] = byte
    (tmp_path / "model.pkl").write_bytes(content)
    try:
        found = zoo_pickle.read(tmp_path / "model.pkl")
    except (errors.CorruptFileError, errors.UnsafeFileError):
        return
    assert all(type(each) is np.ndarray for each in found["model"].values())
