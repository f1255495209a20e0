"""Figures, made without pyplot and matplotlib's global settings, which is imported when one is made."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from platonic_core.files import write_atomically

__all__ = ["check_format", "new_figure", "save_figure"]

_DPI = 150


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, whose parts are laid out so that nothing overlaps.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "platonic-dl[plot]"') from error
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))


def check_format(path: str | os.PathLike[str]) -> None:
    """Raise if a figure cannot be written to a file of this name: ImportError or ValueError."""
    supported = new_figure(1, 1).canvas.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in supported:
        raise ValueError(f"{path}: expected a name that ends in .{', .'.join(sorted(supported))}")


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write `figure` in the format that the name ends in. The file appears whole or not at all."""
    check_format(path)
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lower().removeprefix("."), dpi=_DPI)
    write_atomically(path, content.getvalue())
