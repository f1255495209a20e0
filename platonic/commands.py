"""What ``python -m platonic fit`` and ``predict`` do, given their parsed arguments (:mod:`platonic.cli`)."""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from torch import Tensor
from tqdm import tqdm

from platonic import datasets, parameters
from platonic.datasets import NAMES, Dataset
from platonic.datasets.tables import load_columns
from platonic.estimators import PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor
from platonic.inputs import to_numpy
from platonic.network import LayerRecord
from platonic.persistence import ModelFormatError, load_model
from platonic.readout import Readout
from platonic.targets import Weights
from platonic_core.files import write_atomically

__all__ = ["run_fit", "run_predict"]

TEST_FRACTION = 0.2
_ESTIMATORS = {cls.__name__: cls for cls in (PlatonicMLP, PlatonicMLPClassifier, PlatonicMLPRegressor)}


# --------------------------------------------------------------------------------------------------------------- fit


def run_fit(args: Namespace) -> None:
    """Load, split, fit, print the table; then save and plot."""
    if args.plot is not None:
        from platonic import plots

        plots.check_format(args.plot)
    _check_folders("save", args.save)
    _check_folders("plot", args.plot)
    _check_device(args.device)
    data = _split(_load_data(args), args.test_fraction)
    estimator = _make_estimator(args, data)
    table = LayerTable(estimator, data)
    print(data.description, flush=True)
    seconds = table.fit()
    _print_summary(estimator, data, seconds)
    if args.plot is not None:
        figure = plots.plot_fit(
            estimator, data.X_train, data.y_train, data.X_test, data.y_test,
            test_scores=table.test_scores or None, name=data.name,
        )  # fmt: skip
    if args.save is not None:
        if args.data not in NAMES and data.feature_names is not None:
            estimator.feature_names_in_ = np.array(data.feature_names, dtype=object)  # `predict` finds columns by them
        estimator.save(args.save)
        print(f"model saved to {args.save}")
    if args.plot is not None:
        plots.save_figure(figure, args.plot)
        print(f"figure saved to {args.plot}")


def _load_data(args: Namespace) -> Dataset:
    options = dict(args.data_option)
    is_table = _is_table(args.data)
    if args.target is not None:
        if not is_table:
            raise ValueError(f"--target is for CSV files, and {args.data} is none: leave it out")
        options["target"] = args.target
    if args.task is not None and is_table:
        options["task"] = args.task
    try:
        data = datasets.load(args.data, args.data_dir, **options)
    except TypeError as error:  # an option that this loader does not have
        raise ValueError(f"--data-option: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(error).rstrip('.')} (--data-dir FOLDER looks elsewhere)") from error
    return data if args.task is None else replace(data, task=args.task)


def _is_table(name: str) -> bool:
    return name not in NAMES and name.lower().endswith(".csv")


def _split(data: Dataset, fraction: float | None) -> Dataset:
    """`data` with a test part: its own, or `fraction` of its rows, stratified by class."""
    if data.X_test is not None:
        if fraction is not None:
            raise ValueError(f"{data.name} comes with its own test part: leave out --test-fraction")
        return data
    fraction = TEST_FRACTION if fraction is None else fraction
    if fraction == 0:
        return data
    stratify = data.y_train if data.task == "classification" else None
    try:
        X_train, X_test, y_train, y_test = train_test_split(
            data.X_train, data.y_train, test_size=fraction, random_state=0, stratify=stratify
        )
    except ValueError as error:
        raise ValueError(
            f"{data.name}: cannot keep a part of {fraction:g} for the test: {error} (--test-fraction 0 fits all rows)"
        ) from error
    description = f"{data.description}: {len(X_train)} to train, {len(X_test)} to test"
    return replace(data, X_train=X_train, X_test=X_test, y_train=y_train, y_test=y_test, description=description)


def _make_estimator(args: Namespace, data: Dataset) -> Any:
    if data.task == "regression" and args.class_weight is not None:
        raise ValueError(f"--class-weight is for classes, but {data.name} is a regression")
    cls = PlatonicMLPRegressor if data.task == "regression" else PlatonicMLPClassifier
    chosen = {name: getattr(args, name) for name in cls().get_params() if name != "verbose"}
    if chosen["image_shape"] == "auto":
        if data.image_shape is None:
            raise ValueError(f"--image-shape auto: {data.name} does not say what shape its images have; give it as HxW")
        chosen["image_shape"] = data.image_shape
    return cls(**chosen)


class LayerTable:
    """Fits an estimator and prints a row of scores for each hidden layer as it is done, the test score among them.

    A layer's test score is that of the layer's own read-out: the test rows are carried through the network layer by
    layer. The time that takes is not counted.
    """

    _ROW = "{:>5}  {:>6}  {:<15}  {:>9}  {:>7}  {:>8}  {:>8}  {:>7}"

    def __init__(self, estimator: Any, data: Dataset):
        self.estimator, self.data = estimator, data
        self.settings = parameters.check_parameters(estimator)
        self.test_scores: list[float] = []
        self.Z = None if data.X_test is None else torch.from_numpy(np.ascontiguousarray(data.X_test))
        self._bar: Any = None
        self._since = self._apart = 0.0

    def fit(self) -> float:
        """Fit, and return the seconds it took."""
        print(self._ROW.format("layer", "width", "projection", "LSD", "l2", "train", "test", "seconds"), flush=True)
        layers = len(self.settings.plans)
        with tqdm(total=layers, unit="layer", leave=False, disable=not sys.stderr.isatty()) as self._bar:
            started = self._since = perf_counter()
            self.estimator._fit(self.data.X_train, self.data.y_train, None, observe=self._observe)
            return perf_counter() - started - self._apart

    def _observe(self, index: int, record: LayerRecord, found: Weights, readout: Readout) -> None:
        seconds = perf_counter() - self._since
        started = perf_counter()
        test = ""
        if self.Z is not None:
            self.test_scores.append(self._score(index, found, readout))
            test = format_score(self.test_scores[-1], self.data.task)
        row = self._ROW.format(
            index + 1, record.width, record.projection, f"{record.lsd:.3e}", f"{record.l2:.0e}" if record.l2 else "0",
            format_score(record.score, self.data.task), test, f"{seconds:.2f}",
        )  # fmt: skip
        tqdm.write(row, file=sys.stdout)
        if record.jitter:
            tqdm.write(
                f"       singular: {record.jitter:.0e} was added to the unit diagonal to solve it", file=sys.stdout
            )
        sys.stdout.flush()
        self._bar.update()
        self._since = perf_counter()
        self._apart += self._since - started

    def _score(self, index: int, found: Weights, readout: Readout) -> float:
        like = readout.fitted
        Z = self.Z.to(device=like.device, dtype=like.dtype)  # type: ignore[union-attr]
        Z = torch.addmm(found.bias.to(like.dtype), Z, found.weight.to(like.dtype))
        self.Z = self.settings.plans[index].activation.apply_(Z)
        solution = readout.solution
        output = torch.addmm(solution.intercept.to(like.dtype), self.Z, solution.coef.to(like.dtype)).double().cpu()
        assert self.data.y_test is not None
        if self.data.task == "regression":
            return float(r2_score(self.data.y_test, self._in_units_of_y(output)))
        classes = np.unique(self.data.y_train)
        predicted = (output[:, 0] > 0).long() if output.shape[1] == 1 else output.argmax(1)
        return float(accuracy_score(self.data.y_test, classes[predicted.numpy()]))

    def _in_units_of_y(self, output: Tensor) -> np.ndarray:
        """Undo the standardisation of the targets."""
        _, shift, scale = self.estimator._encode_values(np.asarray(self.data.y_train), None, self.settings)
        return (output[:, 0] * scale[0] + shift[0]).numpy()


def format_score(score: float, task: str) -> str:
    return f"{score:.6f}" if task == "regression" else f"{score:.4f}"


def _measure(task: str) -> str:
    return "coefficient of determination" if task == "regression" else "accuracy"


def _print_summary(estimator: Any, data: Dataset, seconds: float) -> None:
    count = sum(w.size + b.size for w, b in zip(estimator.coefs_, estimator.intercepts_, strict=True))
    train = format_score(estimator.score(data.X_train, data.y_train), data.task)
    test = "" if data.X_test is None else f", test {format_score(estimator.score(data.X_test, data.y_test), data.task)}"
    print(f"{_measure(data.task)}: train {train}{test}; {seconds:.2f} s, {count:,} parameters", flush=True)


# ----------------------------------------------------------------------------------------------------------- predict


def run_predict(args: Namespace) -> None:
    """Load a model and rows, predict, write a CSV file; score where the true values are known."""
    _check_folders("out", args.out)
    model = _load_model(args.model)
    if args.device is not None:
        model.device = args.device
    _check_device(model.device)
    if args.proba and model.task_ != "classification":
        raise ValueError("--proba is for classes, but this model is a regression: leave it out")
    X, y = _load_rows(args, model)
    if X.shape[1] != model.n_features_in_:
        raise ValueError(
            f"{args.data} has {X.shape[1]} features, but the model was fitted to {model.n_features_in_}"
            + (
                "; --target NAME sets aside the column with the true values"
                if _is_table(args.data) and y is None
                else ""
            )
        )
    if hasattr(model, "feature_names_in_"):
        del model.feature_names_in_  # the columns have been matched; X is a plain array
    predicted = to_numpy(model.predict(X))
    text = _prediction_table(model, X, predicted, args.proba)
    if args.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(args.out, text.encode())
        print(f"{len(X)} predictions saved to {args.out}")
    if y is not None:
        score = r2_score(y, predicted) if model.task_ == "regression" else accuracy_score(y, predicted)
        line = f"{_measure(model.task_)}: {format_score(score, model.task_)}"
        print(line, file=sys.stderr if args.out is None else sys.stdout)


def _load_model(path: str) -> Any:
    if not Path(path).exists():
        raise FileNotFoundError(f"no such model file: {path} (`fit --save {path}` would write one)")
    kind = load_model(path)[1].get("estimator")
    if kind not in _ESTIMATORS:
        raise ModelFormatError(f"{path}: holds a {kind}, which is none of {', '.join(_ESTIMATORS)}")
    return _ESTIMATORS[kind].load(path)


def _load_rows(args: Namespace, model: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Rows to predict for and their true values, if known."""
    if not _is_table(args.data):
        args.task = None
        data = _load_data(args)
        if data.X_test is not None:
            return data.X_test, data.y_test
        return data.X_train, data.y_train
    options = dict(args.data_option)
    if unknown := set(options) - {"delimiter"}:
        raise ValueError(f"{args.data} has no option {sorted(unknown)[0]!r}; its options are delimiter")
    names = getattr(model, "feature_names_in_", None)
    classes = to_numpy(model.classes_) if model.task_ == "classification" else None
    labels = classes is not None and classes.dtype.kind not in "biuf"
    path = Path(args.data_dir or "") / args.data
    X, y = load_columns(path, names, args.target, labels=labels, **options)
    if y is None or classes is None or labels:
        return X, y
    as_classes = y.astype(classes.dtype)
    return X, as_classes if np.array_equal(as_classes, y) else y


def _prediction_table(model: Any, X: np.ndarray, predicted: np.ndarray, proba: bool) -> str:
    header = ["prediction"]
    columns = [predicted]
    if predicted.ndim == 2:
        header = [f"prediction_{i + 1}" for i in range(predicted.shape[1])]
        columns = list(predicted.T)
    if proba:
        header += [f"probability_{label}" for label in to_numpy(model.classes_)]
        columns += list(to_numpy(model.predict_proba(X)).T)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(zip(*(column.tolist() for column in columns), strict=True))
    return text.getvalue()


# ------------------------------------------------------------------------------------------------------------ checks


def _check_folders(option: str, path: str | None) -> None:
    """What is to be written at the end must not fail for a reason known at the start."""
    if path is None:
        return
    if Path(path).is_dir():
        raise IsADirectoryError(f"--{option}: expected a file, but {path} is a folder")
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"--{option}: no such folder: {Path(path).parent} (make it first)")


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise ValueError(f"device {device!r} cannot be used: {error} (--device cpu always can)") from error
