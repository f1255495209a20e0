"""Options that several losses have: their types, checks and texts, in one place.

Their defaults are those of ``functional.amplified_loss``, ``linear.linear_loss`` and ``parallel.parallel_loss``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack as Unpack  # of Python from 3.11 on

__all__ = ["LayerOptions", "LossOptions", "ShardOptions", "check_reduction", "documented", "refuse_gradient"]

F = TypeVar("F", bound=Callable[..., Any])


class LossOptions(TypedDict, total=False):
    """Of a loss of logits."""

    weight: Tensor | None
    ignore_index: int
    reduction: str
    inplace: bool


class LayerOptions(TypedDict, total=False):
    """Of a linear layer and its loss."""

    class_weight: Tensor | None
    ignore_index: int
    reduction: str


class _Sharded(TypedDict):
    num_classes: int


class ShardOptions(_Sharded, LayerOptions, total=False):
    """Of a linear layer and its loss, sharded."""

    process_group: Any


def check_reduction(reduction: str, known: tuple[str, ...]) -> None:
    if reduction not in known:
        raise ValueError(f"expected reduction of {', '.join(known)}, got {reduction!r}")


def refuse_gradient(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.requires_grad:
        raise NotImplementedError(
            f"with class indices there is no gradient of {name}, as in torch: detach it, or use gradamp.reference.loss"
        )


_ALPHA = {
    "exp": """alpha : float, default 0.5
    max_input : float, default 16
        Above it y continues as the straight line alpha e^max_input (1 + x - max_input), and the loss as its integral, so
        that neither overflows. In [-80, 80].""",
    "pow3": """alpha : float, default 0.001
    beta : float, default 0
        At least 0.""",
}
_TARGET_VALUES = """target_values : (float, float), default {targets}
        The targets (t_neg, t_pos) that class indices stand for."""
_IGNORE_INDEX = """ignore_index : int, default -100
        Samples of this class index have no loss and no gradient."""
_ERRORS = """TypeError, ValueError
        If a dtype, a shape or an option is not as above.
    IndexError
        If a class index is out of range (on CUDA: a device-side assertion, as in torch).
    NotImplementedError
        If {weight} needs a gradient{unless}, which torch's cross-entropy refuses too{more}."""

_LOGITS = """input : Tensor [C], [N, C] or [N, C, d1, ...]
        Pre-activations x: no softmax.
    target : Tensor
        Class indices of int64, [], [N] or [N, d1, ...], or dense targets of floating point, shaped like `input`, which are
        taken as they are and of which none are ignored."""

_LOSS = f"""weight : Tensor [C], optional
        A factor for every class, as in :func:`torch.nn.functional.cross_entropy`: of the samples of that class with class
        indices, of the terms of that class with dense targets.
    {_IGNORE_INDEX}
    reduction : {{"mean", "sum", "none"}}, default "mean"
        "mean" divides by the number of samples (pixels), or their weight, that are not ignored; an empty batch gives
        NaN, as in torch.
    inplace : bool, default False
        Write the gradient over the logits, which must not be used afterwards and may be contiguous or channels-last.
        Saves the memory of the gradient. No effect where no gradient is needed, or inside ``torch.compile``. Second
        derivatives, gradients of targets and weights and a second backward pass are refused.

    Returns
    -------
    Tensor, [] or [N, d1, ...] with reduction "none"
        Of float32 for 16-bit logits: without a normaliser the loss of a sample grows with the number of classes.

    Raises
    ------
    {_ERRORS.format(weight="`weight`", unless=" with class indices", more="")}

    Notes
    -----
    Logits and gradient pass through memory once. Arithmetic is in float32 for float16, bfloat16 and float32; gradients in
    float16 and bfloat16 saturate at the largest finite number. With logits of float16 and one loss the gradient is computed
    in the backward pass, with the factor that arrives (a GradScaler's): what "mean" divides is rounded once; losses of samples
    ("none") have gradients of float16 before that. Second derivatives (``create_graph=True``, ``torch.func``), and the
    gradients of dense targets and of their weight, are those of :mod:`gradamp.reference`."""

_LAYER = f"""class_weight : Tensor [C], optional
        A factor for the samples of every class, as `weight` of :func:`torch.nn.functional.cross_entropy`.
    {_IGNORE_INDEX}
    reduction : {{"mean", "sum"}}, default "mean\""""

_TEXTS = {
    "logits": _LOGITS,
    "loss options": _LOSS,
    "layer": """hidden : Tensor [..., D]
    weight : Tensor [C, D]
    bias : Tensor [C] or None
    target : Tensor, int64 [...]
        Class indices. Dense targets would be as large as the logits; for them there is the loss of the logits.""",
    "layer options": f"""{_LAYER}

    Returns
    -------
    Tensor, []
        Of float32 for 16-bit input.

    Raises
    ------
    {_ERRORS.format(weight="`class_weight`", unless="", more="")}

    Notes
    -----
    Equals the loss of ``F.linear(hidden, weight, bias)``. Gradients are computed with the loss, for those inputs that
    need one, and multiplied in the backward pass by the gradient that arrives. Beside them, memory holds the logits of a
    chunk: at most a sixteenth of all classes, or 256. In float16 and bfloat16 the gradient of `hidden` is summed over
    chunks in float32. Under autocast the matrix products run in its type. Second derivatives hold (N, C) in memory.""",
    "shard": """hidden : Tensor [..., D]
        The same on every rank.
    weight : Tensor [C of this rank, D]
        The rows of ``shard_of_classes(num_classes, rank, world_size)``.
    bias : Tensor [C of this rank] or None
    target : Tensor, int64 [...]
        Indices among all classes, the same on every rank.
    num_classes : int
        Of all ranks together.
    process_group : ProcessGroup, optional
        The default group if left out.""",
    "shard options": f"""{_LAYER.replace("[C]", "[num_classes]")}

    Returns
    -------
    Tensor, []
        The loss over all classes, the same on every rank, of float32 for 16-bit input. The gradient of `hidden` is that
        over all classes too, those of `weight` and `bias` are this rank's own: none needs a further all-reduce.

    Raises
    ------
    {_ERRORS.format(weight="`class_weight`", unless="", more="; of second derivatives")}
    ValueError
        If this rank does not hold the classes that it should.""",
    "exp": f"{_ALPHA['exp']}\n    {_TARGET_VALUES.format(targets='(0, 2)')}",
    "pow3": f"{_ALPHA['pow3']}\n    {_TARGET_VALUES.format(targets='(0, 2)')}",
    "linear": _TARGET_VALUES.format(targets="(-1, 1)"),
}


def documented(function: F) -> F:
    """Puts the texts above in the place of their names in braces."""
    if function.__doc__:  # absent under python -OO
        for name, text in _TEXTS.items():
            function.__doc__ = function.__doc__.replace("{" + name + "}", text)
    return function
