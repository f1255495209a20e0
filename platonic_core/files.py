"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "write_atomically"]


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A temporary file beside `path` to write to; made durable and renamed at the end, removed if anything fails.

    A link is followed, not replaced.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".platonic-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` by way of :func:`atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable (a folder cannot be opened on Windows, where the rename already is)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
