"""Step 1 of *train*: any module as a chain of units."""

from layerwise.splitting.errors import SplitError
from layerwise.splitting.split import Spec, split

__all__ = ["Spec", "SplitError", "split"]
