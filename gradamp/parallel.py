"""A linear layer and its loss with the classes sharded over the ranks of a process group (tensor parallelism).

Every rank holds some classes' weights and all of the hidden units. Without a normaliser no rank needs another's logits:
what the ranks exchange is the sum of the hidden units' gradients, N x D numbers, and of the loss, one. (A sharded
softmax exchanges two numbers for each sample before its gradient can begin.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradamp import _ops
from gradamp.amplifier import MAX_INPUT, Amplifier
from gradamp.linear import linear_amplify, needed, prepare
from gradamp.options import ShardOptions, documented

if TYPE_CHECKING:
    from gradamp.options import Unpack

__all__ = ["parallel_linear_exp_ga", "parallel_linear_pow3_ga", "shard_of_classes"]


def shard_of_classes(num_classes: int, rank: int, world_size: int) -> range:
    """The classes of a rank: consecutive, the first ranks holding one more where they do not divide evenly."""
    if not 0 <= rank < world_size:
        raise ValueError(f"expected 0 <= rank < {world_size}, got {rank}")
    each, more = divmod(num_classes, world_size)
    start = rank * each + min(rank, more)
    return range(start, start + each + (rank < more))


@documented
def parallel_linear_exp_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    alpha: float = 0.5,
    max_input: float = MAX_INPUT,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[ShardOptions],
) -> Tensor:
    """:func:`gradamp.linear_exp_ga` with the classes sharded over a process group.

    Parameters
    ----------
    {shard}
    {exp}
    {shard options}
    """
    return parallel_loss(hidden, weight, bias, target, Amplifier("exp", alpha, 0, max_input, target_values), **options)


@documented
def parallel_linear_pow3_ga(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    alpha: float = 0.001,
    beta: float = 0.0,
    target_values: tuple[float, float] = (0.0, 2.0),
    **options: Unpack[ShardOptions],
) -> Tensor:
    """:func:`gradamp.linear_pow3_ga` with the classes sharded over a process group.

    Parameters
    ----------
    {shard}
    {pow3}
    {shard options}
    """
    amplifier = Amplifier("pow3", alpha, beta, target_values=target_values)
    return parallel_loss(hidden, weight, bias, target, amplifier, **options)


def parallel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    amplifier: Amplifier,
    *,
    num_classes: int,
    process_group: Any = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss of any amplifier, with the arguments of :func:`parallel_linear_exp_ga`."""
    hidden, weight, bias, target = prepare(hidden, weight, bias, target, class_weight, reduction)
    shard = shard_of_classes(num_classes, dist.get_rank(process_group), dist.get_world_size(process_group))
    if weight.shape[0] != len(shard):
        raise ValueError(
            f"expected weight of classes {shard.start} to {shard.stop - 1} of {num_classes}, {len(shard)} rows, "
            f"got {weight.shape[0]}"
        )
    options = (
        amplifier.kind, amplifier.settings, reduction, ignore_index, shard.start, num_classes,
        needed(hidden, weight, bias),
    )  # fmt: skip
    return _ShardedLoss.apply(hidden, weight, bias, target, class_weight, options, process_group)


def _amplify_shard(inputs: tuple[Tensor | None, ...], options: tuple[Any, ...], group: Any) -> tuple[Tensor, ...]:
    """What ``linear_amplify`` returns, with the loss and the gradient of the hidden units of all ranks."""
    outputs = linear_amplify(*inputs, *options)
    loss, _, grad_hidden, *_ = outputs
    sums = [loss, grad_hidden] if grad_hidden.numel() else [loss]
    for work in [dist.all_reduce(t, group=group, async_op=True) for t in sums]:
        work.wait()
    return outputs


class _ShardedLoss(torch.autograd.Function):
    """Forward: this rank's loss and gradients, then the two sums over ranks. Backward: hands the gradients out."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Any,
                options: tuple[Any, ...], process_group: Any) -> Tensor:  # fmt: skip
        inputs = (hidden, weight, bias, target, class_weight)
        loss, *saved = _amplify_shard(inputs, options, process_group)
        ctx.arguments = (options, process_group)
        ctx.save_for_backward(*inputs, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise NotImplementedError("sharded losses have no second derivatives: use gradamp.reference")
        *inputs, rest, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        grads = _ops.hand_out(
            ctx,
            (grad_hidden, grad_weight, grad_bias),
            factor * rest,
            lambda: _amplify_shard(inputs, *ctx.arguments)[2:],
        )
        grads[0] = grads[0].to(inputs[0].dtype)
        options, _ = ctx.arguments
        return *(g if is_needed else None for g, is_needed in zip(grads, options[-1], strict=True)), *(None,) * 4
