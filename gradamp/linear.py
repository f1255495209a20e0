"""The last linear layer and its loss together, in chunks of classes: the logits (N, C) are never in memory.

An amplifier has no normaliser, so the gradient of a chunk of classes needs nothing of the others: logits of the chunk,
loss and gradient in their place, products with hidden units and weights, next chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradamp import _ops, reference
from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.functional import check_reduction

__all__ = ["chunk_classes", "linear_exp_ga", "linear_loss", "linear_pow3_ga"]

# N samples, D hidden units, C classes

_BUFFER_BYTES = 16 << 20  # logits of a chunk: about what a cache shared by all cores keeps
_FEWEST_CLASSES = 256  # of a chunk: below, the matrix products lose speed

_OPTIONS = """hidden : Tensor [..., D]
    weight : Tensor [C, D]
    bias : Tensor [C] or None
    target : Tensor, int64 [...]
        Class indices. Dense targets would be as large as the logits; for them there is the loss of the logits.
    class_weight : Tensor [C], optional
        A factor for the samples of every class, as `weight` of :func:`torch.nn.functional.cross_entropy`.
    ignore_index : int, default -100
        Samples of this class index have no loss and no gradient.
    reduction : {"mean", "sum"}, default "mean"
    target_values, {numbers}
        As in :func:`gradamp.{loss}`.

    Returns
    -------
    Tensor, []
        Of float32 for 16-bit input.

    Raises
    ------
    TypeError, ValueError
        If a dtype, a shape or an option is not as above.
    IndexError
        If a class index is out of range (on CUDA: a device-side assertion, as in torch).

    Notes
    -----
    Equals ``{loss}(F.linear(hidden, weight, bias), target)``. Gradients are computed with the loss, for those inputs that
    need one, and multiplied in the backward pass by the gradient that arrives. Beside them, memory holds the logits of a
    chunk: at most a sixteenth of all classes, or 256. In float16 and bfloat16 the gradient of `hidden` is summed over
    chunks in float32; in float16 what a mean divides below 6e-8 is lost, and no GradScaler brings it back: prefer bfloat16.
    Under autocast the matrix products run in its type. Second derivatives hold (N, C) in memory."""


def linear_exp_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
) -> Tensor:
    """A linear layer and :func:`gradamp.exp_ga` of its outputs, without the outputs in memory.

    Parameters
    ----------
    {options}
    """
    amplifier = Amplifier("exp", alpha=alpha, max_input=max_input, target_values=target_values)
    return linear_loss(hidden, weight, bias, target, amplifier, class_weight, ignore_index, reduction)


def linear_pow3_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.001,
    beta: float = 0.0,
) -> Tensor:
    """A linear layer and :func:`gradamp.pow3_ga` of its outputs, without the outputs in memory.

    Parameters
    ----------
    {options}
    """
    amplifier = Amplifier("pow3", alpha=alpha, beta=beta, target_values=target_values)
    return linear_loss(hidden, weight, bias, target, amplifier, class_weight, ignore_index, reduction)


for _function, _loss, _numbers in (
    (linear_exp_ga, "exp_ga", "alpha, max_input"),
    (linear_pow3_ga, "pow3_ga", "alpha, beta"),
):
    if _function.__doc__:  # absent under python -OO
        _text = _OPTIONS.replace("{loss}", _loss).replace("{numbers}", _numbers)
        _function.__doc__ = _function.__doc__.replace("{options}", _text)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    amplifier: Amplifier,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The loss of any amplifier, with the arguments of :func:`linear_exp_ga`."""
    check_reduction(reduction, ("sum", "mean"))
    if class_weight is not None and class_weight.requires_grad:
        raise NotImplementedError("the gradient of class_weight is not computed: detach it")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    if torch._C._are_functorch_transforms_active():
        return reference.loss(
            F.linear(hidden, weight, bias), target, amplifier,
            weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    needed = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    return linear_amplify(
        hidden, weight, bias, target, class_weight, amplifier.kind, reduction, ignore_index, 0, weight.shape[0],
        *amplifier.settings, *needed,
    )[0]  # fmt: skip


def chunk_classes(samples: int, classes: int, itemsize: int) -> int:
    """Classes of a chunk, whose logits for all samples are in memory at once."""
    fitting = _BUFFER_BYTES // max(samples * itemsize, 1)
    return max(1, min(classes, max(_FEWEST_CLASSES, min(fitting, classes // 16))))


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, classes: int
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [..., D] and weight [C, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"expected bias of shape {(weight.shape[0],)}, got {tuple(bias.shape)}")
    given = [t for t in (hidden, weight, bias) if t is not None]
    if not hidden.is_floating_point() or any(t.dtype != hidden.dtype or t.device != hidden.device for t in given):
        raise TypeError(
            "expected hidden, weight and bias of one floating-point dtype on one device, got "
            + ", ".join(f"{t.dtype} on {t.device}" for t in given)
        )
    if target.dtype != torch.int64 or target.device != hidden.device:
        raise TypeError(f"expected target of int64 on {hidden.device}, got {target.dtype} on {target.device}")
    if tuple(target.shape) != (hidden.shape[0],):
        raise ValueError(f"expected one target for each of {hidden.shape[0]} rows of hidden, got {target.numel()}")
    if class_weight is not None:
        _ops.check_weight(class_weight, classes, hidden.device)


@torch.library.custom_op("gradamp::linear_amplify", mutates_args=())
def linear_amplify(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [C, D], or rows [first_class, first_class + C) of it
    bias: torch.Tensor | None,  # [C]
    target: torch.Tensor,  # [N] int64
    class_weight: torch.Tensor | None,  # [classes]
    kind: str,
    reduction: str,
    ignore_index: int,
    first_class: int,
    classes: int,
    alpha: float,
    beta: float,
    max_input: float,
    t_neg: float,
    t_pos: float,
    for_hidden: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of the classes that are here, and the gradients asked for ([0] without) of hidden, weight and bias.

    The gradient of `hidden` is in the type of arithmetic: shards of classes are yet to be added to it.
    """
    _check(hidden, weight, bias, target, class_weight, classes)
    amplifier = Amplifier(kind, alpha, beta, max_input, (t_neg, t_pos))
    wide = _ops.arithmetic(hidden.dtype)
    target = target.contiguous()
    factors = None if class_weight is None else class_weight.to(wide).contiguous()
    divide_by = _ops.denominator(target, factors, ignore_index, classes, wide)
    losses = torch.zeros(1, dtype=torch.float64, device=hidden.device)
    scratch = _ops.partials(hidden.device)
    for_any = for_hidden or for_weight or for_bias
    grad_hidden = hidden.new_zeros(hidden.shape if for_hidden else 0, dtype=wide)
    grad_weight = torch.empty_like(weight) if for_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[0] if for_bias else 0)

    step = chunk_classes(hidden.shape[0], weight.shape[0], hidden.itemsize)
    buffer = hidden.new_empty(step * hidden.shape[0])
    for start in range(0, weight.shape[0], step):
        rows = weight[start : start + step]
        here = slice(start, start + rows.shape[0])
        logits = buffer[: rows.shape[0] * hidden.shape[0]].view(hidden.shape[0], rows.shape[0])
        if bias is None:
            torch.mm(hidden, rows.t(), out=logits)
        else:
            torch.addmm(bias[here], hidden, rows.t(), out=logits)
        _ops.amplify_chunk(
            logits, target, factors, amplifier, ignore_index, first_class + start, classes,
            divide_by if reduction == "mean" else None, losses, scratch, for_any,
        )  # fmt: skip
        if for_hidden and wide == hidden.dtype:
            grad_hidden.addmm_(logits, rows)
        elif for_hidden:
            grad_hidden += logits @ rows
        if for_weight:
            torch.mm(logits.t(), hidden, out=grad_weight[here])
        if for_bias:
            grad_bias[here] = logits.sum(0)
    return losses[0].to(wide), grad_hidden, grad_weight, grad_bias


@linear_amplify.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, kind: str, reduction: str,
    ignore_index: int, first_class: int, classes: int, alpha: float, beta: float, max_input: float, t_neg: float,
    t_pos: float, for_hidden: bool, for_weight: bool, for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(hidden, weight, bias, target, class_weight, classes)
    wide = _ops.arithmetic(hidden.dtype)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if for_hidden else 0, dtype=wide),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, target, class_weight, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, factor: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if factor is None:
        return (None,) * 18
    hidden, weight, bias, target, class_weight, *grads = ctx.saved_tensors
    kind, reduction, ignore_index, first_class, classes, alpha, beta, max_input, t_neg, t_pos, *_ = ctx.options
    if torch.is_grad_enabled():  # a second derivative may be asked for
        if (first_class, classes) != (0, weight.shape[0]):
            raise NotImplementedError("second derivatives need all classes in one place: use gradamp.reference")
        logits = F.linear(hidden, weight, bias)
        error = reference.gradient(
            logits, target, Amplifier(kind, alpha, beta, max_input, (t_neg, t_pos)),
            weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        error = (error * factor).to(hidden.dtype)
        plain = (error @ weight, error.t() @ hidden, error.sum(0))
        given = [g if kept.numel() else None for g, kept in zip(plain, grads, strict=True)]
    else:
        given = [_ops.scaled(g, factor) if g.numel() else None for g in grads]
        if given[0] is not None:
            given[0] = given[0].to(hidden.dtype)
    return *given, *(None,) * 15


linear_amplify.register_autograd(_backward, setup_context=_save)
