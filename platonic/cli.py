"""``python -m platonic``: the command line's arguments, and how its errors are told.

What the commands do is in :mod:`platonic.commands`. An error is one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from platonic import __version__, commands
from platonic.activations import ACTIVATIONS
from platonic.datasets import NAMES
from platonic.estimators import PlatonicMLPClassifier
from platonic.solvers import SOLVERS
from platonic.targets import PROJECTIONS
from platonic_core.command_line import Parser, run_command

__all__ = ["main"]

_FIT_EXAMPLES = """
examples:
  python -m platonic fit --data digits --hidden 200,50
  python -m platonic fit --data mnist --data-dir ~/data --hidden 392,50 --save model.safetensors --plot mnist.png
  python -m platonic fit --data houses.csv --target price --data-option delimiter=';'
"""
_PREDICT_EXAMPLES = """
examples:
  python -m platonic predict --model model.safetensors --data new.csv --out predictions.csv
  python -m platonic predict --model model.safetensors --data mnist --data-dir ~/data --proba --out digits.csv
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. `argv` is without the program's name, None means ``sys.argv[1:]``."""
    return run_command("platonic", _make_parser, argv)


def _make_parser() -> Parser:
    parser = Parser(prog="python -m platonic", description="Multilayer perceptrons fitted in closed form.")
    parser.add_argument("--version", action="version", version=f"platonic-dl {__version__}")
    parsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="{fit,predict}")
    fit = parsers.add_parser(
        "fit", help="fit a network to a data set and score it", epilog=_FIT_EXAMPLES,
        description="Fit a network layer by layer; print a line per layer, then the scores of the whole.",
    )  # fmt: skip
    _add_data(fit)
    _add_fit_data(fit)
    _add_estimator(fit)
    fit.add_argument("--save", metavar="FILE", help="write the model here (.safetensors)")
    fit.add_argument("--plot", metavar="FILE", help="draw the layers' representations and scores (.png, .pdf, .svg)")
    fit.set_defaults(run=commands.run_fit)
    predict = parsers.add_parser(
        "predict", help="predict with a saved model", epilog=_PREDICT_EXAMPLES,
        description="Predict with a saved model: every row of a CSV file, or the test part (all, if there is none) of "
        "another data set. Where the true values are known, the score is printed too.",
    )  # fmt: skip
    predict.add_argument("--model", required=True, metavar="FILE", help="what `fit --save` wrote")
    _add_data(predict)
    predict.add_argument("--target", metavar="NAME", help="CSV: column with the true values, to score the predictions")
    predict.add_argument(
        "--out", metavar="FILE", help="write the predictions to this CSV file instead of printing them"
    )
    predict.add_argument("--proba", action="store_true", help="add a column with the probability of each class")
    predict.add_argument("--device", help="where to compute, such as cpu or cuda (default: as the model was fitted)")
    predict.set_defaults(run=commands.run_predict)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, metavar="NAME|FILE|FOLDER",
        help=f"one of {', '.join(NAMES)}; a .csv file with a header; a folder of MNIST-like IDX files; a folder (or "
        ".tar, .tar.gz, .tar.xz) of images, CLASS/*.png or train/CLASS/*.png and test/CLASS/*.png",
    )  # fmt: skip
    parser.add_argument("--data-dir", metavar="FOLDER", help="where data are looked for (default: the current folder)")
    parser.add_argument(
        "--data-option", action="append", default=[], type=_option, metavar="NAME=VALUE",
        help="option of the data set's loader, such as delimiter=';' (CSV), mode=L (images: as grey), turns=2 (spirals)"
        "; may be repeated",
    )  # fmt: skip


def _add_fit_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="NAME", help="CSV: column to predict (default: the last one)")
    parser.add_argument(
        "--task", choices=["classification", "regression"],
        help="default: as the data set says; a CSV target with fractions is regression, else classes",
    )  # fmt: skip
    parser.add_argument(
        "--test-fraction", type=_fraction, metavar="F",
        help="part of the rows kept for the test where the data come without a split, 0 for none (default: 0.2). The "
        "split does not depend on --seed",
    )  # fmt: skip


def _add_estimator(parser: argparse.ArgumentParser) -> None:
    """An option for every parameter of the estimators, with the estimator's own default; `dest` is its name there."""
    group = parser.add_argument_group("network (python -c 'import platonic; help(platonic.PlatonicMLP)' explains)")
    defaults = PlatonicMLPClassifier().get_params()

    def add(flag: str, text: str, **how: Any) -> None:
        name = how.setdefault("dest", flag.removeprefix("--").replace("-", "_"))
        value = defaults[name]
        how.setdefault("default", value)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        if value is not None:
            text += f" (default: {shown})"
        group.add_argument(flag, help=text, **how)

    add(
        "--hidden", "width of each hidden layer, such as 392,50", type=_widths, dest="hidden_layer_sizes", metavar="N,N"
    )
    add("--activation", "activation of the hidden layers", choices=list(ACTIVATIONS))
    add(
        "--projection", f"where weights come from: auto, {', '.join(PROJECTIONS)}; one for all layers, or one per "
        "layer, separated by commas", type=_projections, metavar="NAME,NAME",
    )  # fmt: skip
    add("--alpha", "scale of the pre-activations", type=_number)
    add("--beta", "weight of the targets beside the layer's input", type=_number)
    add("--tries", "draws per layer, or candidates per unit (auto)", type=_integer, dest="n_tries", metavar="N")
    add("--l2", "ridge penalty, or loo: chosen per layer by leave-one-out error", type=_penalty, metavar="L2")
    add("--solver", "how the ridge problems are solved", choices=list(SOLVERS))
    add("--tol", "relative tolerance of the rank decision of all solvers but cholesky", type=_number)
    add("--scaling", "absolute takes alpha, beta and l2 literally", choices=["relative", "absolute"])
    add("--ema", "platonic_pca: how much of a sample's old importance a layer keeps", type=_number)
    add(
        "--image-shape", "HxW or HxWxC: a row is an image of this shape; auto: the data set's shape; none: features "
        "are columns of a table (the default, for images too)", type=_image_shape, metavar="HxW",
    )  # fmt: skip
    add("--class-weight", "balanced: classes count alike, whatever their size", choices=["balanced"])
    add("--dtype", "dtype of the representations", choices=["float32", "float64"])
    add("--device", "where to compute, such as cpu or cuda")
    add(
        "--seed", "seeds every draw (default: 0)", type=_integer, dest="random_state", default=0, metavar="N",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ values of arguments


def _typed(expected: str, parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` with an error that says what was expected and what came."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None

    return convert


def _parse_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _parse_widths(text: str) -> tuple[int, ...]:
    widths = tuple(int(part) for part in text.split(","))
    if min(widths) < 1:
        raise ValueError(text)
    return widths


def _parse_projections(text: str) -> str | list[str]:
    names = text.split(",")
    if not set(names) <= {"auto", *PROJECTIONS}:
        raise ValueError(text)
    return names[0] if len(names) == 1 else names


def _parse_image_shape(text: str) -> str | tuple[int, ...] | None:
    if text in ("none", "auto"):
        return None if text == "none" else text
    shape = tuple(int(part) for part in text.split("x"))
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(text)
    return shape


def _parse_fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def _parse_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals or not value:
        raise ValueError(text)
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return name, number(value)
    return name, "\t" if value == r"\t" else value


_number = _typed("a number", _parse_number)
_integer = _typed("an integer", int)
_penalty = _typed("a number or loo", lambda text: text if text == "loo" else _parse_number(text))
_widths = _typed("positive integers separated by commas, such as 392,50", _parse_widths)
_projections = _typed(f"auto, {', '.join(PROJECTIONS)}, or several of them separated by commas", _parse_projections)
_image_shape = _typed("none, auto, HxW or HxWxC, such as 28x28", _parse_image_shape)
_fraction = _typed("a number from 0 up to, not including, 1", _parse_fraction)
_option = _typed("NAME=VALUE", _parse_option)
