"""Step 2 of *lose*: the losses as functions of tensors, in the manner of ``torch.nn.functional``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradamp import _ops, reference
from gradamp.amplifier import MAX_INPUT, Amplifier

__all__ = ["amplified_loss", "exp_ga", "linear_mse", "pow3_ga", "predict_proba"]

_OPTIONS = """weight : Tensor [C], optional
        A factor for every class, as in :func:`torch.nn.functional.cross_entropy`: of the samples of that class with class
        indices, of the terms of that class with dense targets.
    ignore_index : int, default -100
        Samples of this class index have no loss and no gradient.
    reduction : {"mean", "sum", "none"}, default "mean"
        "mean" divides by the number of samples (pixels), or their weight, that are not ignored; an empty batch gives
        NaN, as in torch.
    target_values : (float, float)
        The targets (t_neg, t_pos) that class indices stand for. Dense targets are taken as they are.
    inplace : bool, default False
        Write the gradient over the logits, which must not be used afterwards and may be contiguous or channels-last.
        Saves the memory of the gradient. No effect where no gradient is needed, or inside ``torch.compile``. Second
        derivatives are refused.

    Returns
    -------
    Tensor, [] or [N, d1, ...] with reduction "none"
        Of float32 for 16-bit logits: without a normaliser the loss of a sample grows with the number of classes.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or an option is not as above.
    IndexError
        If a class index is out of range (on CUDA: a device-side assertion, as in torch).

    Notes
    -----
    Logits and gradient pass through memory once. Arithmetic is in float32 for float16, bfloat16 and float32; gradients in
    float16 and bfloat16 saturate at the largest finite number. Second derivatives (``create_graph=True``,
    ``torch.func``) are computed by :mod:`gradamp.reference`."""


def exp_ga(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
    inplace: bool = False,
) -> Tensor:
    """Exponential gradient amplification: y = alpha e^x, gradient y - t (thesis, sections 4.5 and 4.6, table 4.2).

    Minimises the sparse cross-entropy, the sum over classes of |y| - t ln y.

    Parameters
    ----------
    input : Tensor [C], [N, C] or [N, C, d1, ...]
        Pre-activations x: no softmax.
    target : Tensor
        Class indices of int64, [], [N] or [N, d1, ...], or dense targets of floating point, shaped like `input`.
    alpha : float, default 0.5
    max_input : float, default 16
        Above it y continues as the straight line alpha e^max_input (1 + x - max_input), and the loss as its integral, so
        that neither overflows. In [-80, 80].
    {options}
    """
    amplifier = Amplifier("exp", alpha=alpha, max_input=max_input, target_values=target_values)
    return amplified_loss(input, target, amplifier, weight, ignore_index, reduction, inplace)


def pow3_ga(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.001,
    beta: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """Cubic gradient amplification: y = alpha x^3 + beta, gradient y - t (thesis, sections 4.7 and 4.8, table 4.2).

    Minimises the negative correlation loss, the sum over classes of alpha x^4 / 4 + beta x - t x.

    Parameters
    ----------
    input : Tensor [C], [N, C] or [N, C, d1, ...]
        Pre-activations x: no softmax.
    target : Tensor
        Class indices of int64, [], [N] or [N, d1, ...], or dense targets of floating point, shaped like `input`.
    alpha : float, default 0.001
    beta : float, default 0
    {options}
    """
    amplifier = Amplifier("pow3", alpha=alpha, beta=beta, target_values=target_values)
    return amplified_loss(input, target, amplifier, weight, ignore_index, reduction, inplace)


def linear_mse(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (-1.0, 1.0),
    inplace: bool = False,
) -> Tensor:
    """Linear outputs: y = x, gradient x - t (thesis, section 4.3, table 4.2).

    Minimises half of the squared error, the sum over classes of (x - t)^2 / 2.

    Parameters
    ----------
    input : Tensor [C], [N, C] or [N, C, d1, ...]
        Outputs x.
    target : Tensor
        Class indices of int64, [], [N] or [N, d1, ...], or dense targets of floating point, shaped like `input`.
    {options}
    """
    amplifier = Amplifier("linear", target_values=target_values)
    return amplified_loss(input, target, amplifier, weight, ignore_index, reduction, inplace)


for _function in (exp_ga, pow3_ga, linear_mse):
    if _function.__doc__:  # absent under python -OO
        _function.__doc__ = _function.__doc__.replace("{options}", _OPTIONS)


def check_reduction(reduction: str, known: tuple[str, ...] = _ops.REDUCTIONS) -> None:
    if reduction not in known:
        raise ValueError(f"expected reduction of {', '.join(known)}, got {reduction!r}")


def amplified_loss(
    input: Tensor,
    target: Tensor,
    amplifier: Amplifier,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    inplace: bool,
) -> Tensor:
    """The loss of any amplifier, with the arguments of :func:`exp_ga`."""
    check_reduction(reduction)
    for name, tensor in (("target", target), ("weight", weight)):
        if tensor is not None and tensor.requires_grad:
            raise NotImplementedError(
                f"the gradient of {name} is not computed: detach it, or use gradamp.reference.loss"
            )
    if input.ndim == 1:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
        if reduction == "none":
            return amplified_loss(input, target, amplifier, weight, ignore_index, "none", inplace)[0]
    if torch._C._are_functorch_transforms_active():  # torch.func: grad, vmap, jvp and what they compose to
        return reference.loss(input, target, amplifier, weight=weight, ignore_index=ignore_index, reduction=reduction)
    # The smallest float16 is 6e-8: a gradient divided by the number of pixels would vanish before a GradScaler's factor,
    # which comes with the backward pass, could save it. The gradient of the sum is kept instead, and divided there.
    if reduction == "mean" and input.dtype == torch.float16:
        total = amplified_loss(input, target, amplifier, weight, ignore_index, "sum", inplace)
        if target.is_floating_point():
            return total / torch.full((), input[:, 0].numel(), device=input.device)
        return total / _weight_of_samples(target, weight, ignore_index)
    with_gradient = torch.is_grad_enabled() and input.requires_grad
    options = (weight, amplifier.kind, reduction, ignore_index)
    if inplace and with_gradient and not torch.compiler.is_compiling():
        return _InPlace.apply(input, target, *options, amplifier.settings)
    return _ops.amplify(input, target, *options, *amplifier.settings, with_gradient)[0]


def _weight_of_samples(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """What a mean over samples with class indices divides by, in plain torch."""
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    return torch.where(kept, weight.float()[torch.where(kept, target, 0)], 0.0).sum()


class _InPlace(torch.autograd.Function):
    """Forward: the loss, the logits becoming the gradient. Backward: hands that out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, weight: Any, kind: str, reduction: str, ignore_index: int,
                settings: tuple[float, ...]) -> Tensor:  # fmt: skip
        grad = x.detach()
        loss = _ops.amplify_(grad, target, weight, kind, reduction, ignore_index, settings)
        # Whoever saved the logits for a backward pass of its own finds them changed, and says so.
        torch.autograd.graph.increment_version(x)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "inplace=True has no second derivatives, the logits are gone: use inplace=False or gradamp.reference"
            )
        (grad,) = ctx.saved_tensors
        return _ops.scaled(grad, factor), *(None,) * 6


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
    total = y.sum(axis, keepdim=True)
    return torch.where(total > 0, y / total, 1 / x.shape[axis])
