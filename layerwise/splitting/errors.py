"""What a model that cannot be cut raises."""

from __future__ import annotations

__all__ = ["SplitError"]


class SplitError(RuntimeError):
    """A model that cannot be cut as asked."""
