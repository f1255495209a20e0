"""Activation functions by name: the function applied while fitting and the module that ``to_torch`` puts in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Abs", "Activation", "Apply", "resolve_activation"]


class Abs(nn.Module):
    """Absolute value, elementwise."""

    def forward(self, input: Tensor) -> Tensor:
        return input.abs()


class Apply(nn.Module):
    """Applies a callable that is not a module itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


@dataclass(frozen=True)
class Activation:
    """What the fitting code needs to know of an activation.

    Attributes
    ----------
    name : str or None
        One of :data:`ACTIVATIONS`; None for a callable of the user's, which no native kernel knows.
    apply_ : callable
        Tensor -> tensor; may overwrite its argument.
    module : callable
        () -> ``nn.Module``.
    """

    name: str | None
    apply_: Callable[[Tensor], Tensor]
    module: Callable[[], nn.Module]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("relu", torch.relu_, nn.ReLU),
    "abs": Activation("abs", torch.abs_, Abs),
    "tanh": Activation("tanh", torch.tanh_, nn.Tanh),
    "celu": Activation("celu", torch.celu_, nn.CELU),
    "identity": Activation("identity", lambda z: z, nn.Identity),
}


def resolve_activation(activation: str | Callable[[Tensor], Tensor]) -> Activation:
    """The :class:`Activation` of a name or of a callable (tensor -> tensor of the same shape, elementwise)."""
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)} or a callable, got {activation!r}.")
        return ACTIVATIONS[activation]
    if not callable(activation):
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)} or a callable, got {activation!r}.")

    def apply_checked(z: Tensor) -> Tensor:
        with torch.no_grad():  # a module's own parameters stay as they are
            out = activation(z)
        if not isinstance(out, Tensor) or out.shape != z.shape or out.dtype != z.dtype:
            got = f"{out.dtype} of shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"activation must map a tensor to a tensor of the same shape and dtype, {z.dtype} of shape "
                f"{tuple(z.shape)}; it returned {got}."
            )
        return out

    as_module = activation if isinstance(activation, nn.Module) else Apply(activation)
    return Activation(None, apply_checked, lambda: as_module)
