"""The command line: ``python -m weight_compression pack|unpack|inspect|verify``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from platonic_core import __version__
from platonic_core.command_line import Parser, run_command
from platonic_core.figures import check_format
from platonic_core.files import atomic_file
from weight_compression.codec import decompress, payload_info
from weight_compression.config import CompressionConfig
from weight_compression.container import WczFile, load_file, save_file
from weight_compression.report import TensorRow, plot_bits, print_table

__all__ = ["main"]

# Where training scripts usually keep the weights in a checkpoint.
_STATE_KEYS = ("state_dict", "model_state_dict", "model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. `argv` is without the program's name, None means ``sys.argv[1:]``."""
    return run_command("weight_compression", _make_parser, argv)


def _make_parser() -> Parser:
    parser = Parser(
        prog="python -m weight_compression", description="Files of weights, quantised by entropy and Huffman coded."
    )
    parser.add_argument("--version", action="version", version=f"platonic-dl {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="{pack,unpack,inspect,verify}"
    )

    pack = commands.add_parser("pack", help="compress a .safetensors or .pt file into a .wcz file")
    pack.add_argument("source", type=Path, help=".safetensors, or .pt, .pth, .bin with a dict of tensors")
    pack.add_argument("target", type=Path, help=".wcz")
    chosen = pack.add_mutually_exclusive_group()
    chosen.add_argument("--floor-bits", type=float, default=5.0, help="c: levels = 2^(entropy + c) (default: 5)")
    chosen.add_argument("--bits", type=float, help="instead: 2^bits levels for every tensor")
    chosen.add_argument("--max-error", type=float, help="instead: the fewest levels that keep to this error")
    chosen.add_argument("--ratio", type=float, help="instead: as many levels as leave 1/ratio of the bytes")
    chosen.add_argument("--lossless", action="store_true", help="keep every value exactly")
    ranges = pack.add_mutually_exclusive_group()
    ranges.add_argument("--per-channel", action="store_true", help="a range for every index of the first dimension")
    ranges.add_argument("--group-size", type=int, help="a range for every run of so many values")
    ranges.add_argument("--clip-quantile", type=float, help="keep values beyond this part of them exactly, e.g. 0.999")
    pack.add_argument("--nonfinite", choices=["raise", "raw"], default="raise", help="tensors with NaN or infinity")
    pack.set_defaults(run=_pack)

    unpack = commands.add_parser("unpack", help="restore a .safetensors or .pt file from a .wcz file")
    unpack.add_argument("source", type=Path, help=".wcz")
    unpack.add_argument("target", type=Path, help=".safetensors or .pt")
    unpack.set_defaults(run=_unpack)

    inspect = commands.add_parser("inspect", help="what a .wcz file holds, from its headers")
    inspect.add_argument("source", type=Path, help=".wcz")
    inspect.add_argument("--plot", type=Path, metavar="IMAGE", help="draw bits per weight by tensor")
    inspect.set_defaults(run=_inspect)

    verify = commands.add_parser("verify", help="decode everything and compare checksums")
    verify.add_argument("source", type=Path, help=".wcz")
    verify.add_argument("--against", type=Path, metavar="ORIGINAL", help="also hold values to the original's")
    verify.set_defaults(run=_verify)
    return parser


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name and metadata of a .safetensors or a torch file."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(f"{path}: expected a .safetensors, .pt, .pth, .bin or .ckpt file")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, runtime and its own errors for what is not a checkpoint
        raise ValueError(f"{path}: not a file that torch can load with weights_only=True: {error}") from error
    return _state_dict(loaded, path), {}


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates += [loaded[key] for key in _STATE_KEYS if key in loaded]
    for found in candidates:
        if isinstance(found, Mapping) and found and all(isinstance(v, torch.Tensor) for v in found.values()):
            return {str(name): tensor for name, tensor in found.items()}
    what = f"a dict with {', '.join(map(repr, loaded))}" if isinstance(loaded, Mapping) else type(loaded).__name__
    raise ValueError(
        f"{path}: expected a dict of tensors, or one under {', '.join(map(repr, _STATE_KEYS))}, got {what}"
    )


def _pack(arguments: argparse.Namespace) -> None:
    if arguments.target.suffix != ".wcz":
        raise ValueError(f"{arguments.target}: expected a name that ends in .wcz")
    tensors, metadata = _read_weights(arguments.source)
    config = CompressionConfig(
        floor_bits=arguments.floor_bits,
        bits=arguments.bits,
        max_error=arguments.max_error,
        ratio=arguments.ratio,
        per_channel=arguments.per_channel,
        group_size=arguments.group_size,
        clip_quantile=arguments.clip_quantile,
        lossless=arguments.lossless,
        nonfinite=arguments.nonfinite,
    )
    rows: list[TensorRow] = []
    with tqdm(total=sum(t.numel() for t in tensors.values()), unit="weight", unit_scale=True, disable=None) as bar:

        def progress(name: str, tensor: torch.Tensor, payload: torch.Tensor) -> None:
            rows.append(TensorRow.of(name, payload_info(payload), _largest_error(tensor, decompress(payload))))
            bar.update(tensor.numel())

        try:
            save_file(tensors, arguments.target, config, metadata=metadata, progress=progress)
        except (TypeError, NotImplementedError) as error:  # a tensor that payloads cannot hold
            raise ValueError(str(error)) from error
    print_table(rows, arguments.target.stat().st_size)


def _largest_error(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0 or not a.is_floating_point():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    difference = (a - b).abs()
    same = (a == b) | (a.isnan() & b.isnan())  # infinities differ from themselves by NaN
    return float(difference[~same].max()) if not bool(same.all()) else 0.0


def _unpack(arguments: argparse.Namespace) -> None:
    suffix = arguments.target.suffix
    if suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"{arguments.target}: expected a name that ends in .safetensors, .pt, .pth or .bin")
    with WczFile(arguments.source) as file:
        metadata = file.metadata
    tensors = load_file(arguments.source)
    with atomic_file(arguments.target) as output:
        if suffix == ".safetensors":
            # That format knows no tied tensors: each gets its own copy.
            own = {name: tensor.clone() for name, tensor in tensors.items()}
            try:
                output.write(safetensors.torch.save(own, metadata=metadata or None))
            except (KeyError, SafetensorError) as error:
                raise ValueError(f"{arguments.target}: safetensors cannot hold {error}; unpack to .pt") from error
        else:
            torch.save(tensors, output)
    print(f"{len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} values: {arguments.target}")


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None:
        check_format(arguments.plot)
    with WczFile(arguments.source) as file:
        rows = [TensorRow.of(name, file.info(name), None) for name in _own_payloads(file)]
        ties = len(file) - len(rows)
        print_table(rows, arguments.source.stat().st_size)
        if ties:
            print(f"{ties} more names share payloads with these (tied weights)")
        for key, value in file.metadata.items():
            print(f"{key}: {value}")
    if arguments.plot is not None:
        plot_bits(rows, arguments.plot)
        print(f"plot: {arguments.plot}")


def _own_payloads(file: WczFile) -> list[str]:
    """A name for every payload, the first that has it."""
    seen: set[tuple[int, int]] = set()
    names = []
    for name in file:
        span = file.span(name)
        if span not in seen:
            seen.add(span)
            names.append(name)
    return names


def _verify(arguments: argparse.Namespace) -> None:
    originals = None if arguments.against is None else _read_weights(arguments.against)[0]
    with WczFile(arguments.source) as file:
        if originals is not None and sorted(originals) != sorted(file.keys()):
            different = ", ".join(sorted(set(originals) ^ set(file.keys())))
            raise ValueError(f"{arguments.source} and {arguments.against} name different tensors: {different}")
        for name in tqdm(file.keys(), unit="tensor", disable=None):
            tensor = file[name]
            if originals is not None:
                _check_original(name, tensor, originals[name], file.info(name).error_bound)
        held = "" if originals is None else f", all within their error bounds of {arguments.against}"
        print(f"{len(file)} tensors, every checksum is right{held}")


def _check_original(name: str, tensor: torch.Tensor, original: torch.Tensor, bound: float) -> None:
    if tensor.shape != original.shape or tensor.dtype != original.dtype:
        raise ValueError(
            f"{name}: expected {original.dtype} {tuple(original.shape)}, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    original = original.detach().resolve_conj().resolve_neg()
    if tensor.contiguous().view(-1).view(torch.uint8).equal(original.contiguous().view(-1).view(torch.uint8)):
        return
    error = _largest_error(original, tensor)
    if original.is_floating_point() and original.numel():
        original = original.double() if original.dtype not in (torch.float32, torch.float64) else original
        # The bound is that of real numbers: rounding to the dtype, and in its arithmetic, comes on top.
        magnitude = float(original[original.isfinite()].abs().max()) if bool(original.isfinite().any()) else 0.0
        bound += magnitude * (torch.finfo(tensor.dtype).eps / 2 + 2.0**-20)
    if error > bound or (not original.is_floating_point() and not torch.equal(tensor, original)):
        raise ValueError(f"{name}: expected an error of at most {bound:.3g}, got {error:.3g}")
