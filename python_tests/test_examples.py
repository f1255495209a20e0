"""The examples run, in a reduced mode, and print what they promise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_digits_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    digits = load_example("digits")
    monkeypatch.setattr(digits, "SEEDS", [0])
    digits.main(["--width", "30", "--widths", "5", "10", "--plot", str(tmp_path / "demo.png")])
    rows = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()}
    scores = {name: [float(cell) for cell in rows[name]] for name in digits.METHODS}
    for test, train, seconds in scores.values():
        assert 0.6 < test <= train <= 1
        assert seconds > 0
    assert scores["PlatonicMLP, closed form"][0] > scores["ELM, closed form, random weights"][0]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_digits_without_a_figure_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digits = load_example("digits")
    monkeypatch.setattr(digits, "SEEDS", [0])
    monkeypatch.setattr(digits, "METHODS", {"PlatonicMLP, closed form": digits.make_platonic})
    digits.main(["--width", "5"])
    assert "PlatonicMLP" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_readme_prints_what_it_says(capsys):
    readme = (EXAMPLES.parent / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", readme, re.S)
    assert len(blocks) == 4
    for code, printed in blocks:
        exec(compile(code, "README.md", "exec"), {})
        found = capsys.readouterr().out
        # Fitted networks may differ in the last digit with another BLAS; compressed weights are the same everywhere.
        numbers = re.compile(r"\d+\.\d+")
        assert numbers.sub("#", found) == numbers.sub("#", printed)
        tolerance = 0.011 if "PlatonicMLP" in code else 0.03 if "layerwise" in code else 0
        assert [float(n) for n in numbers.findall(found)] == pytest.approx(
            [float(n) for n in numbers.findall(printed)], abs=tolerance
        )


def test_layerwise_digits_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    example = load_example("layerwise_digits")
    monkeypatch.setattr(sys, "argv", ["layerwise_digits.py", "--epochs", "2", "--plot", str(tmp_path / "layers.png")])
    example.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert "test accuracy %" in header and len(rows) == 4
    cells = {row[: header.index("method") + 6].strip(): [float(c) for c in row.split()[-4:]] for row in rows}
    assert all(accuracy > 50 for accuracy, *_ in cells.values())
    assert cells["local errors"][2] < cells["backpropagation"][2]
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_gradient_amplification_prints_tables_and_draws(tmp_path, capsys, monkeypatch):
    example = load_example("gradient_amplification")
    monkeypatch.setattr(example, "RATES", [0.03])
    monkeypatch.setattr(example, "SEEDS", [0])
    monkeypatch.setattr(example, "NETWORKS", {"convolutional": example.make_convolutional})
    threads = torch.get_num_threads()
    try:
        example.main(["--epochs", "3", "--plots", str(tmp_path / "plots")])
    finally:
        torch.set_num_threads(threads)
    rows = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.split() and line.split()[0] in example.LOSSES
    ]
    assert [row[0] for row in rows] == list(example.LOSSES)
    for _, rate, epochs, final, lowest in rows:
        assert (float(rate), int(epochs) in range(1, 4)) == (0.03, True) and float(lowest) <= float(final) < 40
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"errors.png", "convolutional_layer_rms.png", "convolutional_output_gradients.png"} <= names
    assert all((tmp_path / "plots" / name).read_bytes()[:4] == b"\x89PNG" for name in names)


def test_gradient_amplification_says_what_is_wrong(capsys):
    example = load_example("gradient_amplification")
    with pytest.raises(SystemExit):
        example.main(["--epochs", "many"])
    assert "invalid int value" in capsys.readouterr().err


def run_compressed_ddp(*command):
    """By sync: accuracy, megabytes of float32, megabytes sent, their ratio, seconds; and all that was printed."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=EXAMPLES.parent, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.split()]
    return {
        row[0]: [float(cell) for cell in row[1:]] for row in rows if len(row) == 6 and row[0] != "sync"
    }, done.stdout


def test_compressed_ddp_trains_every_way_under_torchrun():
    syncs = ["fp32", "bf16", "powersgd", "coded", "auto", "averaging", "diloco"]
    rows, printed = run_compressed_ddp(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "examples/compressed_ddp.py",
        "--epochs", "3", "--sync", *syncs,
    )  # fmt: skip
    assert list(rows) == syncs and "2 workers, CPU with gloo" in printed and "not started by torchrun" not in printed
    for sync, (accuracy, before, sent, fewer, _) in rows.items():
        assert accuracy > (0.8 if sync != "diloco" else 0.5)  # of ten classes; three outer steps do not go far
        # Sizes in the table are rounded to 0.01 MB.
        assert sent <= before and (sent < 0.2 or fewer == pytest.approx(before / sent, rel=0.05, abs=0.06))
    assert rows["fp32"][2] == rows["fp32"][1]
    assert 1.9 < rows["bf16"][1] / rows["bf16"][2] < 2  # the first two steps are float32
    assert rows["coded"][3] > 3 and rows["averaging"][3] > 22 * 3  # 22 steps an epoch


def test_compressed_ddp_starts_processes_by_itself():
    rows, printed = run_compressed_ddp("examples/compressed_ddp.py", "--epochs", "1", "--sync", "averaging")
    assert list(rows) == ["averaging"] and "not started by torchrun: starting 2 processes here" in printed
