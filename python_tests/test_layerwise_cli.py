"""``python -m layerwise``: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from safetensors.torch import load_file

import layerwise as lw
from layerwise import zoo
from layerwise.cli import main
from layerwise.presets import PRESETS

compare_module = sys.modules["layerwise.compare"]  # which the function of its name hides
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--data", "digits", "--model", "cnn4", "--width", "0.125", "--epochs", "2", "--limit", "200", "--batch", "50"]


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_train_prints_a_row_per_unit_and_writes_weights_and_history(tmp_path, capsys):
    weights, history = tmp_path / "w.safetensors", tmp_path / "h.csv"
    code, out, _ = run(capsys, "train", *SMALL, "--method", "greedy2", "--save", weights, "--history", history)
    assert code == 0
    accuracy = float(re.search(r"test accuracy ([\d.]+) %", out).group(1))
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d ", line) and "parameters" not in line]
    assert len(rows) == 4 and float(rows[-1][-1]) == pytest.approx(accuracy, abs=0.01)
    assert len(history.read_text().splitlines()) == 9
    model = zoo.make("cnn4", width=0.125, in_channels=1, image_size=8, classes=10)
    assert model.load_state_dict(load_file(weights)).missing_keys == []


@pytest.mark.parametrize("method", list(PRESETS))
def test_every_method_runs(method, capsys):
    code, out, err = run(capsys, "train", *SMALL, "--method", method, "--lr", "0.001")
    assert code == 0, err
    assert "test accuracy" in out


def test_an_interrupted_training_goes_on(tmp_path, capsys, monkeypatch):
    path = tmp_path / "c.pt"
    command = ["train", *SMALL, "--method", "greedy1", "--checkpoint", path]
    torch.manual_seed(0)
    whole = run(capsys, *command, "--save", tmp_path / "whole.safetensors")
    path.unlink()
    from layerwise.trainer import LayerwiseTrainer

    save, saved = LayerwiseTrainer._save, []

    def interrupt(self, loader):
        save(self, loader)
        saved.append(1)
        if len(saved) == 4:  # the first is made before training
            raise KeyboardInterrupt

    monkeypatch.setattr(LayerwiseTrainer, "_save", interrupt)
    assert run(capsys, *command)[0] == 130
    monkeypatch.setattr(LayerwiseTrainer, "_save", save)
    code, out, _ = run(capsys, *command, "--resume", "--save", tmp_path / "resumed.safetensors")
    assert code == 0 and out == whole[1]
    a, b = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--model", "alexnet"], "invalid choice: 'alexnet'"),
        (["train", "--method", "magic"], "invalid choice: 'magic'"),
        (["train", "--data", "iris"], "classification of images"),
        (["train", "--resume"], "--resume needs --checkpoint"),
        (["train", "--save", "no/such/folder/w.safetensors"], "there is no such folder"),
        (["train", "--hierarchy", "1,x"], "expected numbers separated by commas"),
        (["train", "--width", "-1"], "width"),
        (["probe", "--weights", "none.safetensors"], "none.safetensors"),
        (["probe", "--measures", "beauty"], "beauty"),
        (["compare", "--methods", "magic"], "unknown method 'magic'"),
        (
            ["train", "--budget", "0.3"],
            "budget: of dll, segments, round_robin, random_robin, transfer",
        ),
        (["train", "--size", "3"], "size: of segments, not of greedy2"),
        (["train", "--method", "dll", "--code"], "code: of greedy1, greedy2, greedy3, predsim, not of dll"),
        (["train", "--limit", "-5"], "--limit: expected at least 1"),
        (["train", "--model", "vit", "--method", "predsim"], "--method predsim: expected a VGG"),
        (["train", "--model", "mlp", "--hierarchy", "1,2"], "--model mlp: "),
        (["compare", "--methods", "predsim", "--dropout", "0.1"], "--dropout: predsim drops between units"),
        (["probe", "--plot", "x.xyz"], "expected a name that ends in"),
        (["probe", "--plot", "no/such/folder/x.png"], "there is no such folder"),
        (["compare", "--plot", "no/such/folder/x.png"], "there is no such folder"),
        (["probe", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["probe", "--weights", __file__], "--weights"),
        ([], "required"),
    ],
)
def test_wrong_arguments(args, message, capsys):
    code, out, err = run(capsys, *args)
    assert code == 2 and out == ""
    assert message in err and len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device_is_said(capsys):
    code, _, err = run(capsys, "train", *SMALL, "--device", "cuda")
    assert code == 2 and "--device cuda: no CUDA device was found" in err


def test_predsims_dropout_is_between_units_alone(monkeypatch, capsys):
    made = []
    make = lw.zoo.make
    monkeypatch.setattr(
        lw.zoo, "make", lambda name, **options: made.append(options["dropout"]) or make(name, **options)
    )
    methods = []
    trainer = lw.LayerwiseTrainer
    monkeypatch.setattr(
        lw, "LayerwiseTrainer", lambda m, method, **o: methods.append(method) or trainer(m, method, **o)
    )
    for dropout in ([], ["--dropout", "0.3"]):
        assert run(capsys, "train", *SMALL, "--method", "predsim", *dropout)[0] == 0
    assert made == [0.0, 0.0]
    assert [m.regularisation.input_dropout for m in methods] == [0.2, 0.3]


def test_compare_begins_anew_with_every_seed_and_trains_what_train_does(monkeypatch, capsys):
    first, units = [], []
    make, split = lw.zoo.make, compare_module.split

    def made(name, **options):
        model = make(name, **options)
        first.append(float(next(model.parameters()).sum()))
        return model

    def cut(*arguments, **options):
        chain = split(*arguments, **options)
        units.append(len(chain))
        return chain

    monkeypatch.setattr(lw.zoo, "make", made)
    monkeypatch.setattr(compare_module, "split", cut)
    tiny = [*SMALL[:2], "--model", "resnet18", "--width", "0.05", "--epochs", "1", "--limit", "60", "--batch", "20"]
    code, _, err = run(capsys, "compare", *tiny, "--methods", "backprop,predsim", "--seeds", "2", "--seed", "5")
    assert code == 0, err
    assert set(units) == {9, 18}
    assert len(set(first)) > 2  # sizes are found with the seed 0


def test_probe_plots_what_it_measures(tmp_path, monkeypatch, capsys):
    from layerwise import cli

    shown = []
    monkeypatch.setattr(cli, "plot_by_layer", lambda table, columns: shown.append(columns))
    monkeypatch.setattr(cli, "save_figure", lambda figure, path: None)
    few = [a for a in SMALL if a not in ("--epochs", "2")]
    assert (
        run(capsys, "probe", *few, "--measures", "lsd,cnn_separability,k_redundancy", "--plot", tmp_path / "a.png")[0]
        == 0
    )
    assert shown == [["lsd", "cnn1_separability", "k_redundancy_10"]]


def test_weights_to_begin_with(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    first = run(capsys, "train", *SMALL, "--method", "backprop", "--save", path)
    assert first[0] == 0
    again = run(capsys, "train", *SMALL, "--method", "transfer", "--weights", path)
    assert again[0] == 0, again[2]
