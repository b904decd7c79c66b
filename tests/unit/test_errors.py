"""The tree of errors: each is under the right exception of BentoML, and carries its value."""

from __future__ import annotations

import pytest
from bentoml import exceptions as bentoml_exceptions

from bentoml_detectron import errors


def test_all_names_what_is_there():
    public = {name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__}
    assert set(errors.__all__) == public


@pytest.mark.parametrize(
    ("kind", "parents", "status"),
    [
        (errors.InvalidArgumentError, (bentoml_exceptions.InvalidArgument, ValueError), 400),
        (errors.UnknownDeviceError, (bentoml_exceptions.InvalidArgument, ValueError), 400),
        (errors.ImageError, (errors.InvalidArgumentError,), 400),
        (errors.UnsupportedImageError, (errors.ImageError,), 415),
        (errors.DamagedImageError, (errors.ImageError,), 400),
        (errors.ImageTooLargeError, (errors.ImageError,), 413),
        (errors.OutOfMemoryError, (bentoml_exceptions.ServiceUnavailable,), 413),
        (errors.ModelNotFoundError, (bentoml_exceptions.NotFound,), 404),
        (errors.DetectronMissingError, (bentoml_exceptions.MissingDependencyException,), 500),
        (errors.ModelEndedError, (errors.NotReadyError,), 503),
        (errors.InvalidModelError, (), 500),
        (errors.CorruptFileError, (errors.InvalidModelError,), 500),
        (errors.UnsafeFileError, (errors.InvalidModelError,), 500),
        (errors.UnsupportedFormatError, (errors.InvalidModelError,), 500),
        (errors.UnknownEntryError, (errors.InvalidModelError,), 500),
        (errors.WeightsMismatchError, (errors.InvalidModelError,), 500),
        (errors.SaveError, (), 500),
    ],
)
def test_place_in_the_tree(kind, parents, status):
    for parent in (errors.DetectronError, bentoml_exceptions.BentoMLException, *parents):
        assert issubclass(kind, parent)
    assert kind.error_code == status


def test_bentoml_clients_still_answer_with_their_own_exceptions():
    for kind in bentoml_exceptions.BentoMLException.error_mapping.values():
        assert kind.__module__ != errors.__name__


def test_every_class_is_in_the_drawing():
    for name in errors.__all__:
        assert name in errors.__doc__


def test_values_are_attributes():
    assert errors.InvalidArgumentError("no", value=7).value == 7
    assert errors.CorruptFileError("no", file="config.yaml").file == "config.yaml"
    image = errors.DamagedImageError("no", index=3, value="a.png")
    assert (str(image), image.index, image.value) == ("image 3: no", 3, "a.png")
    mismatch = errors.WeightsMismatchError("no", missing=["a"], unexpected=["b"], misshaped={"c": ((1,), (2,))}, file="f")
    assert (mismatch.missing, mismatch.unexpected, mismatch.misshaped) == (("a",), ("b",), {"c": ((1,), (2,))})
    assert str(mismatch) == "no\n  missing: a\n  unexpected: b\n  misshaped: c has shape (1,), expected (2,)"


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_cross_process_boundaries(name):
    import pickle

    original = getattr(errors, name)("what and the cure")
    back = pickle.loads(pickle.dumps(original))
    assert type(back) is type(original)
    assert str(back) == "what and the cure"


def test_an_index_crosses_process_boundaries():
    import pickle

    back = pickle.loads(pickle.dumps(errors.ImageTooLargeError("too large", index=3, value=(9, 9))))
    assert (str(back), back.index, back.value) == ("image 3: too large", 3, (9, 9))
