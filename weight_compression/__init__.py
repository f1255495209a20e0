"""Weights and gradients quantised by their entropy and Huffman coded.

:func:`compress` turns a tensor into bytes, :func:`decompress` turns them back; :func:`save_file` and :func:`load_file`
do so for state dicts in ``.wcz`` files. The method is that of chapter 3 of the thesis, the bytes are described in
``FORMAT.md``.
"""

from weight_compression.codec import PayloadInfo, compress, compress_bound, compress_into, decompress, payload_info
from weight_compression.config import CompressionConfig
from weight_compression.container import WczFile, load_file, save_file
from weight_compression.entropy import estimate_entropy
from weight_compression.errors import (
    BadChecksumError,
    BadCodeError,
    BadHeaderError,
    BadMagicError,
    BadOffsetError,
    BadShapeError,
    NonFiniteError,
    PayloadError,
    SizeLimitError,
    TruncatedError,
    UnsupportedVersionError,
)

__all__ = [
    "BadChecksumError",
    "BadCodeError",
    "BadHeaderError",
    "BadMagicError",
    "BadOffsetError",
    "BadShapeError",
    "CompressionConfig",
    "NonFiniteError",
    "PayloadError",
    "PayloadInfo",
    "SizeLimitError",
    "TruncatedError",
    "UnsupportedVersionError",
    "WczFile",
    "compress",
    "compress_bound",
    "compress_into",
    "decompress",
    "estimate_entropy",
    "load_file",
    "payload_info",
    "save_file",
]
