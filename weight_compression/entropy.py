"""Step 2 of *compress*: how many levels a tensor gets."""

from __future__ import annotations

import torch

from weight_compression import _ops
from weight_compression.config import CompressionConfig
from weight_compression.errors import NonFiniteError
from weight_compression.payload import is_less
from weight_compression.ranges import Ranges

__all__ = ["choose_levels", "estimate_entropy", "sample_entropy"]


def sample_entropy(x: torch.Tensor, sample: torch.Tensor, scheme: _ops.Scheme, bits: int, fraction: float) -> float:
    """Entropy in bits of the sample of flat x, quantised to 2^bits levels."""
    counts = _ops.sample_counts(x, sample, scheme.with_levels(1 << bits), fraction)
    return _ops.kernels.histogram_entropy(counts.tolist())


def choose_levels(x: torch.Tensor, config: CompressionConfig, ranges: Ranges, entropy: float) -> int | None:
    """Levels for flat x with that sample entropy; None if no number of levels is enough."""
    scheme = ranges.scheme
    if scheme.ranges is not None and (scheme.ranges[:, 0] == scheme.ranges[:, 1]).all():
        return 2  # groups without width: every number of levels is exact
    if config.bits is not None:
        return _ops.kernels.levels_of_bits(config.bits)
    if config.max_error is not None:
        return _ops.levels_of_error(scheme, x.dtype, x.numel(), config.max_error)
    if config.ratio is not None:
        bits = 8 * x.dtype.itemsize / config.ratio - 8 * ranges.bytes / x.numel()
        return _levels_of_ratio(x, scheme, entropy - config.entropy_bits, bits)
    if config.gradient_rms is not None:
        entropy = _ops.kernels.exact_log2(config.gradient_rms + 1.0)
    return _ops.kernels.levels_of_bits(entropy + config.floor_bits)


_RATIO_TRIES = 8


def _levels_of_ratio(x: torch.Tensor, scheme: _ops.Scheme, offset: float, bits: float) -> int:
    """Many levels that take at most so many bits a value; 2 if even those take more.

    Twice the levels take about one bit more: each try starts from the last one's bits. `offset` is what log2(levels)
    is estimated to exceed the bits by, negative.
    """
    log2 = _ops.kernels.exact_log2
    best, most = 2, _ops.MAX_CODED_LEVELS
    guess = bits - offset
    for _ in range(_RATIO_TRIES):
        levels = min(max(_ops.kernels.levels_of_bits(guess), best), most)
        found = _coded_bits(x, scheme.with_levels(levels)) / x.numel()
        if found <= bits:
            best = levels
            if found > 0.99 * bits:
                break
        else:
            most = levels - 1
        if best >= most:
            break
        guess = min(max(log2(float(levels)) + bits - found, log2(float(best))), log2(float(most)))
        # Where the estimate stands still between the two, halve their distance.
        if _ops.kernels.levels_of_bits(guess) in (best, levels):
            guess = log2((best + most + 1) / 2)
    return best


def _coded_bits(x: torch.Tensor, scheme: _ops.Scheme) -> int:
    """Of all values' symbols, coded or of a fixed number of bits, and of the code."""
    counts = _ops.symbol_counts(x, scheme)
    fixed = x.numel() * _ops.kernels.fixed_bits(scheme.levels)
    if int((counts > 0).sum()) < 2:
        return fixed
    lengths = _ops.code_lengths(counts)
    return min(fixed, int((counts * lengths).sum()) + 8 * len(_ops.pack_lengths(lengths)))


def estimate_entropy(tensor: torch.Tensor, *, bits: int = 4, sample_fraction: float = 0.03) -> float:
    """Entropy of a tensor's values in 2^bits equal bins of their range, estimated from a sample (thesis, section 3.4).

    Parameters
    ----------
    tensor : torch.Tensor
        float16, bfloat16, float32 or float64, at least one element, all finite.
    bits : int, default 4
        M. One more adds about one bit to the entropy.
    sample_fraction : float, default 0.03
        See :class:`CompressionConfig`.

    Returns
    -------
    float
        Bits per value, 0 to `bits`; 0 for a constant tensor.

    Raises
    ------
    NonFiniteError
        If there is NaN or infinity.
    """
    if bits not in range(1, 13):
        raise ValueError(f"bits: expected a whole number from 1 to 12, got {bits!r}")
    config = CompressionConfig(entropy_bits=bits, sample_fraction=sample_fraction)
    x = tensor.detach().resolve_neg().reshape(-1).contiguous()
    if x.numel() == 0:
        raise ValueError("expected at least one value, got an empty tensor")
    lo, hi, finite, sample = _ops.range_and_sample(x, sample_fraction)
    if not finite:
        raise NonFiniteError("expected finite values, got NaN or infinity")
    if not is_less(lo, hi):
        return 0.0
    return sample_entropy(x, sample, _ops.Scheme(lo=lo, hi=hi), config.entropy_bits, config.sample_fraction)
