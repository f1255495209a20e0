"""Step 1 of *lose*: the losses as modules, and by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.functional import amplified_loss
from gradamp.options import LossOptions, check_reduction

if TYPE_CHECKING:
    from gradamp.options import Unpack

__all__ = ["LOSSES", "ExpGALoss", "LinearMSELoss", "Pow3GALoss", "amplifier_of", "make_loss"]


class _AmplifiedLoss(nn.Module):
    """What the modules share. `weight` is a buffer: it moves with the module and is saved with it."""

    weight: Tensor | None

    def __init__(
        self,
        amplifier: Amplifier,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        inplace: bool = False,
    ) -> None:
        super().__init__()
        check_reduction(reduction, ("none", "sum", "mean"))
        self.amplifier = amplifier
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace = inplace
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return amplified_loss(
            input, target, self.amplifier,
            weight=self.weight, ignore_index=self.ignore_index, reduction=self.reduction, inplace=self.inplace,
        )  # fmt: skip

    def extra_repr(self) -> str:
        a = self.amplifier
        numbers = {
            "exp": f"alpha={a.alpha:g}, max_input={a.max_input:g}, ",
            "pow3": f"alpha={a.alpha:g}, beta={a.beta:g}, ",
            "linear": "",
        }[a.kind]
        t_neg, t_pos = a.target_values
        options = f"target_values=({t_neg:g}, {t_pos:g}), reduction={self.reduction!r}"
        if self.ignore_index != -100:
            options += f", ignore_index={self.ignore_index}"
        return numbers + options + (", inplace=True" if self.inplace else "")


class ExpGALoss(_AmplifiedLoss):
    """Exponential gradient amplification as a module; the arguments are those of :func:`gradamp.functional.exp_ga`.

    >>> loss = ExpGALoss(target_values=(0, 16), alpha=0.1)
    >>> loss(logits, target).backward()
    """

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        max_input: float = MAX_INPUT,
        target_values: tuple[float, float] = (0.0, 2.0),
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(Amplifier("exp", alpha, 0, max_input, target_values), **options)


class Pow3GALoss(_AmplifiedLoss):
    """Cubic gradient amplification as a module; the arguments are those of :func:`gradamp.functional.pow3_ga`."""

    def __init__(
        self,
        *,
        alpha: float = 0.001,
        beta: float = 0.0,
        target_values: tuple[float, float] = (0.0, 2.0),
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(Amplifier("pow3", alpha, beta, target_values=target_values), **options)


class LinearMSELoss(_AmplifiedLoss):
    """Linear outputs and half of the squared error as a module; see :func:`gradamp.functional.linear_mse`."""

    def __init__(self, *, target_values: tuple[float, float] = (-1.0, 1.0), **options: Unpack[LossOptions]) -> None:
        super().__init__(Amplifier("linear", target_values=target_values), **options)


LOSSES: dict[str, type[nn.Module]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "exp_ga": ExpGALoss,
    "pow3_ga": Pow3GALoss,
    "linear_mse": LinearMSELoss,
}


def make_loss(name: str, **options: Any) -> nn.Module:
    """The loss called `name`: "cross_entropy" (torch's own, the baseline), "exp_ga", "pow3_ga" or "linear_mse".

    Options are those of its class; `weight`, `ignore_index` and `reduction` mean the same in all four.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name](**options)


def amplifier_of(loss: str | nn.Module) -> Amplifier | None:
    """The amplifier of a loss or of a name's defaults, None for cross-entropy."""
    if isinstance(loss, str):
        loss = make_loss(loss)
    if isinstance(loss, _AmplifiedLoss):
        return loss.amplifier
    if isinstance(loss, nn.CrossEntropyLoss):
        return None
    raise TypeError(f"expected a loss of gradamp, CrossEntropyLoss or a name, got {type(loss).__name__}")
