"""The trainer in two real processes: gradients averaged by DDP, weights averaged by the codec."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import layerwise as lw
from layerwise_cases import ADAM, METHODS, cnn, digits
from ranks import run_ranks
from weight_compression.distributed import CompressedModelAverager

SGD = lw.OptimizerSpec("sgd", 0.1, options={"momentum": 0.9})
PLAIN = lw.Method("plain", lambda n: [*lw.bottom_up(n, 1), *lw.simultaneous(n, 2)], optimizer=SGD)


def shard(rank: int, batch: int = 20) -> DataLoader:
    """Every second batch of a run over all of the data."""
    x, y = digits(160).tensors
    rows = torch.arange(160).view(-1, 2, batch)[:, rank].flatten()
    return DataLoader(TensorDataset(x[rows], y[rows]), batch)


def by_ddp(rank: int, accumulate: int) -> dict:
    torch.manual_seed(rank)
    model = cnn(norm=False)
    trainer = lw.LayerwiseTrainer(model, PLAIN, classes=10, distributed="ddp", accumulate=accumulate)
    torch.manual_seed(10 * rank)
    trainer.fit(shard(rank, 20 // accumulate), shard(rank))
    heads = {str(w): t.subnet.head.state_dict() for w, t in trainer.trainings.items()}
    return {"model": model.state_dict(), "heads": heads, "accuracy": trainer.history[-1]["validation_accuracy"]}


class Interrupt(Exception):
    pass


def average(subnet: torch.nn.Module, period: int = 2) -> CompressedModelAverager:
    return CompressedModelAverager(period, buffers=subnet)


def by_averaging(rank: int, folder: str, stop: int | None, resume: bool) -> dict:
    def interrupt(trainer, rows):
        if stop is not None and len(trainer.history) == stop:
            raise Interrupt

    torch.manual_seed(rank)
    trainer = lw.LayerwiseTrainer(
        cnn(seed=rank),
        replace(METHODS["bottom up"], optimizer=ADAM),
        classes=10,
        distributed=partial(average, period=2),
        checkpoint=Path(folder) / "c.pt",
        callbacks=[interrupt],
    )
    torch.manual_seed(rank)
    try:
        trainer.fit(shard(rank), shard(rank), resume=resume)
    except Interrupt:
        return {}
    return trainer.chain.state_dict()


VARIANTS = {
    "running statistics": (PLAIN, {}),
    "a last step of fewer batches": (PLAIN, {"accumulate": 3}),
    "pruning": (lw.Method("pruning", lambda n: lw.bottom_up(n, 1), optimizer=SGD, pruning=lw.Pruning(0.5, 1, 2)), {}),
    "best weights": (replace(PLAIN, stopping=lw.Stopping(restore_best=True)), {}),
    "closed form": (
        lw.Method("ridge", lambda n: lw.bottom_up(n, 1), head=lw.RidgeHead(), loss="mse", optimizer=SGD),
        {},
    ),
}


def by_variant(rank: int, name: str) -> dict:
    method, options = VARIANTS[name]
    model = cnn()
    trainer = lw.LayerwiseTrainer(model, method, classes=10, distributed="ddp", **options)
    trainer.fit(shard(rank), shard(rank))
    heads = {f"{w} {k}": v for w, t in trainer.trainings.items() for k, v in t.subnet.head.state_dict().items()}
    return {**trainer.chain.state_dict(), **heads}


@pytest.mark.parametrize("name", VARIANTS)
def test_replicas_by_ddp_are_the_same(name):
    first, second = run_ranks(by_variant, 2, name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ddp_is_one_process_with_the_whole_batch(accumulate):
    first, second = run_ranks(by_ddp, 2, accumulate)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])
    assert first["accuracy"] == second["accuracy"]
    for window, head in first["heads"].items():
        assert all(torch.equal(v, second["heads"][window][k]) for k, v in head.items())

    torch.manual_seed(0)
    trainer = lw.LayerwiseTrainer(cnn(norm=False), PLAIN, classes=10)
    torch.manual_seed(0)
    data = DataLoader(digits(160), 40)
    trainer.fit(data, data)
    for name, value in trainer.chain.state_dict().items():
        torch.testing.assert_close(value, first["model"][name], rtol=1e-3, atol=1e-4)
    assert trainer.history[-1]["validation_accuracy"] == pytest.approx(first["accuracy"], abs=0.02)


def test_weights_averaged_by_the_codec_agree_and_resume(tmp_path):
    whole = run_ranks(by_averaging, 2, str(tmp_path), None, False)
    for name, value in whole[0].items():
        assert torch.equal(value, whole[1][name]), name
    (tmp_path / "b").mkdir()
    run_ranks(by_averaging, 2, str(tmp_path / "b"), 4, False)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["c.rank0.pt", "c.rank1.pt"]
    resumed = run_ranks(by_averaging, 2, str(tmp_path / "b"), None, True)
    for name, value in whole[0].items():
        assert torch.equal(value, resumed[0][name]), name
