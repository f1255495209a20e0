"""Step 2 of *lose*: the losses as functions of tensors, in the manner of ``torch.nn.functional``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradamp import _ops, reference
from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.options import LossOptions, check_reduction, documented, refuse_gradient

if TYPE_CHECKING:
    from gradamp.options import Unpack

__all__ = ["amplified_loss", "exp_ga", "linear_mse", "pow3_ga", "predict_proba"]


@documented
def exp_ga(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[LossOptions],
) -> Tensor:
    """Exponential gradient amplification: y = alpha e^x, gradient y - t (thesis, sections 4.5 and 4.6, table 4.2).

    Minimises the sparse cross-entropy, the sum over classes of |y| - t ln y.

    Parameters
    ----------
    {logits}
    {exp}
    {loss options}
    """
    return amplified_loss(input, target, Amplifier("exp", alpha, 0, max_input, target_values), **options)


@documented
def pow3_ga(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.001,
    beta: float = 0.0,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[LossOptions],
) -> Tensor:
    """Cubic gradient amplification: y = alpha x^3 + beta, gradient y - t (thesis, sections 4.7 and 4.8, table 4.2).

    Minimises the negative correlation loss, the sum over classes of alpha x^4 / 4 + beta x - t x.

    Parameters
    ----------
    {logits}
    {pow3}
    {loss options}
    """
    return amplified_loss(input, target, Amplifier("pow3", alpha, beta, target_values=target_values), **options)


@documented
def linear_mse(
    input: Tensor,
    target: Tensor,
    *,
    target_values: tuple[float, float] = (-1.0, 1.0),
    **options: Unpack[LossOptions],
) -> Tensor:
    """Linear outputs: y = x, gradient x - t (thesis, section 4.3, table 4.2).

    Minimises half of the squared error, the sum over classes of (x - t)^2 / 2.

    Parameters
    ----------
    {logits}
    {linear}
    {loss options}
    """
    return amplified_loss(input, target, Amplifier("linear", target_values=target_values), **options)


def amplified_loss(
    input: Tensor,
    target: Tensor,
    amplifier: Amplifier,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    inplace: bool = False,
) -> Tensor:
    """The loss of any amplifier, with the arguments of :func:`exp_ga`."""
    check_reduction(reduction, ("none", "sum", "mean"))
    dense = target.is_floating_point()
    if not dense:
        refuse_gradient("weight", weight)
    elif ignore_index >= 0:
        raise ValueError(
            f"expected no ignore_index of a class with dense targets, got {ignore_index}: use weights of 0"
        )
    if input.ndim == 1:
        loss = amplified_loss(
            input.unsqueeze(0), target.unsqueeze(0), amplifier,
            weight=weight, ignore_index=ignore_index, reduction=reduction, inplace=inplace,
        )  # fmt: skip
        return loss[0] if reduction == "none" else loss
    if _ops.is_transformed():
        _ops.check_transformed(input, target, weight, ignore_index)
        return reference.loss(input, target, amplifier, weight=weight, ignore_index=ignore_index, reduction=reduction)
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    # In float16 the gradient of one loss waits for the backward pass and its factor: see the notes on float16 above.
    now = needs_gradient and (input.dtype != torch.float16 or reduction == "none")
    options = (amplifier.kind, reduction, ignore_index, amplifier.settings)
    if inplace and needs_gradient and not torch.compiler.is_compiling():
        if dense and any(t is not None and t.requires_grad for t in (target, weight)):
            raise NotImplementedError("inplace=True has no gradients of targets and weight: the logits are gone")
        return _InPlace.apply(input, target, weight, *options, now)
    return _ops.amplify(input, target, weight, None, *options, now)[0]


class _InPlace(torch.autograd.Function):
    """Forward: the loss, the logits becoming the gradient unless that waits. Backward: hands that out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Any, kind: str, reduction: str, ignore_index: int,
                settings: list[float], now: bool) -> Tensor:  # fmt: skip
        grad = x.detach()
        ctx.options = (kind, reduction, ignore_index, settings)
        ctx.now = now
        loss = _ops.amplify_(grad, target, weight, None, now, *ctx.options)
        # Whoever saved the logits for a backward pass of its own finds them changed, and says so.
        torch.autograd.graph.increment_version(x)
        ctx.save_for_backward(grad, target, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() or hasattr(ctx, "handed_out"):
            raise NotImplementedError(
                "inplace=True has one backward pass and no second derivatives, the logits are gone: "
                "use inplace=False or gradamp.reference"
            )
        grad, target, weight = ctx.saved_tensors
        if ctx.now:
            _ops.scale_(grad.data, factor)
        else:
            _ops.amplify_(grad, target, weight, factor, True, *ctx.options)
        ctx.handed_out = True
        return grad, *(None,) * 7


def predict_proba(logits: Tensor, loss: Any) -> Tensor:
    """Outputs normalised after training (thesis, section 4.2): at least 0 and of sum 1 over the classes.

    "exp" divides y by its sum, which is the softmax where no logit exceeds `max_input`. "pow3" and "linear", whose y may be
    negative, first map [t_neg, t_pos] to [0, 1] and cut what is below 0; where nothing is left, all classes are as
    probable. Cross-entropy: the softmax.

    Parameters
    ----------
    logits : Tensor [C], [N, C] or [N, C, d1, ...]
    loss : a loss of :mod:`gradamp`, ``torch.nn.CrossEntropyLoss()``, or the name of one (see ``make_loss``)

    Returns
    -------
    Tensor shaped like `logits`, of float32 for 16-bit logits

    Raises
    ------
    TypeError, ValueError
        If `loss` is none of these.
    """
    from gradamp.losses import amplifier_of

    amplifier = amplifier_of(loss)
    axis = 0 if logits.ndim == 1 else 1
    x = reference.wide(logits)
    if amplifier is None:
        return torch.softmax(x, axis)
    if amplifier.kind == "exp":  # by its logarithm, so that all classes may be far below 0
        beyond = torch.where(x > amplifier.max_input, x - amplifier.max_input, 0.0)
        return torch.softmax(x.clamp(max=amplifier.max_input) + torch.log1p(beyond), axis)
    t_neg, t_pos = amplifier.target_values
    y = ((reference.activate(x, amplifier) - t_neg) / (t_pos - t_neg)).clamp(min=0)
    most = y.amax(axis, keepdim=True)
    y = torch.where(most.isinf(), (y == most).to(y.dtype), y)  # beyond the type's range: all of the sum
    total = y.sum(axis, keepdim=True)
    return torch.where(total == 0, 1 / x.shape[axis], y / total)
