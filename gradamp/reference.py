"""Every loss in plain torch: what the kernels are tested against, and what double backward is computed with.

Thesis, chapter 4. For pre-activations x, outputs y(x) and targets t the gradient of each loss is y - t (section 4.3):

- exp, section 4.6: y = alpha e^x, loss sum |y| - t ln y;
- pow3, section 4.8: y = alpha x^3 + beta, loss sum alpha x^4 / 4 + beta x - t x (the text writes y for x there);
- linear: y = x, loss sum (x - t)^2 / 2.

Everything here is differentiable any number of times, holds one-hot targets and temporaries in memory, and computes
in float32 for 16-bit input, as the kernels do.
"""

from __future__ import annotations

import math

import torch

from gradamp.amplifier import Amplifier

__all__ = ["activate", "dense_targets", "element_loss", "gradient", "loss", "sample_factors", "target_gradients"]

# N samples, C classes, d1, ... further dimensions


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in the type of arithmetic: float32 for 16-bit floating point."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def activate(x: torch.Tensor, amplifier: Amplifier) -> torch.Tensor:
    """y(x), element by element."""
    x = wide(x)
    if amplifier.kind == "linear":
        return x
    if amplifier.kind == "pow3":
        return amplifier.alpha * x * x * x + amplifier.beta
    line = amplifier.alpha * math.exp(amplifier.max_input) * (1 + (x - amplifier.max_input))
    return torch.where(x > amplifier.max_input, line, _exp_below(x, amplifier))


def _exp_below(x: torch.Tensor, amplifier: Amplifier) -> torch.Tensor:
    """alpha e^x up to max_input, finite beyond, where neither it nor its derivatives are used."""
    return amplifier.alpha * torch.exp(torch.where(x > amplifier.max_input, amplifier.max_input, x))


def element_loss(x: torch.Tensor, t: torch.Tensor, amplifier: Amplifier) -> torch.Tensor:
    """The loss of every element, whose derivative in x is y(x) - t."""
    x, t = wide(x), wide(t)
    if amplifier.kind == "linear":
        return 0.5 * (x - t) * (x - t)
    if amplifier.kind == "pow3":
        return x * (0.25 * amplifier.alpha * x * x * x + (amplifier.beta - t))
    beyond = torch.where(x > amplifier.max_input, x - amplifier.max_input, 0.0)
    line = amplifier.alpha * math.exp(amplifier.max_input) * (1 + beyond + 0.5 * beyond * beyond)
    y = torch.where(x > amplifier.max_input, line, _exp_below(x, amplifier))
    # Where t = 0 the term t ln y is 0 even at x = -infinity.
    finite = torch.where(t == 0, x.clamp(min=torch.finfo(x.dtype).min), x)
    return y - t * (finite + math.log(amplifier.alpha))


def dense_targets(x: torch.Tensor, target: torch.Tensor, amplifier: Amplifier, ignore_index: int) -> torch.Tensor:
    """Class indices [N, d1, ...] as targets [N, C, d1, ...] of t_neg and t_pos; dense targets as they are."""
    if target.is_floating_point():
        return wide(target).to(wide(x).dtype)
    t_neg, t_pos = amplifier.target_values
    classes = torch.where(target == ignore_index, 0, target)
    numbers = torch.arange(x.shape[1], device=x.device).view(-1, *[1] * (x.ndim - 2))
    return torch.where(classes.unsqueeze(1) == numbers, t_pos, t_neg).to(wide(x).dtype)


def sample_factors(
    x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors of elements [N, C or 1, d1, ...], of samples [N, d1, ...], and the denominator of a mean over samples."""
    dtype, device = wide(x).dtype, x.device
    along_classes = (-1, *[1] * (x.ndim - 2))
    if target.is_floating_point():
        samples = torch.ones(x[:, 0].shape, dtype=dtype, device=device)
        elements = torch.ones(1, dtype=dtype, device=device) if weight is None else weight.to(dtype=dtype)
        return elements.view(1, *along_classes), samples, samples.sum()
    kept = target != ignore_index
    if weight is None:
        samples = kept.to(dtype=dtype)
    else:
        samples = torch.where(kept, weight.to(dtype=dtype)[torch.where(kept, target, 0)], 0)
    return torch.ones((1,) * x.ndim, dtype=dtype, device=device), samples, samples.sum()


def loss(
    x: torch.Tensor,
    target: torch.Tensor,
    amplifier: Amplifier,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The loss that ``gradamp.functional`` computes, with the same arguments.

    Parameters
    ----------
    x : Tensor [N, C, d1, ...]
    target : Tensor, int64 [N, d1, ...] or floating point [N, C, d1, ...]
    """
    t = dense_targets(x, target, amplifier, ignore_index)
    elements, samples, denominator = sample_factors(x, target, weight, ignore_index)
    per_sample = (elements * element_loss(x, t, amplifier)).sum(1)
    per_sample = torch.where(samples == 0, torch.zeros_like(per_sample), samples * per_sample)
    if reduction == "none":
        return per_sample
    total = per_sample.sum()
    return total / denominator if reduction == "mean" else total


def gradient(
    x: torch.Tensor,
    target: torch.Tensor,
    amplifier: Amplifier,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """The derivative in x of :func:`loss`, of the sum of losses with reduction "none"; itself differentiable in x."""
    t = dense_targets(x, target, amplifier, ignore_index)
    elements, samples, denominator = sample_factors(x, target, weight, ignore_index)
    factor = samples.unsqueeze(1) * elements
    error = activate(x, amplifier) - t
    error = torch.where(factor == 0, torch.zeros_like(error), factor * error)
    return error / denominator if reduction == "mean" else error


def target_gradients(
    x: torch.Tensor,
    target: torch.Tensor,
    amplifier: Amplifier,
    weight: torch.Tensor | None,
    reduction: str,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The derivatives in dense targets and in their weight, [C] or None without one, of :func:`loss` times `factor`.

    `factor` is [N, d1, ...] with reduction "none" and [] otherwise.
    """
    t = wide(target)
    elements, _, denominator = sample_factors(x, target, weight, ignore_index=0)
    factor = factor.unsqueeze(1) if factor.ndim else factor
    factor = factor / denominator if reduction == "mean" else factor
    slope = -(wide(x) - t) if amplifier.kind == "linear" else -wide(x)
    if amplifier.kind == "exp":
        slope = slope - math.log(amplifier.alpha)
    grad_target = (factor * elements * slope).to(target.dtype)
    if weight is None:
        return grad_target, None
    others = [axis for axis in range(x.ndim) if axis != 1]
    return grad_target, (factor * element_loss(x, t, amplifier)).sum(others).to(weight.dtype)
