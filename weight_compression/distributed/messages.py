"""Fragments as bytes: one payload for every coded one, and one for all those that are sent as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch

from weight_compression import _ops
from weight_compression.codec import compress_bound, compress_into, decompress
from weight_compression.config import CompressionConfig

__all__ = ["Packed", "add", "pack", "read", "read_exact"]

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
        end = 0
        for length in self.lengths:
            yield self.data[end : end + abs(length)]
            end += abs(length)


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
        return Packed(torch.empty(0, dtype=torch.uint8, device="cpu"), [])
    device = values[0].device
    room = [compress_bound(x.numel(), x.dtype, 1) for x in values]
    # From malloc, which has it from the last piece: a huge page, of which little is used, would take longer to clear.
    memory = torch.empty(sum(room), dtype=torch.uint8, device=device)
    if device.type != "cpu":
        return _pack_on_device(values, finite, config, memory, room)
    lengths: list[int] = []
    end = 0
    while len(lengths) < len(values):
        if config.is_by_entropy_alone:
            # As many as can be in one call: what Python does for each takes as long as coding a small tensor.
            sizes = _ops.write_payloads(values[len(lengths) :], config, memory[end:])
            end += sum(sizes)
            lengths += sizes
            if len(lengths) == len(values):
                break
        x, is_finite = values[len(lengths)], finite[len(lengths)]
        size = int(compress_into(x, memory[end:], config))
        if size < 0:
            size, is_finite = int(compress_into(x.view(_AS_INTEGERS[x.dtype]), memory[end:], config)), False
        end += size
        lengths.append(size if is_finite else -size)
    return Packed(memory[:end], lengths)


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


Blaming: TypeAlias = Callable[[int], AbstractContextManager[None]]  # in which tensor i is decoded


def read(packed: Packed, outs: Sequence[torch.Tensor], blaming: Blaming) -> None:
    """The first payloads' values into flat float32 or float64 `outs`."""
    _decode(packed, outs, blaming, False, 1.0)


def add(packed: Packed, outs: Sequence[torch.Tensor], scale: float, blaming: Blaming) -> None:
    """outs += scale * values."""
    _decode(packed, outs, blaming, True, scale)


def read_exact(packed: Packed, out: torch.Tensor) -> None:
    """What :func:`pack` was given as `exact`, together, into flat `out`."""
    payload = packed.data[packed.data.numel() - abs(packed.lengths[-1]) :]
    decompress(payload, out.view(_AS_INTEGERS[out.dtype]))


def _decode(packed: Packed, outs: Sequence[torch.Tensor], blaming: Blaming, accumulate: bool, scale: float) -> None:
    i = begin = 0
    while i < len(outs):
        if outs[i].device.type == "cpu":
            # As many as can be in one call: they are of the usual kind, and right.
            sizes = list(itertools.takewhile(lambda length: length >= 0, packed.lengths[i : len(outs)]))
            done = _ops.decode_payloads(packed.data[begin:], sizes, outs[i : i + len(sizes)], accumulate, scale)
            begin += sum(sizes[:done])
            i += done
            if i == len(outs):
                break
        length, out = packed.lengths[i], outs[i]
        payload = packed.data[begin : begin + abs(length)]
        with blaming(i):
            if length >= 0:
                decompress(payload, out, accumulate=accumulate, scale=scale)
            elif accumulate:
                values = torch.empty_like(out)
                decompress(payload, values.view(_AS_INTEGERS[out.dtype]))
                out.add_(values, alpha=scale)
            else:
                decompress(payload, out.view(_AS_INTEGERS[out.dtype]))
        begin += abs(length)
        i += 1
