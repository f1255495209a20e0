"""What asynchronous operations hand to torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["FutureWork"]


class FutureWork(dist.Work):
    """Work that is done when a future is, and raises what that raises; torch's own, made of a future, drops errors."""

    def __init__(self, future: torch.futures.Future, results: Callable[[Any], list[torch.Tensor]]) -> None:
        super().__init__()
        self._future, self._results = future, results

    def wait(self, timeout: Any = None) -> bool:  # type: ignore[override]
        """True once it is done. Operations have time limits of their own; `timeout` is what torch passes."""
        self._future.wait()
        return True

    def get_future(self) -> torch.futures.Future:
        """Of the results."""
        return self._future.then(lambda done: self._results(done.value()))

    def is_completed(self) -> bool:
        return self._future.done()

    def result(self) -> list[torch.Tensor]:
        return self._results(self._future.wait())
