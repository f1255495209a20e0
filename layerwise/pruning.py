"""Removal of a trained unit's least important filters (Molchanov et al., as used by Belilovsky et al., section 4.3)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from layerwise.layouts import channel_axis, watch
from layerwise.units import State, Unit, main_tensor

__all__ = ["Pruning", "PruningError", "filter_importance", "prune_unit"]

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Norm = nn.modules.batchnorm._BatchNorm


class PruningError(ValueError):
    """A unit whose filters cannot be removed."""


@dataclass(frozen=True)
class Pruning:
    """What is done to a unit when it has been trained, before the next one begins.

    Attributes
    ----------
    keep : float or int
        Share of the unit's filters that stay, or their number.
    epochs : int
        Epochs in which the head is tuned to the filters that are left; the unit does not change any more (20 in the paper).
    batches : int
        Batches from which importance is estimated.
    """

    keep: float | int = 0.5
    epochs: int = 20
    batches: int = 50

    def __post_init__(self) -> None:
        good = 0 < self.keep <= 1 if isinstance(self.keep, float) else self.keep >= 1
        if not good or self.epochs < 0 or self.batches < 1:
            raise ValueError(
                f"Pruning: expected keep from 0 to 1 or a number of filters, epochs >= 0, batches >= 1, got {self}"
            )

    def count(self, filters: int) -> int:
        """Filters that stay, of so many."""
        kept = round(self.keep * filters) if isinstance(self.keep, float) else self.keep
        return max(1, min(kept, filters))


def filter_importance(
    subnet: Callable[[State], tuple[Any, State]],
    unit: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    batches: Iterable[tuple[State, Tensor]],
) -> Tensor:
    """(C,): first-order Taylor estimate of what the loss would change by without each output channel of `unit`.

    The mean over samples of \\|mean over positions of activation x gradient\\| (Molchanov et al. 2016, equation 8).

    Raises
    ------
    ValueError
        If there are no batches.
    """
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: State) -> None:
        activation = main_tensor(output)
        activation.retain_grad()
        kept.append(activation)

    total: Tensor | None = None
    samples = 0
    handle = unit.register_forward_hook(keep)
    try:
        for state, target in batches:
            kept.clear()
            with ExitStack() as stack:
                calls = stack.enter_context(watch(unit)) if total is None else []
                outputs = subnet(state)[0]
            loss(outputs, target).mul(len(target)).backward()  # a mean over the batch; per sample below
            activation = kept[-1]
            assert activation.grad is not None
            if total is None:
                axis = channel_axis(activation.detach(), calls) or 1
            product = (activation.detach() * activation.grad).movedim(axis, 1)
            importance = product.flatten(2).mean(2).abs().sum(0) if product.dim() > 2 else product.abs().sum(0)
            total = importance if total is None else total + importance
            samples += len(target)
    finally:
        handle.remove()
    if total is None:
        raise ValueError("expected at least one batch")
    return total / samples


def _consumers(module: nn.Module, like: Tensor, channels: int) -> list[tuple[nn.Module, Tensor]]:
    """The layers that read `channels` channels, and batch normalisations before them, each with the channel that each of its
    inputs comes from. Found by running the module on channels that hold their own number; what a layer makes of them is NaN."""
    shape = [1, *like.shape[1:]]
    numbers = torch.arange(1, channels + 1, dtype=like.dtype, device=like.device)
    tags = numbers.view([1, channels] + [1] * (len(shape) - 2)).expand(shape).clone()
    found: list[tuple[nn.Module, Tensor]] = []

    def source(x: Tensor) -> Tensor:
        flat = x[0] if x.dim() == 2 else x[0].flatten(1)[:, 0]
        return flat.round().long() - 1

    def note(m: nn.Module, x: Tensor) -> None:
        if x.isnan().all():
            return  # made by a layer that is known
        if x.isnan().any():
            raise PruningError(f"{type(m).__name__} reads the unit's channels among others")
        sources = source(x)
        if any(m is other for other, _ in found):
            raise PruningError(f"{type(m).__name__} reads the unit's channels more than once")
        found.append((m, sources))

    def at_norm(m: nn.Module, inputs: Any, _output: Any) -> Tensor:
        note(m, inputs[0])
        return inputs[0]

    def at_layer(m: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        note(m, inputs[0])
        return torch.full_like(output, float("nan"))

    handles = []
    for m in module.modules():
        if isinstance(m, _Norm):
            handles.append(m.register_forward_hook(at_norm))
        elif isinstance(m, _LAYERS):
            handles.append(m.register_forward_hook(at_layer))
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        with torch.no_grad():
            module(tags)
    finally:
        for handle in handles:
            handle.remove()
        for m, mode in modes:
            m.training = mode
    if not any(isinstance(m, _LAYERS) for m, _ in found):
        raise PruningError(f"{type(module).__name__} has no convolution or linear layer that reads the unit's output")
    return found


def _without(
    follower: nn.Module, state: Tensor, readers: list[tuple[nn.Module, Tensor]], place: Tensor
) -> list[Tensor]:
    """What the follower gives where its readers see 0 in place of the channels that go."""

    def hide(sources: Tensor) -> Callable[[nn.Module, Any], Any]:
        def hook(_module: nn.Module, inputs: Any) -> Any:
            stay = (place[sources] >= 0).to(inputs[0].dtype)
            return (inputs[0] * stay.view(-1, *[1] * (inputs[0].dim() - 2)), *inputs[1:])

        return hook

    handles = [m.register_forward_pre_hook(hide(sources)) for m, sources in readers if isinstance(m, _LAYERS)]
    try:
        return _outputs(follower, state)
    finally:
        for handle in handles:
            handle.remove()


def _outputs(follower: nn.Module, state: Tensor) -> list[Tensor]:
    return [x for x in tree_leaves(follower(state)) if isinstance(x, Tensor)]


def _alike(got: list[Tensor], expected: list[Tensor]) -> bool:
    def close(a: Tensor, b: Tensor) -> bool:
        device = b.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else b.dtype
        allowed = max(1e-5, 8 * torch.finfo(dtype).eps) * (1 + b.abs().max().item())
        return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=0, atol=allowed)

    return len(got) == len(expected) and all(map(close, got, expected))


def _narrow_norm(norm: nn.Module, index: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        old = getattr(norm, name)
        if old is not None:
            _replace(norm, name, old[index])
    norm.num_features = len(index)  # type: ignore[assignment]


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.detach().clone()
    setattr(
        module, name, nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    )


def _narrow_inputs(layer: Any, index: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        layer.in_features = len(index)
    elif layer.groups != 1:
        raise PruningError("the layer that reads the unit's output has groups")
    else:
        layer.in_channels = len(index)
    _replace(layer, "weight", layer.weight[:, index])


def _narrow_outputs(layer: Any, index: Tensor) -> None:
    if isinstance(layer, nn.Linear):
        layer.out_features = len(index)
    elif layer.groups != 1:
        raise PruningError("the unit's last convolution has groups")
    else:
        layer.out_channels = len(index)
    _replace(layer, "weight", layer.weight[index])
    if layer.bias is not None:
        _replace(layer, "bias", layer.bias[index])


@torch.no_grad()
def prune_unit(unit: Unit, followers: Iterable[nn.Module], state: State, keep: Tensor) -> None:
    """Remove all output channels of `unit` but `keep`, and the inputs of its followers that they fed.

    Modules keep their identity; their parameters are replaced by smaller ones, so that optimisers have to be made anew.

    Parameters
    ----------
    unit : Unit
        One whose output channels are those of its last convolution or linear layer, with batch normalisation behind it or not.
    followers : iterable of Module
        What reads the unit's output: the next unit, and a head.
    state : State
        An input of the unit.
    keep : Tensor
        (K,) int64: channels that stay, ascending.

    Raises
    ------
    PruningError
        If the unit's output is not made by one layer alone (a residual), or a follower does more with it than feed it to
        layers (it adds a shortcut, say). The unit and its followers are then as they were.
    """
    modules = [unit, *followers]
    before = {id(m): dict(m.__dict__) for root in modules for m in root.modules()}
    tensors = [(m, dict(m._parameters), dict(m._buffers)) for root in modules for m in root.modules()]
    modes = [(m, m.training) for root in modules for m in root.modules()]
    for root in modules:
        root.eval()
    try:
        full = main_tensor(unit(state))
        channels = full.shape[1]
        inside = [m for m in unit.modules() if isinstance(m, (*_LAYERS, _Norm))]
        last = max((i for i, m in enumerate(inside) if isinstance(m, _LAYERS)), default=-1)
        if last < 0 or len(inside[last].weight) != channels:  # type: ignore[arg-type]
            raise PruningError(f"unit {unit.name!r}: its {channels} output channels are not those of its last layer")
        readers = [_consumers(follower, full, channels) for follower in modules[1:]]
        if any(min(s.min() for _, s in some) < 0 or max(s.max() for _, s in some) >= channels for some in readers):
            raise PruningError(f"unit {unit.name!r}: a mixture of its channels is read")
        place = torch.full((channels,), -1, dtype=torch.long, device=keep.device)
        place[keep] = torch.arange(len(keep), device=keep.device)
        expected = [_without(follower, full, some, place) for follower, some in zip(modules[1:], readers, strict=True)]
        _narrow_outputs(inside[last], keep)
        for norm in inside[last + 1 :]:
            _narrow_norm(norm, keep)
        for module, sources in itertools.chain.from_iterable(readers):
            index = (place[sources] >= 0).nonzero().flatten()
            (_narrow_norm if isinstance(module, _Norm) else _narrow_inputs)(module, index)
        pruned = main_tensor(unit(state))
        if pruned.shape[1] != len(keep) or not torch.allclose(pruned, full[:, keep], rtol=1e-4, atol=1e-5):
            raise PruningError(f"unit {unit.name!r}: its channels do not stand for themselves, so none can be removed")
        for follower, outputs in zip(modules[1:], expected, strict=True):
            if not _alike(_outputs(follower, pruned), outputs):
                raise PruningError(
                    f"unit {unit.name!r}: {type(follower).__name__} does more with its channels than feed them to layers, as "
                    "a shortcut does"
                )
    except Exception as error:
        for m, parameters, buffers in tensors:
            m.__dict__.update({k: v for k, v in before[id(m)].items() if k not in ("_parameters", "_buffers")})
            m._parameters.update(parameters)
            m._buffers.update(buffers)
        if isinstance(error, PruningError):
            raise
        raise PruningError(f"unit {unit.name!r} cannot be pruned: {error}") from error
    finally:
        for m, training in modes:
            m.training = training
