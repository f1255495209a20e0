"""Step 3 of *lose*: the only file of this room that takes ``data_ptr()``.

``gradamp::amplify`` and ``gradamp::linear_amplify`` return a loss together with its gradient; their backward passes
multiply that gradient by the one that arrives, in place and without waiting for the device, or compute it then. All other
derivatives come from :mod:`gradamp.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from gradamp import reference
from gradamp.amplifier import KINDS, Amplifier
from platonic_core import _C
from platonic_core.launch import pointer, where
from platonic_core.memory import recycled

__all__ = [
    "amplify",
    "amplify_",
    "amplify_chunk",
    "arithmetic",
    "check_weight",
    "denominator",
    "hand_out",
    "is_transformed",
    "partials",
    "scale_",
]

# N samples, C classes, d1, ... further dimensions, P their product

_kernels = _C.gradamp
_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
_STREAMED_FROM = 32 << 20  # bytes of a gradient that no cache will keep


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is at work, whose derivatives and batches the ops do not know.

    torch has no documented question for it: ops can be told of vmap, but not of forward-mode derivatives (jvp, hessian).
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type that a kernel computes in, and the type of its losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> None:
    if x.dtype not in _TYPES:
        raise TypeError(f"expected logits of float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"expected logits [N, C] or [N, C, d1, ...], got shape {tuple(x.shape)}")
    if target.device != x.device:
        raise ValueError(f"expected target on {x.device} as the logits are, got {target.device}")
    indices = (x.shape[0], *x.shape[2:])
    if target.is_floating_point():
        if target.shape != x.shape:
            raise ValueError(f"expected dense target of shape {tuple(x.shape)}, got {tuple(target.shape)}")
    elif target.dtype != torch.int64:
        raise TypeError(f"expected target of int64 (class indices) or floating point (dense), got {target.dtype}")
    elif tuple(target.shape) != indices:
        raise ValueError(f"expected class indices of shape {tuple(indices)}, got {tuple(target.shape)}")
    if weight is not None:
        check_weight(weight, x.shape[1], x.device)


def check_transformed(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int) -> None:
    """:func:`_check` for the reference, and class indices."""
    _check(x, target, weight)
    if not target.is_floating_point():
        check_indices(target, x.shape[1], ignore_index)


def check_indices(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    if torch.compiler.is_compiling() or target.device.type != "cpu":
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(target):
        target = torch._C._functorch.get_unwrapped(target)
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if len(wrong):
        raise IndexError(f"expected class indices from 0 to {classes - 1} or {ignore_index}, got {int(wrong[0])}")


def check_weight(weight: torch.Tensor, classes: int, device: torch.device) -> None:
    if tuple(weight.shape) != (classes,):
        raise ValueError(f"expected weight of shape {(classes,)}, one for each class, got {tuple(weight.shape)}")
    if not weight.is_floating_point() or weight.device != device:
        raise ValueError(f"expected weight of floating point on {device}, got {weight.dtype} on {weight.device}")


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether the classes of a sample lie side by side, as in a transposed or channels-last tensor."""
    return x.ndim > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, of the shape of `x` and the memory order of its gradient: channels-last or contiguous."""
    last = _is_channels_last(x)
    shape = x.movedim(1, -1).shape if last else x.shape
    new = recycled(shape, dtype) if x.device.type == "cpu" else torch.empty(shape, dtype=dtype, device=x.device)
    return new.movedim(-1, 1) if last else new


def partials(device: torch.device) -> torch.Tensor | None:
    if device.type == "cpu":
        return None
    return torch.empty(_kernels.amplify_partials, dtype=torch.float64, device=device)


def denominator(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, classes: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weight of all samples with class indices, [1] float64; on the CPU raises IndexError for a wrong index."""
    total = torch.empty(1, dtype=torch.float64, device=target.device)
    scratch = partials(target.device)
    _kernels.sum_denominator(
        target.data_ptr(), target.numel(), ignore_index, classes, pointer(weight), dtype == torch.float64,
        total.data_ptr(), pointer(scratch), *where(target),
    )  # fmt: skip
    return total


def _run(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, factor: torch.Tensor | None, kind: str,
    reduction: str, ignore_index: int, settings: Sequence[float], grad: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """The loss; the gradient goes to `grad`, of the layout of `x`, which is contiguous or channels-last."""
    _check(x, target, weight)
    wide = arithmetic(x.dtype)
    dense = target.to(wide) if target.is_floating_point() else None
    indices = target.contiguous() if dense is None else None
    weight = None if weight is None else weight.to(wide).contiguous()
    factor = None if factor is None else factor.to(wide)
    samples = (x.shape[0], *x.shape[2:])
    pixels = math.prod(samples[1:])
    shape = (x.shape[0], x.shape[1], pixels)
    if _is_channels_last(x):
        dense = None if dense is None else dense.movedim(1, -1).contiguous()
        shape = (x.shape[0] * pixels, x.shape[1], 1)
    elif dense is not None:
        dense = dense.contiguous()
    divide_by = None
    if indices is not None and (reduction == "mean" or x.device.type == "cpu"):
        divide_by = denominator(indices, weight, ignore_index, x.shape[1], wide)
    elif reduction == "mean":
        divide_by = torch.full((1,), x.shape[0] * pixels, dtype=torch.float64, device=x.device)
    losses = torch.empty(samples if reduction == "none" else (1,), dtype=torch.float64, device=x.device)
    scratch = partials(x.device)
    _kernels.amplify(
        KINDS.index(kind), _TYPES[x.dtype], shape, x.data_ptr(), pointer(grad), pointer(indices), pointer(dense),
        pointer(weight), ignore_index, 0, x.shape[1], tuple(settings), x.numel() * x.itemsize >= _STREAMED_FROM,
        pointer(divide_by) if reduction == "mean" else 0, pointer(factor), reduction == "none", False,
        losses.data_ptr(), pointer(scratch), *where(x),
    )  # fmt: skip
    return losses.to(wide).view(() if reduction != "none" else samples)


@torch.library.custom_op("gradamp::amplify", mutates_args=())
def amplify(
    x: torch.Tensor,  # [N, C, d1, ...]
    target: torch.Tensor,  # int64 [N, d1, ...] or floating point [N, C, d1, ...]
    weight: torch.Tensor | None,  # [C]
    factor: torch.Tensor | None,  # [], of the gradient alone
    kind: str,
    reduction: str,
    ignore_index: int,
    settings: list[float],
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, [] or [N, d1, ...], and its gradient like x ([0] without); see csrc/gradamp/amplify.h."""
    _check(x, target, weight)
    if not x.is_contiguous() and not _is_channels_last(x):
        x = x.contiguous()
    grad = _like(x, x.dtype) if with_gradient else None
    loss = _run(x, target, weight, factor, kind, reduction, ignore_index, settings, grad)
    return loss, x.new_empty(0) if grad is None else grad


@amplify.register_fake
def _(
    x: torch.Tensor, target: torch.Tensor, weight: Any, factor: Any, kind: str, reduction: str, ignore_index: int,
    settings: list[float], with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    _check(x, target, weight)
    samples = (x.shape[0], *x.shape[2:]) if reduction == "none" else ()
    loss = x.new_empty(samples, dtype=arithmetic(x.dtype))
    if not with_gradient:
        return loss, x.new_empty(0)
    if _is_channels_last(x):
        return loss, x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1)
    return loss, x.new_empty(x.shape)


def amplify_(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, factor: torch.Tensor | None,
    with_gradient: bool, kind: str, reduction: str, ignore_index: int, settings: Sequence[float],
) -> torch.Tensor:  # fmt: skip
    """The loss; the gradient takes the place of `x`."""
    if not x.is_contiguous() and not _is_channels_last(x):
        raise ValueError("inplace=True needs logits that are contiguous or channels-last")
    grad = x if with_gradient else None
    return _run(x, target, weight, factor, kind, reduction, ignore_index, settings, grad)


def amplify_chunk(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, amplifier: Amplifier, ignore_index: int,
    first_class: int, classes: int, divide_by: torch.Tensor | None, losses: torch.Tensor, scratch: torch.Tensor | None,
    with_gradient: bool,
) -> None:  # fmt: skip
    """Adds the loss of the classes from `first_class` on, logits `x` [N, part of C], to `losses`; x becomes its gradient.

    `weight` [classes] is of the type of arithmetic; targets may be classes that are not here. Nothing is checked.
    """
    _kernels.amplify(
        KINDS.index(amplifier.kind), _TYPES[x.dtype], (x.shape[0], x.shape[1], 1), x.data_ptr(),
        x.data_ptr() if with_gradient else 0, target.data_ptr(), 0, pointer(weight), ignore_index, first_class,
        classes, tuple(amplifier.settings), False, pointer(divide_by), 0, False, True, losses.data_ptr(),
        pointer(scratch), *where(x),
    )  # fmt: skip


# custom_op would take ten times as long to get here: for small batches longer than the kernel.
torch.library.define("gradamp::scale_", "(Tensor(a!) grad, Tensor factor) -> ()")


@torch.library.impl("gradamp::scale_", ("cpu", "cuda"))
def _(grad: torch.Tensor, factor: torch.Tensor) -> None:
    factor = factor.to(arithmetic(grad.dtype)).contiguous()
    if factor.ndim == 0:
        shape = (1, 1, grad.numel())
    elif _is_channels_last(grad):
        shape = (factor.numel(), grad.shape[1], 1)
    else:
        shape = (grad.shape[0], grad.shape[1], math.prod(grad.shape[2:]))
    _kernels.scale_gradient(
        _TYPES[grad.dtype], shape, grad.data_ptr(), factor.data_ptr(), factor.ndim > 0, *where(grad)
    )  # fmt: skip


@torch.library.register_fake("gradamp::scale_")
def _(grad: torch.Tensor, factor: torch.Tensor) -> None: ...


def scale_(grad: torch.Tensor, factor: torch.Tensor) -> None:
    """grad [N, C, d1, ...] *= factor, [N, d1, ...] or []. A factor of 1 costs nothing, on CUDA one launch."""
    torch.ops.gradamp.scale_(grad, factor)


def _times(grad: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (grad * (factor.unsqueeze(1) if factor.ndim else factor)).to(grad.dtype)


def hand_out(
    ctx: Any, grads: Sequence[torch.Tensor], factor: torch.Tensor, compute: Callable[[], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """The saved gradients times `factor`, in their place; `compute` makes them anew for every later backward pass.

    Traced gradients are multiplied by plain torch.
    """
    if torch.compiler.is_compiling() or any(type(t) is not torch.Tensor for t in (*grads, factor)):
        return [_times(grad, factor) for grad in grads]
    grads = (
        compute() if hasattr(ctx, "handed_out") else [grad.data for grad in grads]
    )  # .data: with a version of its own
    ctx.handed_out = True
    for grad in grads:
        scale_(grad, factor)
    return list(grads)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, target, weight, _, *ctx.options, ctx.now = inputs
    ctx.save_for_backward(x, target, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for output[1], as large as the logits


def _backward(ctx: Any, factor: torch.Tensor | None, _: Any) -> tuple[torch.Tensor | None, ...]:
    if factor is None:
        return (None,) * 9
    x, target, weight, saved = ctx.saved_tensors
    kind, reduction, ignore_index, settings = ctx.options
    amplifier = Amplifier.of(kind, settings)
    for_x, for_target, for_weight, *_ = ctx.needs_input_grad
    grad = grad_target = grad_weight = None

    def compute(factor: torch.Tensor | None = None) -> torch.Tensor:
        return amplify(x, target, weight, factor, kind, reduction, ignore_index, settings, True)[1]

    if for_x and torch.is_grad_enabled():  # a second derivative may be asked for
        plain = reference.gradient(x, target, amplifier, weight=weight, ignore_index=ignore_index, reduction=reduction)
        grad = _times(plain, factor).to(x.dtype)
    elif for_x and ctx.now:
        (grad,) = hand_out(ctx, [saved], factor, lambda: [compute()])
    elif for_x:
        grad = compute(factor)
    if for_target or for_weight:
        grad_target, grad_weight = reference.target_gradients(x, target, amplifier, weight, reduction, factor)
    return grad, grad_target, grad_weight, *(None,) * 6


amplify.register_autograd(_backward, setup_context=_save)
