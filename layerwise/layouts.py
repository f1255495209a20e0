"""Which axis of a tensor between units holds the channels: the second, as convolutions have it, or the last.

Heads and probes know features (B, C), tokens (B, T, C), images (B, C, H, W) and volumes (B, C, D, H, W). What they are shown of a
sequence (B, C, L) is an image of one row, (B, C, 1, L); of an image (B, H, W, C), the same with its channels first.

Shapes alone do not tell: of (B, 64, 64) either axis may be the channels. So the modules are watched that make the tensor and
that read it. The last one to make it tells, or else the first one to read it; a linear layer, which can be applied along any
axis, where no other module does. What a module made or read is known again by its shape, and where that is not enough by its
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from layerwise.units import Chain, State, main_tensor

__all__ = ["LayoutError", "Watched", "as_seen", "channel_axes", "channel_axis", "show_channels", "watch"]

_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)
_LAST = (
    nn.Embedding,
    nn.LayerNorm,
    nn.MultiheadAttention,
    nn.RMSNorm,
    nn.RNNBase,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoderLayer,
)
_DEFAULT = {3: -1, 4: 1}  # where nothing tells, by the number of axes


class LayoutError(ValueError):
    """A tensor of which nothing tells where its channels are."""


class Watched(NamedTuple):
    """A module that was called: where it has channels, whether that is certain, and two samples of what it took and gave."""

    axis: int
    certain: bool
    entering: Tensor | None
    leaving: Tensor | None


@contextmanager
def watch(unit: nn.Module) -> Iterator[list[Watched]]:
    """The calls of the modules in a unit that have channels, in the order in which they end."""
    calls: list[Watched] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = _sample([output[0] if isinstance(output, tuple) and output else output])
        axis = None if given is None else _axis_in(module, given)
        if axis is not None:
            calls.append(Watched(axis, not isinstance(module, nn.Linear), _sample(inputs[:1]), given))

    handles = [m.register_forward_hook(note) for m in unit.modules() if isinstance(m, (*_SECOND, *_LAST, nn.Linear))]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _axis_in(module: nn.Module, given: Tensor) -> int | None:
    """Where a module has channels in what it gives."""
    if isinstance(module, _SECOND):
        return 1
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        channels, *more = module.normalized_shape
        if more:
            return None
        if type(module) not in (nn.LayerNorm, nn.RMSNorm):  # there are some that swap axes inside
            second, last = (given.shape[axis] == channels for axis in (1, -1))
            return None if second == last else 1 if second else -1
    return -1


def _sample(values: Sequence[Any]) -> Tensor | None:
    found = values[0] if values else None
    if not isinstance(found, Tensor) or found.is_nested or found.dim() < 3:  # nested: of torch's own encoder, masked
        return None
    return found[:2].detach().clone()


def channel_axis(x: Tensor, made: Sequence[Watched], read: Callable[[], Sequence[Watched]] = tuple) -> int | None:
    """Where `x` has its channels: 1 or -1; None for features, and for other than three or four axes where nothing tells.

    `read` makes the calls of what follows, if they are needed.
    """
    if x.dim() < 3:
        return None
    x = x[:2]
    axis = _made(x, made, certain=True)
    if axis is None:
        following = read()
        tries = [
            lambda: _read(x, following, certain=True),
            lambda: _read(x, following),
            lambda: _made(x, made),
            lambda: _made(x, made, certain=True, alike=True),
            lambda: _read(x, following, alike=True),
            lambda: _made(x, made, alike=True),
        ]
        axis = next((axis for find in tries if (axis := find()) is not None), _DEFAULT.get(x.dim()))
    return axis


def _made(x: Tensor, calls: Sequence[Watched], *, certain: bool = False, alike: bool = False) -> int | None:
    """What the last of the modules that made `x` tells."""
    return _first(x, ((c.axis, c.leaving) for c in reversed(calls) if c.certain or not certain), alike)


def _read(x: Tensor, calls: Sequence[Watched], *, certain: bool = False, alike: bool = False) -> int | None:
    """What the first of the modules that read `x` tells."""
    return _first(x, ((c.axis, c.entering) for c in calls if c.certain or not certain), alike)


def _first(x: Tensor, seen: Iterable[tuple[int, Tensor | None]], alike: bool) -> int | None:
    found = (_axis_of(x, axis, y, alike) for axis, y in seen if y is not None)
    return next((axis for axis in found if axis is not None), None)


def _axis_of(x: Tensor, axis: int, y: Tensor, alike: bool) -> int | None:
    """Where x has its channels if y, which is x or x with its channels moved, has them at `axis`.

    Where the shapes are those of both, the values tell, or nothing; or else, if it is enough that shapes are `alike`, they are
    taken to be where they were.
    """
    other = -1 if axis == 1 else 1
    moved = x.movedim(other, axis)
    if y.shape != moved.shape:
        return axis if y.shape == x.shape else None
    if y.shape != x.shape:
        return other
    if not isinstance(x, FakeTensor) and not isinstance(y, FakeTensor):
        same, swapped = torch.equal(y, x), torch.equal(y, moved)
        if same != swapped:
            return axis if same else other
    return axis if alike else None


@torch.no_grad()
def channel_axes(chain: Chain, state: State) -> list[int | None]:
    """:func:`channel_axis` of the state that enters the chain and of what leaves each unit; the units are run on `state`."""
    axes: list[int | None] = []
    made: list[Watched] = []
    for unit in chain:
        with watch(unit) as calls:
            following = unit(state)
        axes.append(channel_axis(main_tensor(state), made, partial(list, calls)))
        state, made = following, calls
    return [*axes, channel_axis(main_tensor(state), made)]


def as_seen(x: Tensor, axis: int | None, name: str = "input") -> Tensor:
    """What heads and probes are shown of `x`, which `name` gives with channels at `axis`.

    Raises
    ------
    LayoutError
        If nothing tells where they are.
    """
    if x.dim() < 3:
        return x
    if axis is None:
        raise LayoutError(
            f"{name}: {tuple(x.shape[1:])} for a sample, and nothing tells which axis has the channels; cut elsewhere, or give "
            "a head of your own"
        )
    if x.dim() == 3:
        return x.unsqueeze(2) if axis == 1 else x
    return x.movedim(-1, 1) if axis == -1 else x


def show_channels(head: nn.Module, dims: int, axis: int | None) -> None:
    """Let `head` take tensors of `dims` axes as they leave a unit, with channels at `axis`."""
    if axis is not None and ((dims, axis) == (3, 1) or (dims > 3 and axis == -1)):
        head.register_forward_pre_hook(partial(_enter, axis))


def _enter(axis: int, _head: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (as_seen(*inputs, axis),)
