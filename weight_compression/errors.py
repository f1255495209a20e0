"""What can be wrong with a payload, one class per fault, all ``ValueError``."""

from __future__ import annotations

__all__ = [
    "BadChecksumError",
    "BadCodeError",
    "BadHeaderError",
    "BadMagicError",
    "BadOffsetError",
    "BadShapeError",
    "NonFiniteError",
    "PayloadError",
    "SizeLimitError",
    "TruncatedError",
    "UnsupportedVersionError",
]


class PayloadError(ValueError):
    """Bytes that are not a payload, or no longer the payload they were."""


class TruncatedError(PayloadError):
    """Bytes are missing at the end, or there are more than the header says."""


class BadMagicError(PayloadError):
    """The bytes do not begin like a payload or a container."""


class UnsupportedVersionError(PayloadError):
    """Written by a version of the format that this one does not read."""


class BadHeaderError(PayloadError):
    """A header field has a value that no writer gives it."""


class BadShapeError(BadHeaderError):
    """Dimensions that no tensor has, or that `out` does not have."""


class BadCodeError(PayloadError):
    """Code lengths that are not those of a complete prefix code, or a bit stream that does not follow its code."""


class BadOffsetError(PayloadError):
    """Blocks or tensors that do not fill their place exactly."""


class BadChecksumError(PayloadError):
    """Bytes that have changed since they were written."""


class SizeLimitError(PayloadError):
    """Decoding would allocate more than the caller allows."""


class NonFiniteError(ValueError):
    """NaN or infinity in values that are to be quantised."""
