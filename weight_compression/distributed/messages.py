"""Fragments as bytes: one payload for every coded one, and one for all those that are sent as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from weight_compression import _ops, host
from weight_compression.codec import compress_bound, compress_into, decompress
from weight_compression.config import CompressionConfig
from weight_compression.errors import NonFiniteError

__all__ = ["Packed", "add", "pack", "read", "split_payloads"]

_AS_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Packed:
    """Payloads one behind the other.

    Attributes
    ----------
    data : torch.Tensor
        uint8 [bytes].
    lengths : list of int
        Of the payloads; below 0 where there is NaN or infinity, and values are kept as integers.
    """

    def __init__(self, data: torch.Tensor, lengths: list[int]) -> None:
        self.data, self.lengths = data, lengths

    def payloads(self) -> Iterator[torch.Tensor]:
        return split_payloads(self.data, self.lengths)


def pack(coded: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], config: CompressionConfig) -> Packed:
    """Flat float32 or float64 values: `coded` ones quantised as `config` says, `exact` ones as they are.

    Values that are not finite make the whole fragment exact.
    """
    if exact:
        together = torch.cat(list(exact))
        finite = bool(torch.isfinite(together).all())
        return _pack([*coded, together.view(_AS_INTEGERS[together.dtype])], [True] * len(coded) + [finite], config)
    return _pack(list(coded), [True] * len(coded), config)


def _pack(values: list[torch.Tensor], finite: list[bool], config: CompressionConfig) -> Packed:
    if not values:
        return Packed(torch.empty(0, dtype=torch.uint8), [])
    device = values[0].device
    room = [compress_bound(x.numel(), x.dtype, 1) for x in values]
    # From malloc, which has it from the last piece: a huge page, of which little is used, would take longer to clear.
    memory = torch.empty(sum(room), dtype=torch.uint8, device=device)
    if device.type != "cpu":
        return _pack_on_device(values, finite, config, memory, room)
    lengths, end = [], 0
    for x, is_finite in zip(values, finite, strict=True):
        size = _write(x, memory[end:], config)
        if size < 0:
            size, is_finite = _write(x.view(_AS_INTEGERS[x.dtype]), memory[end:], config), False
        end += size
        lengths.append(size if is_finite else -size)
    return Packed(memory[:end], lengths)


def _write(x: torch.Tensor, out: torch.Tensor, config: CompressionConfig) -> int:
    """`compress_into` on the CPU without its checks, which take as long as coding a small tensor."""
    try:
        return host.compress(x, (x.numel(),), config, lambda size: out[:size]).numel()
    except NonFiniteError:
        return -1


def _pack_on_device(
    values: list[torch.Tensor], finite: list[bool], config: CompressionConfig, memory: torch.Tensor, room: list[int]
) -> Packed:
    """Sizes are learnt once for all: payloads are made with gaps between them, which are closed then."""
    places = list(memory.split(room))
    sizes = torch.stack([compress_into(x, place, config) for x, place in zip(values, places, strict=True)]).tolist()
    for i, size in enumerate(sizes):
        if size < 0:
            as_integers = values[i].view(_AS_INTEGERS[values[i].dtype])
            sizes[i], finite[i] = int(compress_into(as_integers, places[i], config)), False
    data = torch.cat([place[:size] for place, size in zip(places, sizes, strict=True)])
    return Packed(data, [size if is_finite else -size for size, is_finite in zip(sizes, finite, strict=True)])


def split_payloads(data: torch.Tensor, lengths: Sequence[int]) -> Iterator[torch.Tensor]:
    """uint8 data cut into payloads."""
    end = 0
    for length in lengths:
        yield data[end : end + abs(length)]
        end += abs(length)


def read(payload: torch.Tensor, exact: bool, out: torch.Tensor) -> None:
    """A payload's values into flat float32 or float64 `out`."""
    _decode(payload, out.view(_AS_INTEGERS[out.dtype]) if exact else out, False, 1.0)


def add(payload: torch.Tensor, exact: bool, out: torch.Tensor, scale: float) -> None:
    """out += scale * values."""
    if exact:
        values = torch.empty_like(out)
        read(payload, True, values)
        out.add_(values, alpha=scale)
    else:
        _decode(payload, out, True, scale)


def _decode(payload: torch.Tensor, out: torch.Tensor, accumulate: bool, scale: float) -> None:
    """On the CPU without the checks of `decompress`, if the payload is of a usual kind and right."""
    if out.device.type != "cpu" or not _ops.decode_payload(payload, out, accumulate, scale, True):
        decompress(payload, out, accumulate=accumulate, scale=scale)
