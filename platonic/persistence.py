"""Fitted models in files, without pickle: one ``.safetensors`` file of arrays plus JSON.

The file is an ordinary safetensors file, readable by any of its libraries. Its ``__metadata__`` has one entry,
``"platonic"``, a JSON object::

    {"format": "platonic-model", "version": 1, "tensors": [NAME, ...], "metadata": VALUE, "sha256": HEX}

``sha256`` is that of the other entries and of all arrays (:func:`_digest`), so that damage is noticed.
``tensors`` names the arrays that were torch tensors and become tensors again. ``VALUE`` is JSON, in which an object
with a single key says what JSON has no type for:

======================================  ==========================================
``{"tuple": [VALUE, ...]}``             a tuple
``{"dict": [[VALUE, VALUE], ...]}``     a dictionary, as pairs in its order
``{"float": "nan" | "inf" | "-inf"}``   a float that JSON cannot write
``{"numpy": [DTYPE, VALUE]}``           a NumPy scalar, DTYPE being ``float32``...
======================================  ==========================================

``null``, booleans, numbers, strings and lists stand for themselves. A change to any of this is a new version number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as _safetensors_bytes

from platonic_core.arrays import to_torch
from platonic_core.files import write_atomically

__all__ = ["ModelFormatError", "load_model", "save_model"]

_FORMAT = "platonic-model"
_VERSION = 1
_ENTRY = "platonic"
_MAX_DEPTH = 32  # of nested lists, tuples and dictionaries: what recursion over a hostile file may cost

_ARRAY_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)))
_ARRAY_DTYPES += ("float16", "float32", "float64")
_SCALAR_DTYPES = (*_ARRAY_DTYPES, "str")


class ModelFormatError(ValueError):
    """The file is not a model this version can read: foreign, damaged, or written by a newer version."""


def save_model(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray | torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write `arrays` and `metadata` to one safetensors file.

    The file appears whole or not at all: it is written under a temporary name in the same folder, flushed to disk and
    renamed over `path`, so an interrupted save leaves an existing file as it was.

    Parameters
    ----------
    path : path-like
        File to write; an existing one is replaced.
    arrays : mapping of str to ndarray or Tensor
        Arrays of booleans, integers, or floats of 16, 32 or 64 bits, of any shape; tensors may live on any device.
    metadata : mapping of str to Any
        Values made of None, bool, int, float, str, NumPy scalars, and lists, tuples and dictionaries of these, nested
        up to 32 deep. They come back with the same types.

    Raises
    ------
    TypeError
        If an array or a value is of another type; the message names it. Nothing has been written.
    ValueError
        If the values are nested too deep, or contain themselves.
    OSError
        If the file cannot be written.
    """
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors": [name for name, array in arrays.items() if isinstance(array, torch.Tensor)],
        "metadata": _encode(dict(metadata), "metadata", 0),
    }
    plain = {name: _plain_array(name, array) for name, array in arrays.items()}
    header["sha256"] = _digest(header, plain)
    text = json.dumps(header, allow_nan=False, separators=(",", ":"))
    write_atomically(path, _safetensors_bytes(plain, metadata={_ENTRY: text}))


def load_model(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what :func:`save_model` wrote.

    Nothing in the file is executed, and every size in it is checked against the file's length before it is used.

    Parameters
    ----------
    path : path-like
        File to read.

    Returns
    -------
    arrays : dict of str to ndarray or Tensor
        What was saved from NumPy as NumPy arrays, what was saved from torch as tensors on the CPU.
    metadata : dict
        As it was saved.

    Raises
    ------
    ModelFormatError
        If the file is not a safetensors file, is truncated or damaged, was not written by :func:`save_model`, or was
        written by a newer version of it.
    OSError
        If the file cannot be opened (FileNotFoundError if there is none).
    """
    name = os.fspath(path)
    if Path(name).is_dir():
        raise IsADirectoryError(f"expected a model file, got a folder: {name}")
    try:
        with safe_open(name, framework="numpy") as file:
            header = _read_header(name, file.metadata())
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except ModelFormatError:
        raise
    except (SafetensorError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelFormatError(f"{name}: not a readable safetensors file, or a truncated one: {error}") from error
    for key in header["tensors"]:
        if key not in arrays:
            raise ModelFormatError(f"{name}: the header names a tensor {key!r} that the file does not hold")
    if header["sha256"] != _digest(header["plain"], arrays):
        raise ModelFormatError(f"{name}: damaged: what it holds does not have the checksum that was written")
    for key in header["tensors"]:
        arrays[key] = torch.from_numpy(arrays[key])
    return arrays, header["metadata"]


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of everything that is written."""
    digest = hashlib.sha256(json.dumps(header, allow_nan=False, separators=(",", ":")).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read_header(name: str, entries: Mapping[str, str] | None) -> dict[str, Any]:
    """The checked header: ``tensors``, a list of str, and ``metadata``, decoded."""
    if not entries or _ENTRY not in entries:
        raise ModelFormatError(
            f"{name}: a safetensors file, but not one that platonic's save wrote (no entry {_ENTRY!r})"
        )
    try:
        header = json.loads(entries[_ENTRY], parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{name}: the entry {_ENTRY!r} is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ModelFormatError(f"{name}: the entry {_ENTRY!r} does not say format {_FORMAT!r}")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise ModelFormatError(f"{name}: expected a format version of 1 or more, got {version!r}")
    if version > _VERSION:
        raise ModelFormatError(
            f"{name}: written in format version {version}, this platonic-dl reads up to {_VERSION}: upgrade platonic-dl"
        )
    plain = {key: value for key, value in header.items() if key != "sha256"}
    tensors = header.get("tensors")
    if not isinstance(tensors, list) or not all(isinstance(key, str) for key in tensors):
        raise ModelFormatError(f"{name}: expected a list of names under 'tensors', got {tensors!r:.80}")
    if "metadata" not in header:
        raise ModelFormatError(f"{name}: the header lacks 'metadata'")
    metadata = _decode(header["metadata"], name, 0)
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise ModelFormatError(f"{name}: expected a dictionary under 'metadata', got {type(metadata).__name__}")
    return {
        "tensors": list(dict.fromkeys(tensors)),
        "metadata": metadata,
        "plain": plain,
        "sha256": header.get("sha256"),
    }


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


# ---------------------------------------------------------------------------------------------------------- values


def _encode(value: Any, where: str, depth: int) -> Any:
    """`value` as JSON can write it; `where` is how an error calls it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {_MAX_DEPTH} levels, or contains itself")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if np.isfinite(value) else {"float": repr(value)}
    if kind is np.str_:
        return {"numpy": ["str", "".join(value)]}  # item() and str() drop trailing NULs
    if isinstance(value, np.generic) and value.dtype.name in _ARRAY_DTYPES:
        return {"numpy": [value.dtype.name, _encode(value.item(), where, depth + 1)]}
    if kind is list or kind is tuple:
        items = [_encode(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if kind is dict:
        return {"dict": [_encode_pair(key, item, where, depth + 1) for key, item in value.items()]}
    raise TypeError(
        f"{where} is of type {kind.__module__}.{kind.__qualname__} ({value!r:.80}), which cannot be saved without "
        "pickle; expected None, bool, int, float, str, a NumPy scalar, or a list, tuple or dictionary of these"
    )


def _encode_pair(key: Any, item: Any, where: str, depth: int) -> list[Any]:
    return [_encode(key, f"a key of {where}", depth), _encode(item, f"{where}[{key!r:.80}]", depth)]


def _decode(value: Any, name: str, depth: int) -> Any:
    """The inverse of :func:`_encode` on untrusted JSON; `name` is the file."""
    if depth > _MAX_DEPTH:
        raise ModelFormatError(f"{name}: the metadata is nested deeper than {_MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_decode(item, name, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    tag, content = next(iter(value.items())) if len(value) == 1 else ("", None)
    if tag == "float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if tag == "tuple" and isinstance(content, list):
        return tuple(_decode(item, name, depth + 1) for item in content)
    if tag == "dict" and isinstance(content, list):
        return _decode_dict(content, name, depth + 1)
    if tag == "numpy" and isinstance(content, list) and len(content) == 2 and content[0] in _SCALAR_DTYPES:
        return _decode_scalar(content[0], _decode(content[1], name, depth + 1), name)
    raise ModelFormatError(f"{name}: the metadata holds an object this version does not know: {value!r:.80}")


def _decode_dict(pairs: list[Any], name: str, depth: int) -> dict[Any, Any]:
    result = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ModelFormatError(f"{name}: expected pairs in a dictionary of the metadata, got {pair!r:.80}")
        key = _decode(pair[0], name, depth)
        try:
            result[key] = _decode(pair[1], name, depth)
        except TypeError as error:
            raise ModelFormatError(f"{name}: {key!r:.80} cannot be a key of a dictionary") from error
    return result


def _decode_scalar(dtype: str, value: Any, name: str) -> np.generic:
    """`value` as a NumPy scalar of `dtype`, if it is of that kind and in its range."""
    kind = np.dtype(dtype).kind
    expected: type = {"b": bool, "i": int, "u": int, "f": float, "U": str}[kind]
    try:
        if type(value) is not expected:
            raise TypeError(f"expected {expected.__name__}")
        return np.dtype(dtype).type(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFormatError(f"{name}: {value!r:.80} in the metadata is no {dtype}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- arrays


def _plain_array(name: str, array: Any) -> np.ndarray:
    """`array` as a contiguous NumPy array in native byte order, or a TypeError that names it."""
    if not isinstance(name, str) or name == "__metadata__":
        raise TypeError(f"expected a string other than '__metadata__' as the name of an array, got {name!r}")
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise TypeError(f"array {name!r}: expected a NumPy array or a torch tensor, got {type(array).__name__}")
    dtype = str(array.dtype).removeprefix("torch.") if isinstance(array, torch.Tensor) else array.dtype.name
    if dtype not in _ARRAY_DTYPES:
        raise TypeError(f"array {name!r}: dtype {dtype} cannot be saved; expected one of {', '.join(_ARRAY_DTYPES)}")
    plain = np.ascontiguousarray(to_torch(array)[0].cpu().numpy())
    return plain.reshape(array.shape)  # NumPy makes what has no dimension one-dimensional when it makes it contiguous


# ------------------------------------------------------------------------------------------------------------ file
