"""Data to try things on: toy problems by formula, scikit-learn's embedded sets, and the user's own files.

Everything is generated, ships with scikit-learn, or is read from local files; nothing is ever downloaded.
:func:`load` finds any of it by name or path.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from platonic.datasets.base import Dataset
from platonic.datasets.embedded import EMBEDDED, load_embedded
from platonic.datasets.idx import IDX_NAMES, has_idx_files, load_idx
from platonic.datasets.images import ARCHIVE_SUFFIXES, load_image_folder
from platonic.datasets.tables import load_csv
from platonic.datasets.toy import TOYS, make_checkerboard, make_sine, make_two_spirals

__all__ = [
    "NAMES",
    "Dataset",
    "load",
    "load_csv",
    "load_embedded",
    "load_idx",
    "load_image_folder",
    "make_checkerboard",
    "make_sine",
    "make_two_spirals",
]

NAMES = (*TOYS, *EMBEDDED, *IDX_NAMES)


def load(
    name_or_path: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Load a data set by its name, or from a file or folder.

    Parameters
    ----------
    name_or_path : str or path-like
        One of :data:`NAMES`; or a ``.csv`` file (:func:`load_csv`), a folder of IDX files named as MNIST's
        (:func:`load_idx`), or a folder of images or a ``.tar``, ``.tar.gz`` or ``.tar.xz`` archive of one
        (:func:`load_image_folder`). A name wins over a file of that name; write ``./digits`` for the file.
    data_dir : path-like or None
        Where IDX sets are looked for by name, and what relative paths start from; None is the current folder.
    **options
        Passed to the function that makes or reads the data, such as ``turns=2`` or ``target="price"``.

    Returns
    -------
    Dataset
        The data.

    Raises
    ------
    ValueError
        If it is neither a name nor a path, or the file is damaged or of another kind.
    FileNotFoundError
        If files are missing: which ones, where they were looked for, and how to get them.
    TypeError
        If an option does not exist for this data; the message names those that do.
    """
    name = os.fspath(name_or_path)
    folder = Path(data_dir) if data_dir is not None else Path()
    if name in TOYS:
        return _call(TOYS[name], name, options)
    if name in EMBEDDED:
        return _call(load_embedded, name, options, name)
    if name in IDX_NAMES:
        return _call(load_idx, name, options, folder, name)
    return _load_path(name, folder / name, options)


def _load_path(name: str, path: Path, options: dict[str, Any]) -> Dataset:
    kinds = (".csv", *ARCHIVE_SUFFIXES)
    if not path.exists():
        if path.name == name and not name.lower().endswith(kinds):
            raise ValueError(f"unknown data set {name!r}; expected a path, or one of {', '.join(NAMES)}")
        raise FileNotFoundError(f"no such file or folder: {path} (looked for from {Path.cwd()})")
    if path.is_dir() and has_idx_files(path):
        return replace(_call(load_idx, name, options, path), name=path.resolve().name)
    if path.is_dir() or name.lower().endswith(ARCHIVE_SUFFIXES):
        return _call(load_image_folder, name, options, path)
    if name.lower().endswith(".csv"):
        return _call(load_csv, name, options, path)
    raise ValueError(f"{path}: expected a folder or a file that ends in {', '.join(kinds)}")


def _call(function: Callable[..., Dataset], name: str, options: dict[str, Any], *arguments: Any) -> Dataset:
    """`function` of `arguments` and `options`, with an error that names the options there are."""
    code = function.__code__
    known = code.co_varnames[len(arguments) : code.co_argcount + code.co_kwonlyargcount]
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; its options are {', '.join(known) or 'none'}")
    return function(*arguments, **options)
