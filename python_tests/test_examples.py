"""The examples run, in a reduced mode, and print what they promise."""

from __future__ import annotations

import importlib.util
import re
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
    assert len(blocks) == 3
    for code, printed in blocks:
        exec(compile(code, "README.md", "exec"), {})
        found = capsys.readouterr().out
        # Fitted networks may differ in the last digit with another BLAS; compressed weights are the same everywhere.
        numbers = re.compile(r"\d+\.\d+")
        assert numbers.sub("#", found) == numbers.sub("#", printed)
        tolerance = 0.011 if "PlatonicMLP" in code else 0
        assert [float(n) for n in numbers.findall(found)] == pytest.approx(
            [float(n) for n in numbers.findall(printed)], abs=tolerance
        )


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
