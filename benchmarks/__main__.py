"""Runs the benchmarks: ``python -m benchmarks [--only STEM,STEM] [--quick] [--data-dir D] [--device cpu|cuda]``.

Each ``bench_STEM.py`` runs in a process of its own, since threads and peers are configured at import. Its table is
printed, a plot is drawn for those that have one, and its record (hardware, versions, threads, commit, rows, or why it
was skipped) replaces the one of the last run in ``OUT/cpu.json``, or ``OUT/<gpu>.json``. This file imports nothing but
the standard library before a benchmark does.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
STEMS = sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))
PACKAGES = (
    "numpy", "scipy", "scikit-learn", "torch", "statsmodels", "polars", "polars-ols", "threadpoolctl", "zstandard",
    "blosc2", "constriction",
)  # fmt: skip


def main() -> int:
    options = _parse()
    if options.worker:
        return _work(options)
    chosen = options.only.split(",") if options.only else STEMS
    unknown = sorted(set(chosen) - set(STEMS))
    if unknown:
        raise SystemExit(f"unknown benchmarks {', '.join(unknown)}; there are {', '.join(STEMS)}")
    records = {stem: _run_in_process(stem, options) for stem in chosen}
    options.out.mkdir(parents=True, exist_ok=True)
    written = [_store(options.out, stem, record) for stem, record in records.items()]
    print(f"\nwritten to {', '.join(sorted({str(path) for path in written}))}")
    for stem, record in records.items():
        if record["status"] != "ok":
            print(f"{record['status']}: {stem}: {record['reason']}")
    return 1 if any(record["status"] == "failed" for record in records.values()) else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=f"Benchmarks: {', '.join(STEMS)}.")
    parser.add_argument("--only", metavar="STEM,STEM", help="these benchmarks alone")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--data-dir", type=Path, help="folder of MNIST's IDX files, or of a folder 'mnist' of them")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the kernels that run there")
    parser.add_argument("--out", type=Path, default=FOLDER / "results", help="folder of the JSON records and plots")
    parser.add_argument("--worker", metavar="STEM", help=argparse.SUPPRESS)
    parser.add_argument("--figure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run_in_process(stem: str, options: argparse.Namespace) -> dict[str, Any]:
    """The record of one benchmark; a crash is a record too."""
    print(f"\n== {stem}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "record.json"
        command = [sys.executable, str(Path(__file__)), "--worker", stem, "--device", options.device]
        command += ["--out", str(result), "--figure", str((options.out / f"{stem}.png").resolve())]
        command += ["--quick"] if options.quick else []
        command += ["--data-dir", str(options.data_dir)] if options.data_dir else []
        path = os.pathsep.join(filter(None, [str(FOLDER.parent), os.environ.get("PYTHONPATH")]))
        code = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}).returncode
        if not result.exists():
            return {"status": "failed", "reason": f"exit status {code}", "device": options.device, "rows": []}
        record = json.loads(result.read_text())
    _draw(stem, record, options.out)
    return record


def _work(options: argparse.Namespace) -> int:
    """In the process of one benchmark: run it, print its table, write its record to the file `--out`."""
    start = time.perf_counter()
    record: dict[str, Any] = {"status": "ok", "reason": "", "device": options.device, "rows": []}
    try:
        module = importlib.import_module(f"bench_{options.worker}")
        common = importlib.import_module("common")
        skipped: type[Exception] = common.Skipped
    except ImportError as error:
        record |= {"status": "skipped", "reason": f"import failed: {error}"}
    else:
        record |= _environment(common, options)
        accepted = inspect.signature(module.run).parameters
        wanted = {"quick": options.quick, "data_dir": options.data_dir, "device": options.device}
        try:
            if options.device != "cpu" and "device" not in accepted:
                raise skipped(f"measures the CPU only; run it without --device {options.device}")
            record["rows"] = module.run(**{name: value for name, value in wanted.items() if name in accepted})
            common.print_rows(record["rows"])
            if hasattr(module, "draw"):  # a picture of its own; PLOTS has the others
                options.figure.parent.mkdir(parents=True, exist_ok=True)
                module.draw(record["rows"], options.figure)
        except skipped as reason:
            record |= {"status": "skipped", "reason": str(reason)}
            print(f"skipped: {reason}")
    record["seconds"] = round(time.perf_counter() - start, 1)
    options.out.write_text(json.dumps(record, default=float))
    return 0


def _environment(common: Any, options: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": common.machine() | {"gpu": common.gpu_name() if options.device == "cuda" else None},
        "versions": versions,
        "commit": git.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load average at start": load,
        "quick": options.quick,
    }


def _store(folder: Path, stem: str, record: dict[str, Any]) -> Path:
    """Replace the benchmark's record in the device's file, by way of a temporary file."""
    gpu = (record.get("machine") or {}).get("gpu")
    path = folder / f"{re.sub('[^a-z0-9]+', '-', (gpu or record['device']).lower()).strip('-')}.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    records[stem] = record
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(records, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


# Benchmarks with a natural picture: x, y and the columns that tell curves apart.
PLOTS = {
    "batched_ridge": ("p", ("ns/system", "torch"), ("dtype",)),
    "mnist": ("hidden", ("thesis test", "test"), ("table", "method")),
}


def _draw(stem: str, record: dict[str, Any], folder: Path) -> None:
    if stem not in PLOTS or not record["rows"] or record["device"] != "cpu":
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x, measures, keys = PLOTS[stem]
    groups: dict[tuple, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    figure, panels = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.2), squeeze=False)
    for panel, (name, rows) in zip(panels[0], groups.items(), strict=True):
        for measure in measures:
            panel.plot([str(row[x]) for row in rows], [row[measure] for row in rows], "o-", label=measure)
        panel.set(title=" ".join(map(str, name)), xlabel=x)
        panel.tick_params(axis="x", rotation=60)
        panel.grid(alpha=0.25)
        if stem == "batched_ridge":
            panel.set_yscale("log")
        panel.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{stem}.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
