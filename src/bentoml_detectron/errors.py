"""The errors that this package raises.

Each class is under one of BentoML's exceptions, so that the right HTTP status follows::

    DetectronError                  BentoMLException
    ├── InvalidArgumentError        InvalidArgument (400), ValueError
    │   ├── UnknownDeviceError
    │   ├── RequestError            an HTTP request that cannot be understood; it carries its status
    │   └── ImageError              an image of the call cannot be used
    │       ├── UnsupportedImageError   its format or colour mode is not accepted (415)
    │       ├── DamagedImageError       it is cut short or damaged
    │       └── ImageTooLargeError      it has more pixels or bytes than the limit allows (413)
    ├── ModelNotFoundError          NotFound (404)
    ├── DependencyMissingError      MissingDependencyException
    │   └── DetectronMissingError
    ├── OutOfMemoryError            ServiceUnavailable (503)
    ├── OverloadedError             ServiceUnavailable (503)
    ├── NotReadyError               ServiceUnavailable (503)
    │   └── ModelEndedError         the process that holds a service's model is gone
    ├── InvalidModelError           a saved model that cannot be used
    │   ├── CorruptFileError        a file is damaged or missing
    │   ├── UnsafeFileError         a file holds what no saved model should
    │   │   └── UntrustedCodeError  it needs code that the caller does not trust
    │   ├── UnsupportedFormatError  written by a later version
    │   ├── UnknownEntryError       the config names a registry entry that does not exist
    │   └── WeightsMismatchError    weights and config do not belong together
    ├── OptimizationError           a model in another precision is not worth it
    ├── SaveError                   the model could not be put into the store
    └── OutputError                 a dataset's results cannot be written to their place

A message names the offending value and the cure; the value is also an attribute.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from bentoml.exceptions import BentoMLException, InvalidArgument, MissingDependencyException, NotFound, ServiceUnavailable

__all__ = [
    "CorruptFileError",
    "DamagedImageError",
    "DependencyMissingError",
    "DetectronError",
    "DetectronMissingError",
    "ImageError",
    "ImageTooLargeError",
    "InvalidArgumentError",
    "InvalidModelError",
    "ModelEndedError",
    "ModelNotFoundError",
    "NotReadyError",
    "OptimizationError",
    "OutOfMemoryError",
    "OutputError",
    "OverloadedError",
    "RequestError",
    "SaveError",
    "UnknownDeviceError",
    "UnknownEntryError",
    "UnsafeFileError",
    "UnsupportedFormatError",
    "UnsupportedImageError",
    "UntrustedCodeError",
    "WeightsMismatchError",
]

NO_DETECTRON2 = """\
Detectron2 is needed for this and is not installed. Install it: pip install torch torchvision && \
pip install 'git+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"""


class DetectronError(BentoMLException):
    """Base of this package's errors.

    Attributes:
        value: The offending value, if there is one.
    """

    def __init__(self, message: str, *, value: Any = None) -> None:
        super().__init__(message)
        self.value = value


class InvalidArgumentError(DetectronError, InvalidArgument, ValueError):
    """An argument has the wrong type or value."""


class UnknownDeviceError(InvalidArgumentError):
    """PyTorch has no such device here."""


class RequestError(InvalidArgumentError):
    """An HTTP request cannot be understood.

    Attributes:
        error_code: The HTTP status that says how.
    """

    def __init__(self, message: str, *, status: HTTPStatus = HTTPStatus.BAD_REQUEST, value: Any = None) -> None:
        super().__init__(message, value=value)
        self.error_code = status


class ImageError(InvalidArgumentError):
    """An image of the call cannot be used.

    Attributes:
        index: The image's place in the call, from 0; the message begins with it.
    """

    def __init__(self, message: str, *, index: int | None = None, value: Any = None) -> None:
        super().__init__(message if index is None else f"image {index}: {message}", value=value)
        self.index = index


class UnsupportedImageError(ImageError):
    """The image's format or colour mode is none that is taken."""


class DamagedImageError(ImageError):
    """The image is cut short or damaged."""


class ImageTooLargeError(ImageError):
    """The image has more pixels or bytes than the limit."""


# Not in the classes' bodies: BentoML enters a body's `error_code` in the table by which its clients turn the answers of any
# service into exceptions.
UnsupportedImageError.error_code = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
ImageTooLargeError.error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class ModelNotFoundError(DetectronError, NotFound):
    """The store has no such model, or it belongs to another framework."""


class DependencyMissingError(DetectronError, MissingDependencyException):
    """A library that this needs is not installed."""


class DetectronMissingError(DependencyMissingError):
    """Detectron2 is not installed."""


class OutOfMemoryError(DetectronError, ServiceUnavailable):
    """One image takes more memory than there is; over HTTP that is 413, since sending it again does not help."""


OutOfMemoryError.error_code = HTTPStatus.REQUEST_ENTITY_TOO_LARGE  # as above


class OverloadedError(DetectronError, ServiceUnavailable):
    """A service has more requests waiting than it takes."""


class NotReadyError(DetectronError, ServiceUnavailable):
    """A service's model is not loaded yet, or the service is shutting down."""


class ModelEndedError(NotReadyError):
    """The process that a service has its model in is gone: the system killed it, or the model's own code ended it."""


class InvalidModelError(DetectronError):
    """A saved model cannot be used.

    Attributes:
        file: The name of the file at fault, inside the model.
    """

    def __init__(self, message: str, *, file: str | None = None, value: Any = None) -> None:
        super().__init__(message, value=value)
        self.file = file


class CorruptFileError(InvalidModelError):
    """A file of the model is damaged, cut short or missing."""


class UnsafeFileError(InvalidModelError):
    """A file of the model holds something that no saved model should; nothing of it was run."""


class UntrustedCodeError(UnsafeFileError):
    """The model asks for code that the caller has not said to trust; nothing of it was run."""


class UnsupportedFormatError(InvalidModelError):
    """The model was written by a later version of this package."""


class UnknownEntryError(InvalidModelError):
    """The model's config names an entry that no Detectron2 registry has in this process."""


class WeightsMismatchError(InvalidModelError):
    """The weights are not those that the config asks for.

    Attributes:
        missing: Names that the config's model has and the weights have not.
        unexpected: Names that the weights have and the config's model has not.
        misshaped: By name, the shape in the weights and the shape in the config's model.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        file: str | None = None,
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = dict(misshaped or {})
        lines = [message]
        lines += [f"  missing: {name}" for name in self.missing]
        lines += [f"  unexpected: {name}" for name in self.unexpected]
        lines += [f"  misshaped: {name} has shape {found}, expected {due}" for name, (found, due) in self.misshaped.items()]
        super().__init__("\n".join(lines), file=file)


class OptimizationError(DetectronError):
    """A model in another precision is slower or finds something else; nothing was saved. Its value says why, a line each."""


class SaveError(DetectronError):
    """The store could not take the model; it holds nothing of it."""


class OutputError(DetectronError):
    """A dataset's results cannot be written where they should: something is there, another run writes, or the disk is full."""


def escaped(text: str) -> str:
    """The same text, what cannot be printed as in a Python string."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def reason(error: DetectronError) -> str:
    """An error's message, without an image's place in a call that nobody made."""
    return re.sub(r"^image \d+: ", "", str(error))


def named(error: DetectronError, name: str) -> DetectronError:
    """The same error of an image that has a name, with which its message begins; the name is its value."""
    return type(error)(f"{name}: {reason(error)}", value=name)
