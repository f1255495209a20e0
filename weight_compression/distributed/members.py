"""Parameters whose weights are averaged, and what is kept of each from one averaging to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from weight_compression.distributed.jobs import working_dtype

__all__ = ["Known", "Member", "Parameters", "named_parameters"]

Parameters = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[dict[str, Any]]


class Known:
    """What is kept of a parameter.

    Attributes
    ----------
    agreed : torch.Tensor or None
        What all ranks went on with after the last averaging, in the parameter's shape and the working dtype.
    residual : torch.Tensor or None
        Flat: what was not sent of earlier differences, on this rank.
    smaller : bool
        Whether the last averaging moved the agreed weights over a range smaller than theirs.
    takes_part : bool
        Whether it required grad at the last averaging.
    """

    def __init__(self, name: str, shape: torch.Size) -> None:
        self.name, self.shape = name, shape
        self.agreed: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self.smaller, self.takes_part = True, False

    def agree(self, values: torch.Tensor) -> None:
        if self.agreed is None:
            self.agreed = torch.empty(self.shape, dtype=working_dtype(values.dtype), device=values.device)
        self.agreed.copy_(values)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        for x in (self.agreed, self.residual):
            if x is not None:
                x.data = x.to(device, dtype)  # an outer optimiser keeps the tensor

    def state_dict(self) -> dict[str, Any]:
        agreed, residual = (None if x is None else x.clone() for x in (self.agreed, self.residual))
        return {
            "name": self.name,
            "shape": tuple(self.shape),
            "smaller": self.smaller,
            "takes_part": self.takes_part,
            "agreed": agreed,
            "residual": residual,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Known:
        made = cls(state["name"], torch.Size(state["shape"]))
        made.smaller, made.takes_part = bool(state["smaller"]), bool(state["takes_part"])
        made.agreed, made.residual = (None if state[x] is None else state[x].clone() for x in ("agreed", "residual"))
        return made


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter of this call."""

    number: int
    parameter: torch.Tensor
    known: Known

    @property
    def agreed(self) -> torch.Tensor:
        assert self.known.agreed is not None
        return self.known.agreed


def named_parameters(params: Parameters) -> Iterator[tuple[str | None, torch.Tensor]]:
    """Parameters with their names, where they have any."""
    if isinstance(params, torch.Tensor):
        raise TypeError("params: expected an iterable of parameters or parameter groups, got a tensor")
    for item in params:
        if isinstance(item, torch.Tensor):
            yield None, item
        elif isinstance(item, dict):
            group = list(item["params"])
            yield from zip(item.get("param_names", [None] * len(group)), group, strict=True)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], torch.Tensor):
            yield item
        else:
            raise TypeError(
                f"params: expected parameters, names with parameters, or parameter groups, got {type(item)}"
            )
