"""Payloads one behind the other: those that one native call makes or reads, and the others among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import weight_compression as wc
from weight_compression.distributed import messages


def unexpected(i: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def draw(dtype: torch.dtype) -> list[torch.Tensor]:
    """Usual ones, and between them a constant, NaN, infinity, a pair, one value."""
    g = torch.Generator().manual_seed(0)
    usual = [torch.randn(n, generator=g, dtype=dtype) for n in (3000, 70_001, 5000, 2, 4097)]
    wrong = [torch.randn(2000, generator=g, dtype=dtype) for _ in range(2)]
    wrong[0][7], wrong[1][-1] = float("nan"), -float("inf")
    one = torch.randn(1, generator=g, dtype=dtype)
    return [usual[0], usual[1], torch.full((1500,), 2.5, dtype=dtype), usual[2], *wrong, usual[3], one, usual[4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"full_histogram": True}, {"bits": 6}, {"group_size": 64}], ids=str)
def test_payloads_are_what_the_codec_makes_and_reads(dtype, options):
    config, values = wc.CompressionConfig(**options), draw(dtype)
    small = [torch.arange(5, dtype=dtype), torch.ones(3, dtype=dtype)]
    packed = messages.pack(values, small, config)
    assert len(packed.lengths) == len(values) + 1 and sum(map(abs, packed.lengths)) == packed.data.numel()
    assert [length < 0 for length in packed.lengths] == [not bool(x.isfinite().all()) for x in values] + [False]
    outs, sums = [torch.empty_like(x) for x in values], [torch.ones_like(x) for x in values]
    messages.read(packed, outs, unexpected)
    messages.add(packed, sums, 0.5, unexpected)
    for x, out, total, payload in zip(values, outs, sums, packed.payloads(), strict=False):
        if bool(x.isfinite().all()):
            assert torch.equal(payload, wc.compress(x, config)) and torch.equal(out, wc.decompress(payload))
        else:
            assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))
        torch.testing.assert_close(total, 1 + 0.5 * out, rtol=0, atol=0, equal_nan=True)
    together = torch.empty(8, dtype=dtype)
    messages.read_exact(packed, together)
    assert torch.equal(together, torch.cat(small))


def test_nothing_and_exact_values_alone():
    assert messages.pack([], [], wc.CompressionConfig()).lengths == []
    packed = messages.pack([], [torch.tensor([1.0, float("nan")])], wc.CompressionConfig())
    out = torch.empty(2)
    messages.read_exact(packed, out)
    assert packed.lengths[0] < 0 and out[0] == 1 and bool(out[1].isnan())


@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_damaged_payload_is_blamed_and_not_added(place):
    values = draw(torch.float32)
    packed = messages.pack(values, [], wc.CompressionConfig())
    begin = sum(map(abs, packed.lengths[:place]))
    packed.data[begin + abs(packed.lengths[place]) // 2] ^= 1
    blamed, sums = [], [torch.ones_like(x) for x in values]

    @contextlib.contextmanager
    def blaming(i: int) -> Iterator[None]:
        try:
            yield
        except wc.PayloadError:
            blamed.append(i)
            raise

    with pytest.raises(wc.PayloadError):
        messages.add(packed, sums, 1.0, blaming)
    assert blamed == [place] and bool((sums[place] == 1).all())
