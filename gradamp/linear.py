"""The last linear layer and its loss together, in chunks of classes: the logits (N, C) are never in memory.

An amplifier has no normaliser, so the gradient of a chunk of classes needs nothing of the others: logits of the chunk,
loss and gradient in their place, products with hidden units and weights, next chunk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradamp import _ops, reference
from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.options import LayerOptions, check_reduction, documented, refuse_gradient

if TYPE_CHECKING:
    from gradamp.options import Unpack

__all__ = ["chunk_classes", "linear_exp_ga", "linear_loss", "linear_pow3_ga", "prepare"]

# N samples, D hidden units, C classes

_BUFFER_BYTES = 16 << 20  # logits of a chunk: about what a cache shared by all cores keeps
_FEWEST_CLASSES = 256  # of a chunk: below, the matrix products lose speed


@documented
def linear_exp_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[LayerOptions],
) -> Tensor:
    """A linear layer and :func:`gradamp.exp_ga` of its outputs, without the outputs in memory.

    Parameters
    ----------
    {layer}
    {exp}
    {layer options}
    """
    return linear_loss(hidden, weight, bias, target, Amplifier("exp", alpha, 0, max_input, target_values), **options)


@documented
def linear_pow3_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    alpha: float = 0.001,
    beta: float = 0.0,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[LayerOptions],
) -> Tensor:
    """A linear layer and :func:`gradamp.pow3_ga` of its outputs, without the outputs in memory.

    Parameters
    ----------
    {layer}
    {pow3}
    {layer options}
    """
    amplifier = Amplifier("pow3", alpha, beta, target_values=target_values)
    return linear_loss(hidden, weight, bias, target, amplifier, **options)


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    amplifier: Amplifier,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss of any amplifier, with the arguments of :func:`linear_exp_ga`."""
    hidden, weight, bias, target = prepare(hidden, weight, bias, target, class_weight, reduction)
    if _ops.is_transformed():
        _check(hidden, weight, bias, target, class_weight, weight.shape[0])
        _ops.check_indices(target, weight.shape[0], ignore_index)
        return reference.loss(
            F.linear(hidden, weight, bias), target, amplifier,
            weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    return linear_amplify(
        hidden, weight, bias, target, class_weight, amplifier.kind, amplifier.settings, reduction, ignore_index, 0,
        weight.shape[0], needed(hidden, weight, bias),
    )[0]  # fmt: skip


def prepare(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Samples in one dimension, in the type of autocast; raises for what no linear layer with a loss can do."""
    check_reduction(reduction, ("sum", "mean"))
    refuse_gradient("class_weight", class_weight)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"expected target of shape {tuple(hidden.shape[:-1])} for hidden {tuple(hidden.shape)}, got {tuple(target.shape)}"
        )
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, target.reshape(-1)


def needed(*inputs: Tensor | None) -> list[bool]:
    """Which gradients a backward pass may ask for."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in inputs]


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
    settings: list[float],
    reduction: str,
    ignore_index: int,
    first_class: int,
    classes: int,
    needed: list[bool],  # of the gradients of hidden, weight and bias
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of the classes that are here, a factor [] that gradients lack, and the gradients asked for ([0] without).

    The gradient of `hidden` is in the type of arithmetic: shards of classes are yet to be added to it.

    A mean divides gradients by so much that float16 would lose them before a GradScaler's factor arrives, and those of a
    sum may overflow: half of the division (of its exponent) waits for the backward pass there.
    """
    _check(hidden, weight, bias, target, class_weight, classes)
    amplifier = Amplifier.of(kind, settings)
    wide = _ops.arithmetic(hidden.dtype)
    target = target.contiguous()
    factors = None if class_weight is None else class_weight.to(wide).contiguous()
    denominator = _ops.denominator(target, factors, ignore_index, classes, wide)  # checks target
    divide_by, rest = denominator if reduction == "mean" else None, torch.ones_like(denominator)
    if reduction == "mean" and hidden.dtype == torch.float16:
        divide_by = torch.full_like(denominator, 2.0 ** round(math.log2(max(hidden.shape[0], 1)) / 2))
        rest = divide_by / denominator
    losses = torch.zeros(1, dtype=torch.float64, device=hidden.device)
    scratch = _ops.partials(hidden.device)
    for_hidden, for_weight, for_bias = needed
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
            logits, target, factors, amplifier, ignore_index, first_class + start, classes, divide_by, losses, scratch,
            any(needed),
        )  # fmt: skip
        if for_hidden and wide == hidden.dtype:
            grad_hidden.addmm_(logits, rows)
        elif for_hidden:
            grad_hidden += logits @ rows
        if for_weight:
            torch.mm(logits.t(), hidden, out=grad_weight[here])
        if for_bias:
            grad_bias[here] = logits.sum(0)
    return (losses * rest)[0].to(wide), rest[0].to(wide), grad_hidden, grad_weight, grad_bias


@linear_amplify.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, class_weight: Any, kind: str, settings: list[float],
    reduction: str, ignore_index: int, first_class: int, classes: int, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check(hidden, weight, bias, target, class_weight, classes)
    wide = _ops.arithmetic(hidden.dtype)
    for_hidden, for_weight, for_bias = needed
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape if for_hidden else 0, dtype=wide),
        torch.empty_like(weight) if for_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if for_bias else 0),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, factor: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if factor is None:
        return (None,) * 12
    hidden, weight, bias, target, class_weight, rest, *saved = ctx.saved_tensors
    kind, settings, reduction, ignore_index, *_ = ctx.options
    if torch.is_grad_enabled():  # a second derivative may be asked for
        error = reference.gradient(
            F.linear(hidden, weight, bias), target, Amplifier.of(kind, settings),
            weight=class_weight, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
        error = (error * factor).to(hidden.dtype)
        grads = [error @ weight, error.t() @ hidden, error.sum(0)]
    else:
        inputs = (hidden, weight, bias, target, class_weight)
        grads = _ops.hand_out(ctx, saved, factor * rest, lambda: linear_amplify(*inputs, *ctx.options)[2:])
        grads[0] = grads[0].to(hidden.dtype)
    wanted = [grad if is_needed else None for grad, is_needed in zip(grads, ctx.options[-1], strict=True)]
    return *wanted, *(None,) * 9


linear_amplify.register_autograd(_backward, setup_context=_save)
