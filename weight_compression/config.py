"""How tensors are compressed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Literal

__all__ = ["CompressionConfig"]

MIN_GROUP = 16  # values: smaller ones would take longer to describe than to store


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """Options of :func:`weight_compression.compress`, immutable.

    By default a tensor gets round(2^(H + c)) levels: H is the entropy of a sample of its values in 2^M equal bins of
    [min, max], c is `floor_bits`, M is `entropy_bits` (thesis, section 3.6, algorithm 1).

    Parameters
    ----------
    floor_bits : float, default 5.0
        c, in bits. 5 costs next to no accuracy; 6 is the thesis's "better than baseline" setting. Each bit more halves
        the error and costs about one bit per weight.
    entropy_bits : int, default 4
        M, 1 to 12.
    sample_fraction : float, default 0.03
        Part of the values that the entropy is estimated from: evenly spaced runs of 64 values, never fewer than 4,096
        values in all. The range is always that of all values.
    bits : float, optional
        Instead of c: round(2^bits) levels for every tensor (thesis, section 3.2). 1 to 16.
    max_error : float, optional
        Instead of c: the fewest levels whose bins are at most 2 max_error wide, so that no value changes by more than
        that (up to rounding in the tensor's dtype). If 65,536 levels do not suffice, the tensor is stored exactly.
    ratio : float, optional
        Instead of c: as many levels as leave at most 1 / ratio of the tensor's bytes, found by trying a few numbers of
        levels, at most 4,096, on the whole tensor; the fixed parts of the header come on top. 2 if even those take more. More
        than 1.
    gradient_rms : float, optional
        The thesis's first rule (section 3.3), of which entropy is the proxy: log2(gradient_rms + 1) takes the place of H.
        The root mean square of the loss's gradient with respect to these weights; `floor_bits` is its c1.
    group_size : int, optional
        Every run of so many consecutive values (at least 16) gets a range of its own, for two values of the dtype. K and
        the code are still the tensor's. At the same c that means more levels, and 1 to 3 bits a value more of Gaussian
        values; at the same size it pays where groups differ in scale and their small values matter. docs/results.md has
        figures.
    per_channel : bool, default False
        The same for every index of the first dimension, as `out_features` and `out_channels` of weights are. Tensors of
        fewer than two dimensions, or of channels of fewer than 16 values, keep one range.
    clip_quantile : float, optional
        Part of the values, 0.5 to 1, whose range the levels divide; the rest, the same number at both ends, is stored
        exactly beside them. For heavy tails, which otherwise decide the width of all bins: at the same c that means
        more levels and bits and far smaller errors, at the same size slightly larger ones. The range is taken from the
        sample; where exact values would take more than they save, there is no clipping.
    lossless : bool, default False
        Store every value exactly: the bytes of all values at one place are a plane, and planes that are smaller so,
        exponents before all, are Huffman coded. `floor_bits`, `entropy_bits` and `sample_fraction` are of no use then.
    full_histogram : bool, default False
        Make the code from the histogram of all values even where that of the sample is as good: where it can be
        expected to cost less than a thousandth of the payload, for tensors of 4 million values and more. A pass over the
        values less is a quarter of the time that compression takes. `ratio` counts all values in any case.
    nonfinite : {'raise', 'raw'}, default 'raise'
        What to do with a tensor that holds NaN or infinity: raise :class:`NonFiniteError`, or store it exactly.

    Raises
    ------
    ValueError
        If a value is out of range, or more than one of `bits`, `max_error`, `ratio`, `gradient_rms` and `lossless` is
        given, or more than one of `group_size`, `per_channel`, `clip_quantile` and `lossless`.
    """

    floor_bits: float = 5.0
    entropy_bits: int = 4
    sample_fraction: float = 0.03
    bits: float | None = None
    max_error: float | None = None
    ratio: float | None = None
    gradient_rms: float | None = None
    group_size: int | None = None
    per_channel: bool = False
    clip_quantile: float | None = None
    lossless: bool = False
    full_histogram: bool = False
    nonfinite: Literal["raise", "raw"] = "raise"

    def __post_init__(self) -> None:
        def expect(valid: bool, name: str, what: str) -> None:
            if not valid:
                raise ValueError(f"{name}: expected {what}, got {getattr(self, name)!r}")

        for name in ("bits", "max_error", "ratio", "gradient_rms", "clip_quantile", "floor_bits", "sample_fraction"):
            value = getattr(self, name)
            expect(value is None or (isinstance(value, Real) and not isinstance(value, bool)), name, "a number")
        for name in ("per_channel", "lossless", "full_histogram"):
            expect(isinstance(getattr(self, name), bool), name, "True or False")
        if isinstance(self.group_size, Integral):  # NumPy's too
            object.__setattr__(self, "group_size", int(self.group_size))
        expect(0 <= self.floor_bits <= 16, "floor_bits", "0 to 16 bits")
        expect(
            isinstance(self.entropy_bits, int) and self.entropy_bits in range(1, 13),
            "entropy_bits",
            "a whole number from 1 to 12",
        )
        expect(0 < self.sample_fraction <= 1, "sample_fraction", "more than 0, at most 1")
        expect(self.bits is None or 1 <= self.bits <= 16, "bits", "1 to 16 bits")
        expect(self.max_error is None or 0 < self.max_error < float("inf"), "max_error", "a finite number > 0")
        expect(self.nonfinite in ("raise", "raw"), "nonfinite", "'raise' or 'raw'")
        expect(self.ratio is None or 1 < self.ratio < float("inf"), "ratio", "a finite number > 1")
        expect(self.gradient_rms is None or 0 <= self.gradient_rms < 1e300, "gradient_rms", "a finite number >= 0")
        expect(
            self.group_size is None or (isinstance(self.group_size, int) and self.group_size >= MIN_GROUP),
            "group_size",
            f"a whole number of at least {MIN_GROUP}",
        )
        expect(self.clip_quantile is None or 0.5 <= self.clip_quantile < 1, "clip_quantile", "at least 0.5, below 1")
        for what in (("bits", "max_error", "ratio", "gradient_rms"), ("group_size", "per_channel", "clip_quantile")):
            given = [
                name
                for name in (*what, "lossless")
                if (value := getattr(self, name)) is not None and value is not False
            ]
            if len(given) > 1:
                raise ValueError(f"expected one of {', '.join(given)}, got {len(given)}")

    @cached_property
    def is_by_entropy_alone(self) -> bool:
        """Whether values have one range, and levels by the entropy of a sample."""
        others = self.bits, self.max_error, self.ratio, self.gradient_rms, self.group_size, self.clip_quantile
        return all(x is None for x in others) and not (self.per_channel or self.lossless)
