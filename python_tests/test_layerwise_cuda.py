"""Layer-wise training on a CUDA device: every method, mixed precision, exact resume, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise_cases import METHODS, NOISE, cnn, loader, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICE = "cuda"


def fit(method, model=None, *, seed=3, data=None, validation=None, resume=False, **options):
    trainer = lw.LayerwiseTrainer((model or cnn()).to(DEVICE), method, classes=10, **options)
    torch.manual_seed(seed)
    trainer.fit(data or loader(), validation or loader(100, shuffle=False), resume=resume)
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_cuda_trains_as_the_cpu_does(name):
    method = METHODS[name]
    here = lw.LayerwiseTrainer(cnn(), method, classes=10)
    torch.manual_seed(3)
    here.fit(loader(), loader(100, shuffle=False))
    there = fit(method)
    columns = ("stage", "first", "last", "epoch", "lr")
    assert [[row[c] for c in columns] for row in here.history] == [[row[c] for c in columns] for row in there.history]
    if method.regularisation != NOISE:  # which is drawn on the device
        first = [trainer.history[0]["loss"] for trainer in (here, there)]
        assert first[1] == pytest.approx(first[0], rel=1e-2)
    assert all(p.device.type == DEVICE for p in there.chain.parameters())
    assert 0 <= there.evaluate(loader(100, shuffle=False)) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_mixed_precision_learns(dtype):
    trainer = fit(METHODS["bottom up"], amp=dtype)
    losses = [row["loss"] for row in trainer.history if row["first"] == 0]
    assert losses[-1] < losses[0]
    scaled = {t.scaler.get_scale() for t in trainer.trainings.values()}
    assert scaled == {1.0} if dtype == torch.bfloat16 else min(scaled) > 1


@pytest.mark.parametrize("name", ["bottom up", "segments", "random robin"])
def test_cuda_runs_resume_bit_by_bit(name, tmp_path):
    class Interrupt(Exception):
        pass

    def interrupt(trainer, rows):
        if len(trainer.history) == 3:
            raise Interrupt

    method = replace(METHODS[name], head=lw.LinearHead())
    flat, path = loader(flat=True), tmp_path / "c.pt"
    whole = fit(method, mlp(20, 20, 20), data=flat, validation=flat)
    with pytest.raises(Interrupt):
        fit(method, mlp(20, 20, 20), data=flat, validation=flat, checkpoint=path, callbacks=[interrupt])
    again = fit(method, mlp(20, 20, 20, seed=9), data=flat, validation=flat, seed=4, checkpoint=path, resume=True)
    for a, b in zip(whole.chain.state_dict().values(), again.chain.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_cuda_training_keeps_the_budget():
    x, y = torch.randn(512, 3, 32, 32, device=DEVICE), torch.arange(512, device=DEVICE) % 10
    data = DataLoader(TensorDataset(x, y), 128)
    chain = lw.split(lw.zoo.make("resnet50", width=0.5).to(DEVICE))
    method = lw.dll(0.3, epochs=1)
    allowed = 0.3 * lw.backprop_memory(chain, method, x[:128], 10, measure=True).total
    resident = [*chain.parameters(), *chain.buffers()]
    trainer = lw.LayerwiseTrainer(chain, method, classes=10)
    used = lw.measure_memory(lambda: trainer.fit(data), resident, device=DEVICE).total
    assert used <= 1.02 * allowed
