"""FSDP2 with coded all-gathers, in real processes."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ranks import run_ranks
from test_distributed import bits_of
from weight_compression import CompressionConfig, compress, decompress
from weight_compression.distributed import messages
from weight_compression.distributed.fsdp import CompressedAllGather
from weight_compression.distributed.plan import EXACT_BELOW


def make_model():
    """Uneven shards, one of no rows, layers of very different scale, a module inside that is sharded by itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(33, 301), nn.Tanh(), nn.Sequential(nn.Linear(301, 64), nn.Tanh()), nn.Linear(64, 40), nn.Tanh(),
        nn.Linear(40, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[3].weight.mul_(1e-4)
    return model


def shard(model, ranks, config=None, coded=True, **options):
    mesh = init_device_mesh("cpu", (ranks,))
    for module in (model[2], model):
        fully_shard(module, mesh=mesh, **options)
    if coded:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(CompressedAllGather(module, config))
    return model


def decoded(weight, ranks, config=None):
    """What all ranks compute with: every rank's rows, padded to the same number, coded by themselves."""
    rows = -(-weight.shape[0] // ranks)
    parts = []
    for part in weight.split(rows):
        padded = torch.zeros(rows, *weight.shape[1:], dtype=weight.dtype)
        padded[: part.shape[0]] = part
        coded = padded if padded.numel() < EXACT_BELOW else decompress(compress(padded.reshape(-1), config))
        parts.append(coded.view_as(padded)[: part.shape[0]])
    return torch.cat(parts)


def full(model):
    return [p.full_tensor().detach().clone() for p in model.parameters()]


def make_batch(rank, step):
    x = torch.randn(16, 33, generator=torch.Generator().manual_seed(10 * step + rank))
    return x, x[:, :1].sin()


def train(model, rank, steps, lr=0.2):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in steps:
        optimizer.zero_grad()
        x, y = make_batch(rank, step)
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def compute_with_decoded_weights(rank, ranks):
    config = CompressionConfig(floor_bits=3)
    seen = []
    expected = make_model()
    with torch.no_grad():
        for p in expected.parameters():
            p.copy_(decoded(p, ranks, config))
    originals = [p.detach().clone() for p in make_model().parameters()]
    x, y = make_batch(0, 0)
    loss = nn.functional.mse_loss(expected(x), y)
    loss.backward()

    variants = [{}, {"reshard_after_forward": False}]
    if ranks == 4:
        variants.append({"reshard_after_forward": 2})
    for options in variants:
        model = shard(make_model(), ranks, config, **options)
        before = full(model)
        out = model(x)
        assert torch.equal(out, expected(x)), options
        nn.functional.mse_loss(out, y).backward()
        if options.get("reshard_after_forward") != 2:  # backward then gathers other shards
            for p, plain in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(p.grad.full_tensor(), plain.grad)
        for p, kept, original in zip(full(model), before, originals, strict=True):
            assert torch.equal(p, kept)
            assert torch.equal(p, original)
        seen.append(bits_of(out))
    small = decoded(originals[4], ranks, config)
    assert (small - originals[4]).norm() < 0.2 * originals[4].norm()

    model = shard(make_model(), ranks, config)
    with torch.inference_mode():
        assert torch.equal(model(x), expected(x))
    model = shard(make_model(), ranks, config)
    model(x)  # FSDP sets itself up
    model.reshard()
    handle = model.unshard(async_op=True)
    handle.wait()
    for module in (model, model[2]):
        module.unshard()
    for p, plain in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, plain)
    model.reshard()
    model[2].reshard()
    return seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_ranks_compute_with_the_decoded_weights_and_shards_stay_exact(ranks):
    seen = run_ranks(compute_with_decoded_weights, ranks, ranks)
    assert all(of_rank == seen[0] for of_rank in seen)


def train_beside_uncompressed(rank):
    _, y = make_batch(0, 0)
    start = float(y.square().mean())
    losses = [train(shard(make_model(), 2, coded=coded), rank, range(30)) for coded in (True, False)]
    assert losses[1] < 0.5 * start
    assert losses[0] < losses[1] + 0.05 * start, losses

    # bfloat16 weights, and shards of columns.
    options = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "shard_placement_fn": lambda p: Shard(1) if p.shape == (64, 40)[::-1] else None,
    }
    losses = [train(shard(make_model(), 2, coded=coded, **options), rank, range(30)) for coded in (True, False)]
    assert losses[0] < losses[1] + 0.05 * start, losses

    mixed = make_model()
    mixed[3].requires_grad_(False).to(torch.float64)  # FSDP itself expects one dtype of those that are trained
    mixed = shard(mixed, 2)
    with pytest.raises(TypeError, match=r"one dtype in every FSDP module.*torch\.uint8"):
        mixed(make_batch(rank, 0)[0])
    return True


def test_training_converges_beside_uncompressed():
    run_ranks(train_beside_uncompressed, 2)


def gather_what_fails(rank):
    """One rank cannot decode: whoever waits for the gather hears of it. And shards cannot be compressed as they are."""
    model = shard(make_model(), 2)
    with pytest.raises(TypeError, match=r"got DTensor; of a DTensor: to_local\(\) or full_tensor\(\)"):
        compress(model[0].weight)
    model(make_batch(rank, 0)[0])
    model.reshard()
    if rank == 1:

        def fail(*_):
            raise MemoryError("no memory for the values")

        messages.read = fail
        with pytest.raises(MemoryError, match="no memory for the values"):
            model.unshard(async_op=True).wait()
    else:
        model.unshard(async_op=True).wait()
    return True


def test_a_gather_that_fails_is_heard_of():
    run_ranks(gather_what_fails, 2)


def test_wrong_module():
    with pytest.raises(TypeError, match="fully_shard"):
        CompressedAllGather(copy.deepcopy(nn.Linear(2, 2)))
