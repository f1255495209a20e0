"""The package as installed: what it prints, how it is limited from outside, that it imports without a GPU and survives fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from platonic import PlatonicMLPClassifier
from platonic_core import _C, __version__
from platonic_core.__main__ import describe

ROOT = Path(__file__).parents[1]
ISAS = ["scalar", "avx2", "avx512"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


def test_module_prints_what_was_built():
    done = run("-m", "platonic_core")
    assert done.returncode == 0, done.stderr
    printed = dict(
        line.split(maxsplit=1)
        for line in done.stdout.splitlines()
        if line.startswith(("platonic-dl", "torch", "numpy"))
    )
    assert printed["platonic-dl"] == __version__ == _C.version
    for name in describe():
        assert name in done.stdout


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_is_limited_from_the_environment(isa):
    done = run("-c", "from platonic_core import _C; print(_C.isa())", PLATONIC_ISA=isa)
    assert done.returncode == 0, done.stderr
    best = run("-c", "from platonic_core import _C; print(_C.isa())", PLATONIC_ISA="").stdout.strip()
    assert done.stdout.strip() == min(isa, best, key=ISAS.index)


def test_unknown_instruction_set_is_an_error():
    done = run("-c", "from platonic_core import _C; print(_C.isa())", PLATONIC_ISA="sse9")
    assert done.returncode != 0
    assert "instruction set must be scalar, avx2 or avx512, got 'sse9'" in done.stderr
    with pytest.raises(ValueError, match="got 'neon'"):
        _C.limit_isa("neon")


def test_limit_is_lifted_again():
    before = _C.isa()
    _C.limit_isa("scalar")
    try:
        assert _C.isa() == "scalar"
    finally:
        _C.limit_isa("")
    assert _C.isa() == before


def test_imports_without_a_gpu():
    done = run(
        "-c",
        "import platonic, torch; assert not torch.cuda.is_available(); print(platonic.__version__)",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == __version__


def test_importing_does_not_import_optional_libraries():
    code = "import sys, platonic; print([m for m in ('matplotlib', 'polars', 'PIL') if m in sys.modules])"
    done = run("-c", code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


class FitsInItsWorker(torch.utils.data.Dataset):
    """One item: the outputs of a network fitted where the item is asked for."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((300, 5)), np.arange(300) % 3
        return PlatonicMLPClassifier((50, 20), random_state=0).fit(X, y).decision_function(X)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_worker_fits_after_its_parent():
    """Threads do not survive a fork, so a pool of them that the parent has used must be made anew in the child.

    The child is a DataLoader's worker, which gives torch one thread: torch's own OpenMP pool does not survive.
    """
    data = FitsInItsWorker()
    here = data[0]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    np.testing.assert_allclose(next(iter(loader)), here, rtol=0, atol=1e-9)
