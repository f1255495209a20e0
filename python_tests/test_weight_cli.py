"""``python -m weight_compression`` as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from weight_compression.cli import main

ROOT = Path(__file__).resolve().parents[1]


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "conv.weight": torch.randn(16, 8, 3, 3) * 0.1,
        "fc.weight": torch.randn(100, 200),
        "fc.bias": torch.zeros(100),
        "steps": torch.tensor(7),
        "emb": torch.randn(300, 20).bfloat16(),
    }


@pytest.fixture
def files(tmp_path):
    safetensors.torch.save_file(weights(), tmp_path / "m.safetensors", metadata={"format": "pt", "who": "me"})
    torch.save({"model": weights(), "epoch": 3}, tmp_path / "m.pt")
    return tmp_path


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_pack_writes_wcz_files_alone(files, capsys):
    before = (files / "m.pt").read_bytes()
    for target in ("m.pt", "new.pt", "new"):
        assert run("pack", files / "m.pt", files / target) == 2
        assert "expected a name that ends in .wcz" in capsys.readouterr().err
    assert (files / "m.pt").read_bytes() == before and not (files / "new.pt").exists()


@pytest.mark.filterwarnings("error")
def test_verify_against_parameters_and_lazy_conjugates(tmp_path, capsys):
    z = torch.randn(30, dtype=torch.complex64)
    torch.save({"w": torch.nn.Parameter(torch.randn(40, 50)), "c": z.conj()}, tmp_path / "p.pt")
    assert run("pack", tmp_path / "p.pt", tmp_path / "p.wcz") == 0
    assert run("verify", tmp_path / "p.wcz", "--against", tmp_path / "p.pt") == 0, capsys.readouterr().err


def test_pack_unpack_verify(files, capsys):
    assert run("pack", files / "m.safetensors", files / "m.wcz") == 0
    table = capsys.readouterr().out
    assert "conv.weight" in table and "16x8x3x3" in table and "x fp32" in table and "max error" in table
    assert run("verify", files / "m.wcz", "--against", files / "m.safetensors") == 0
    assert "5 tensors, every checksum is right, all within" in capsys.readouterr().out
    for target in ("back.safetensors", "back.pt"):
        assert run("unpack", files / "m.wcz", files / target) == 0
    back = safetensors.torch.load_file(files / "back.safetensors")
    other = torch.load(files / "back.pt", weights_only=True)
    assert set(back) == set(other) == set(weights())
    assert all(torch.equal(back[k], other[k]) for k in back)
    with safetensors.safe_open(files / "back.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}


def test_torch_checkpoints_and_options(files, capsys):
    sizes = []
    for option in (
        ["--floor-bits", "4"],
        ["--floor-bits", "6"],
        ["--bits", "10"],
        ["--max-error", "0.0001"],
        ["--lossless"],
    ):
        assert run("pack", files / "m.pt", files / "o.wcz", *option) == 0
        sizes.append((files / "o.wcz").stat().st_size)
    assert sizes == sorted(sizes)
    assert run("verify", files / "o.wcz", "--against", files / "m.pt") == 0
    assert run("pack", files / "m.pt", files / "o.wcz", "--bits", "4", "--lossless") == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--per-channel"], ["--group-size", "32"], ["--clip-quantile", "0.95"]], ids=str)
def test_ranges(option, files, capsys):
    assert run("pack", files / "m.pt", files / "o.wcz", "--ratio", "5", *option) == 0
    assert run("verify", files / "o.wcz", "--against", files / "m.pt") == 0
    assert run("pack", files / "m.pt", files / "plain.wcz", "--ratio", "5") == 0
    assert (files / "o.wcz").read_bytes() != (files / "plain.wcz").read_bytes()
    capsys.readouterr()
    assert run("pack", files / "m.pt", files / "o.wcz", "--lossless", *option) == 2
    assert "lossless" in capsys.readouterr().err


def test_inspect_and_plot(files, capsys):
    run("pack", files / "m.safetensors", files / "m.wcz")
    capsys.readouterr()
    assert run("inspect", files / "m.wcz", "--plot", files / "bits.png") == 0
    out = capsys.readouterr().out
    assert "error bound" in out and "who: me" in out and (files / "bits.png").read_bytes().startswith(b"\x89PNG")
    assert run("inspect", files / "m.wcz", "--plot", files / "bits.docx") == 2


def test_tied_weights(files, capsys):
    tied = torch.randn(50, 50)
    torch.save({"a": tied, "b": tied}, files / "tied.pt")
    assert run("pack", files / "tied.pt", files / "tied.wcz") == 0
    assert run("inspect", files / "tied.wcz") == 0
    assert "1 more names share payloads" in capsys.readouterr().out
    assert run("unpack", files / "tied.wcz", files / "tied.safetensors") == 0


def test_verify_finds_damage_and_differences(files, capsys):
    run("pack", files / "m.safetensors", files / "m.wcz")
    changed = weights() | {"fc.weight": weights()["fc.weight"] + 1}
    safetensors.torch.save_file(changed, files / "changed.safetensors")
    assert run("verify", files / "m.wcz", "--against", files / "changed.safetensors") == 2
    assert "fc.weight: expected an error of at most" in capsys.readouterr().err
    del changed["steps"]
    safetensors.torch.save_file(changed, files / "changed.safetensors")
    assert run("verify", files / "m.wcz", "--against", files / "changed.safetensors") == 2
    assert "name different tensors: steps" in capsys.readouterr().err
    data = bytearray((files / "m.wcz").read_bytes())
    data[-100] ^= 1
    (files / "m.wcz").write_bytes(data)
    assert run("verify", files / "m.wcz") == 2
    assert "weight_compression: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "missing.safetensors", "x.wcz"], "missing.safetensors"),
        (["pack", "broken.safetensors", "x.wcz"], "not a safetensors file"),
        (["pack", "broken.pt", "x.wcz"], "weights_only=True"),
        (["pack", "list.pt", "x.wcz"], "expected a dict of tensors"),
        (["pack", "nan.pt", "x.wcz"], "w: expected finite values"),
        (["pack", "m.safetensors", "x.wcz", "--floor-bits", "99"], "floor_bits: expected 0 to 16"),
        (["pack", "model.onnx", "x.wcz"], "expected a .safetensors, .pt"),
        (["unpack", "m.safetensors", "x.pt"], "expected a file to begin with"),
        (["unpack", "m.safetensors", "x.zip"], "expected a name that ends in"),
        (["inspect"], "required: source"),
        (["squeeze"], "invalid choice"),
    ],
)
def test_errors_are_one_line(files, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(files)
    Path("broken.safetensors").write_bytes(b"not a file of that kind")
    Path("broken.pt").write_bytes(b"not a checkpoint")
    torch.save([1, 2], "list.pt")
    torch.save({"w": torch.tensor([1.0, float("nan")])}, "nan.pt")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("weight_compression: error: ") and error.count("\n") == 1 and message in error
    assert not Path("x.wcz").exists()


def test_as_a_program(files):
    command = [sys.executable, "-m", "weight_compression", "pack", "m.safetensors", "m.wcz"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=files, capture_output=True, text=True, env=environment, check=True)
    assert "values in" in result.stdout and result.stderr == ""
