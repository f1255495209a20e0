"""A linear layer and its loss with the classes sharded over the ranks of a process group (tensor parallelism).

Every rank holds some classes' weights and all of the hidden units. Without a normaliser no rank needs another's logits:
what the ranks exchange is the sum of the hidden units' gradients, N x D numbers, and of the loss, one. (A sharded
softmax exchanges two numbers for each sample before its gradient can begin.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradamp import _ops
from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.functional import check_reduction
from gradamp.linear import linear_amplify

__all__ = ["parallel_linear_exp_ga", "parallel_linear_pow3_ga", "shard_of_classes"]


def shard_of_classes(num_classes: int, rank: int, world_size: int) -> range:
    """The classes of a rank: consecutive, the first ranks holding one more where they do not divide evenly."""
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < {world_size}, got {rank}")
    each, more = divmod(num_classes, world_size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


_OPTIONS = """hidden : Tensor [..., D]
        The same on every rank.
    weight : Tensor [C of this rank, D]
        The rows of ``shard_of_classes(num_classes, rank, world_size)``.
    bias : Tensor [C of this rank] or None
    target : Tensor, int64 [...]
        Indices among all classes, the same on every rank.
    num_classes : int
        Of all ranks together.
    process_group : ProcessGroup, optional
        The default group if left out.
    class_weight : Tensor [num_classes], optional
        The same on every rank.
    reduction : {"mean", "sum"}, default "mean"
    others
        As in :func:`gradamp.{function}`.

    Returns
    -------
    Tensor, []
        The loss over all classes, the same on every rank, of float32 for 16-bit input. The gradient of `hidden` is that
        over all classes too, those of `weight` and `bias` are this rank's own: none needs a further all-reduce.

    Raises
    ------
    ValueError, TypeError, IndexError
        As the function without shards, and if this rank does not hold the classes that it should."""


def parallel_linear_exp_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int,
    process_group: Any = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
) -> Tensor:
    """:func:`gradamp.linear_exp_ga` with the classes sharded over a process group.

    Parameters
    ----------
    {options}
    """
    amplifier = Amplifier("exp", alpha=alpha, max_input=max_input, target_values=target_values)
    options = (num_classes, process_group, class_weight, ignore_index, reduction)
    return _parallel_loss(hidden, weight, bias, target, amplifier, *options)


def parallel_linear_pow3_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    num_classes: int,
    process_group: Any = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    target_values: tuple[float, float] = (0.0, 2.0),
    alpha: float = 0.001,
    beta: float = 0.0,
) -> Tensor:
    """:func:`gradamp.linear_pow3_ga` with the classes sharded over a process group.

    Parameters
    ----------
    {options}
    """
    amplifier = Amplifier("pow3", alpha=alpha, beta=beta, target_values=target_values)
    options = (num_classes, process_group, class_weight, ignore_index, reduction)
    return _parallel_loss(hidden, weight, bias, target, amplifier, *options)


for _function, _name in ((parallel_linear_exp_ga, "linear_exp_ga"), (parallel_linear_pow3_ga, "linear_pow3_ga")):
    if _function.__doc__:  # absent under python -OO
        _function.__doc__ = _function.__doc__.replace("{options}", _OPTIONS.replace("{function}", _name))


def _parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    amplifier: Amplifier,
    num_classes: int,
    process_group: Any,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    check_reduction(reduction, ("sum", "mean"))
    if class_weight is not None and class_weight.requires_grad:
        raise NotImplementedError("the gradient of class_weight is not computed: detach it")
    shard = shard_of_classes(num_classes, dist.get_rank(process_group), dist.get_world_size(process_group))
    if weight.shape[0] != len(shard):
        raise ValueError(
            f"expected weight of classes {shard.start} to {shard.stop - 1} of {num_classes}, {len(shard)} rows, "
            f"got {weight.shape[0]}"
        )
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    options = (class_weight, amplifier, reduction, ignore_index, shard.start, num_classes)
    return _ShardedLoss.apply(hidden, weight, bias, target, *options, process_group)


class _ShardedLoss(torch.autograd.Function):
    """Forward: this rank's loss and gradients, then the two sums over ranks. Backward: hands the gradients out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Any,
                amplifier: Amplifier, reduction: str, ignore_index: int, first_class: int, num_classes: int,
                process_group: Any) -> Tensor:  # fmt: skip
        needed = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
        loss, *grads = linear_amplify(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(), target, class_weight,
            amplifier.kind, reduction, ignore_index, first_class, num_classes, *amplifier.settings, *needed,
        )  # fmt: skip
        waits = [dist.all_reduce(loss, group=process_group, async_op=True)]
        if needed[0]:
            waits.append(dist.all_reduce(grads[0], group=process_group, async_op=True))
        for wait in waits:
            wait.wait()
        ctx.needed = needed
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise NotImplementedError("sharded losses have no second derivatives: use gradamp.reference")
        grads = [
            _ops.scaled(g, factor).to(ctx.dtype) if needed else None
            for g, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)
        ]
        return *grads, *(None,) * 8
