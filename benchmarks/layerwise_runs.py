"""What the experiments of `layerwise` share: runs that resume, results that are kept, and the options of their scripts.

A run is known by the name of its case and its seed. Its result, once it has ended, is kept in OUT/EXPERIMENT.json and is not
made again; a run that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import nn

import layerwise as lw
from layerwise.data import Augmentation, Loaders, make_loaders

OUT = Path(__file__).resolve().parent / "results" / "layerwise"


def make_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options that every script has; keywords are their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with MNIST's IDX files, or with an image archive"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=10, help="per unit, or of backpropagation")
    parser.add_argument("--limit", type=int, default=None, help="most training samples, drawn at random")
    parser.add_argument("--only", default=None, help="cases, separated by semicolons")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and checkpoints")
    parser.set_defaults(**defaults)
    return parser


def load_data(args: argparse.Namespace, kind: str, seed: int, **options: Any) -> Loaders:
    """ "mnist", or "cifar10" with crops of 4 pixels and flips, in batches of 128; 10 % of the training part validates."""
    settings: dict[str, Any] = {"batch_size": 128, "limit": args.limit, "device": args.device, "seed": seed, **options}
    if kind == "mnist":
        return make_loaders("mnist", data_dir=args.data_dir, **settings)
    archives = sorted(args.data_dir.glob("*.tar.xz")) if args.data_dir.is_dir() else [args.data_dir]
    if not archives:
        raise SystemExit(f"{args.data_dir}: no archive of images (train/<class>/*.jpg, test/<class>/*.jpg)")
    settings.setdefault("augmentation", Augmentation(crop=4, flip=True))
    return make_loaders(_decoded(archives[0]), **settings)


_DECODED: dict[Path, Any] = {}


def _decoded(archive: Path) -> Any:
    """Images of an archive; decoding takes longer than the rest of a short run."""
    from platonic.datasets import load

    if archive not in _DECODED:
        _DECODED[archive] = load(str(archive))
    return _DECODED[archive]


@dataclass
class Case:
    """One row of a table: a network and how it is trained."""

    name: str
    make_model: Callable[[], nn.Module]
    method: lw.Method
    spec: Any = "auto"
    options: dict[str, Any] | None = None  # of the trainer


def backpropagation(epochs: int, optimizer: lw.OptimizerSpec, units: int, **changes: Any) -> lw.Method:
    """All units as one window."""
    return lw.Method("backpropagation", [lw.Stage(((0, units - 1),), epochs)], optimizer=optimizer, **changes)


class Results:
    """Rows by case and seed, on disk."""

    def __init__(self, folder: Path, experiment: str) -> None:
        self.path = folder / f"{experiment}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}

    def get(self, case: str, seed: int, settings: dict[str, Any]) -> Any:
        row = self.rows.get(f"{case}, seed {seed}")
        return row if row is not None and row["settings"] == settings else None

    def put(self, case: str, seed: int, row: dict[str, Any]) -> None:
        self.rows[f"{case}, seed {seed}"] = row
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"machine": machine(), "rows": self.rows}, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, self.path)


def run_case(
    results: Results,
    case: Case,
    seed: int,
    loaders: Loaders,
    settings: dict[str, Any],
    extra: Callable[[lw.LayerwiseTrainer, Loaders], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The row of a case and seed, from the file or by training: accuracies of every head and of their ensemble in %."""
    known = results.get(case.name, seed, settings)
    if known is not None:
        return known
    torch.manual_seed(seed)
    model = case.make_model().to(loaders.train.y.device)
    model = model.to(memory_format=torch.channels_last)  # 1.3 times as fast with batch normalisation on a CPU
    checkpoint = results.path.with_name(
        f"{results.path.stem}.{case.name}.{seed}.pt".replace(" ", "_").replace("/", "-")
    )
    trainer = lw.LayerwiseTrainer(
        model, case.method, classes=loaders.classes, spec=case.spec, checkpoint=checkpoint, **(case.options or {})
    )
    torch.manual_seed(1000 + seed)
    start = time.perf_counter()
    trainer.fit(loaders.train, loaders.validation, resume=True)
    seconds = time.perf_counter() - start
    heads = [100 * trainer.evaluate(loaders.test, unit) for unit in trainer.heads]
    row = {
        "settings": settings,
        "test": 100 * trainer.evaluate(loaders.test),
        "heads": heads,
        "validation": [100 * (t.best or 0) for _, t in sorted(trainer.trainings.items())],
        "ensemble": 100 * lw.accuracy(lw.make_ensemble(trainer), loaders.test, trainer.device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": sum({(r["stage"], r["epoch"]): r["seconds"] for r in trainer.history}.values()),
        "wall": seconds,
        **(extra(trainer, loaders) if extra else {}),
    }
    results.put(case.name, seed, row)
    checkpoint.unlink(missing_ok=True)
    print(f"{case.name}, seed {seed}: {row['test']:.2f} % ({row['seconds']:.0f} s)", flush=True)
    return row


def chosen(cases: Iterable[Case], only: str | None) -> list[Case]:
    """Those named by `only`."""
    every = list(cases)
    if only is None:
        return every
    names = [name.strip() for name in only.split(";")]
    unknown = [name for name in names if name not in {case.name for case in every}]
    if unknown:
        raise SystemExit(f"unknown cases {unknown}; there are {', '.join(case.name for case in every)}")
    return [case for case in every if case.name in names]


def summary(values: list[float]) -> str:
    """Mean and, of several, the half width of its 95 % interval (Student's t)."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} +- {half:.2f}"
