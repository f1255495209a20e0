"""What the command line shows: a table by tensor, and a plot of bits per weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from platonic_core.figures import new_figure, save_figure
from weight_compression.codec import PayloadInfo

__all__ = ["TensorRow", "plot_bits", "print_table"]


@dataclass(frozen=True)
class TensorRow:
    """One line of the table."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    levels: int
    entropy: float
    numel: int
    bytes: int
    error_bound: float
    max_error: float | None

    @classmethod
    def of(cls, name: str, info: PayloadInfo, max_error: float | None) -> TensorRow:
        numel = 1
        for size in info.shape:
            numel *= size
        return cls(
            name, info.shape, str(info.dtype).removeprefix("torch."), info.mode, info.levels, info.entropy, numel,
            info.bytes, info.error_bound, max_error,
        )  # fmt: skip

    @property
    def bits(self) -> float:
        return 8 * self.bytes / max(1, self.numel)


_COLUMNS = ("tensor", "shape", "dtype", "mode", "levels", "entropy", "bits/weight", "x fp32", "x bf16", "x int8")


def print_table(rows: list[TensorRow], file_bytes: int) -> None:
    """The table by tensor and its totals, ratios against 4, 2 and 1 bytes a value."""
    last = "max error" if any(row.max_error is not None for row in rows) else "error bound"
    lines = [[*_COLUMNS, last]]
    for row in rows:
        ratios = [f"{size * row.numel / row.bytes:.2f}" for size in (4, 2, 1)]
        error = row.error_bound if row.max_error is None else row.max_error
        lines.append([
            row.name, "x".join(map(str, row.shape)) or "scalar", row.dtype, row.mode, str(row.levels or "-"),
            f"{row.entropy:.2f}" if row.levels else "-", f"{row.bits:.2f}", *ratios, f"{error:.2e}" if error else "0",
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = [c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(cells).rstrip())
    numel = sum(row.numel for row in rows)
    if numel == 0:
        print(f"no values, {file_bytes:,} bytes")
        return
    ratios_text = ", ".join(
        f"{size * numel / file_bytes:.2f}x {what}" for size, what in ((4, "fp32"), (2, "bf16"), (1, "int8"))
    )
    print(f"{numel:,} values in {file_bytes:,} bytes: {8 * file_bytes / numel:.2f} bits each, {ratios_text}")


def plot_bits(rows: list[TensorRow], path: Path) -> None:
    """Bars of bits per weight by tensor, in the order of the file, width by number of values on a log scale of colour.

    Raises
    ------
    ImportError
        If matplotlib is missing.
    ValueError
        If there is no tensor with values.
    """
    rows = [row for row in rows if row.numel > 0]
    if not rows:
        raise ValueError("expected at least one tensor with values to plot")
    figure = new_figure(8, min(40.0, 1.6 + 0.24 * len(rows)))
    axes = figure.add_subplot()
    colours = {
        "entropy": "tab:blue",
        "fixed": "tab:orange",
        "constant": "tab:green",
        "planes": "tab:purple",
        "raw": "tab:grey",
    }
    # Headers of tiny tensors would dwarf everything else.
    shown = [min(row.bits, 40.0) for row in rows]
    axes.barh(range(len(rows)), shown, color=[colours[row.mode] for row in rows])
    axes.set_yticks(range(len(rows)), [f"{row.name} ({row.numel:,})" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    for mode in dict.fromkeys(row.mode for row in rows):
        axes.barh([0], [0], color=colours[mode], label=mode)
    for y, row in enumerate(rows):
        axes.annotate(f"{row.bits:.2f}", (shown[y], y), (3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlabel("bits per weight, headers included (cut at 40)")
    axes.set_xlim(0, max(shown) * 1.12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    save_figure(figure, path)
