"""Ranks that fail, die, stall or receive what was not sent: everybody gets an error, nobody hangs, parameters stay."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ranks import run_ranks
from test_distributed import bits_of, values
from weight_compression import CompressionConfig, PayloadError
from weight_compression.distributed import (
    CompressedProcessGroup,
    EntropyCompressionState,
    PeerError,
    compressed_all_reduce,
    compressed_broadcast,
    entropy_compression_hook,
    jobs,
    messages,
)

STALL = 1000.0


def flip_what_comes(kind):
    """A bit of what rank 0 sent is different when it is decoded."""
    complete = kind.complete

    def complete_flipped(self, received):
        if received.data[0].numel():
            received.data[0][-1] ^= 16
        complete(self, received)

    kind.complete = complete_flipped
    return lambda: setattr(kind, "complete", complete)


def error_of(function):
    try:
        function()
    except Exception as error:
        return error
    return None


def reduce_several(rank, sizes=(150_000, 170_000, 140_000)):
    """Errors of all-reduces that are under way at once, of tensors that every rank owns a part of."""
    futures = [compressed_all_reduce(values(rank, (numel,)), async_op=True) for numel in sizes]
    return [error_of(future.wait) for future in futures]


def receive_wrongly(rank, stage):
    compressed_all_reduce(values(rank, (50_000,)))
    if rank == 1:
        flip_what_comes({"adding": jobs._Add, "handing": jobs._HandSums}[stage])
    first, second, third = reduce_several(rank)
    if rank == 1:
        assert isinstance(first, PayloadError), first
        assert "from rank 0, tensor 0[" in str(first)
        assert second is not None
    elif stage == "adding":
        assert isinstance(first, PeerError), first
        assert "rank 1 could not do its part" in str(first)
    assert isinstance(third, PayloadError if rank == 1 else PeerError), third
    again = error_of(lambda: compressed_all_reduce(values(rank, (3,))))
    assert isinstance(again, PayloadError if rank == 1 else PeerError), again
    return True


@pytest.mark.parametrize("stage", ["adding", "handing"])
def test_a_corrupt_payload_names_rank_and_tensor(stage):
    run_ranks(receive_wrongly, 2, stage)


def receive_a_wrong_broadcast(rank):
    if rank == 1:
        flip_what_comes(jobs._HandValues)
    errors = [error_of(lambda: compressed_broadcast(values(0, (50_000,)), 0)) for _ in range(2)]
    if rank == 1:
        assert all(isinstance(error, PayloadError) and "from rank 0" in str(error) for error in errors), errors
    else:
        assert isinstance(errors[1], PeerError), errors
    return True


def test_a_corrupt_broadcast():
    run_ranks(receive_a_wrong_broadcast, 2)


def fail_to_encode(rank, when):
    compressed_all_reduce(values(rank, (50_000,)))
    pack, calls = messages.pack, []

    def pack_or_fail(*args):
        calls.append(None)
        if len(calls) == when:
            raise MemoryError("no memory for the payload")
        return pack(*args)

    if rank == 2:
        messages.pack = pack_or_fail
    errors = reduce_several(rank)
    if rank == 2:
        assert any(isinstance(error, MemoryError) for error in errors), errors
    else:
        assert any(isinstance(error, PeerError) and "rank 2 could not" in str(error) for error in errors), errors
    assert errors[-1] is not None
    return True


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_rank_that_cannot_encode_tells_the_others(when):
    run_ranks(fail_to_encode, 3, when)


def make_training(rank, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 400), nn.Tanh(), nn.Linear(400, 200), nn.Tanh(), nn.Linear(200, 1))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.1)
    state = EntropyCompressionState(module=model, start_iteration=1, **options)
    ddp.register_comm_hook(state, entropy_compression_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(seed):
        optimizer.zero_grad()
        loss = ddp(values(rank, (16, 30), seed=seed)).square().mean()
        loss.backward()
        optimizer.step()

    return model, state, step


def parameters_of(model):
    return bits_of(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))


def train_with_corruption(rank):
    model, _, step = make_training(rank)
    for i in range(3):
        step(i)
    before = parameters_of(model)
    if rank == 1:
        flip_what_comes(jobs._Add)
    error = error_of(lambda: step(3))
    assert isinstance(error, RuntimeError), error
    assert ("from rank 0, 4.weight[0:200]" if rank == 1 else "rank 1 could not do its part") in str(error), error
    assert parameters_of(model) == before
    return before


def test_parameters_are_unchanged_after_a_corrupt_payload():
    seen = run_ranks(train_with_corruption, 2)
    assert seen[0] == seen[1]


TIMEOUT = 4.0


def lose_a_rank(rank, how, training):
    if training:
        model, _, step = make_training(rank)
    else:
        model, step = nn.Linear(1, 1), lambda seed: compressed_all_reduce(values(rank, (50_000,), seed=seed))
    for i in range(3):
        step(i)
    if rank == 1:
        if how == "stall":
            time.sleep(STALL)
        os._exit(1)
    before = parameters_of(model)
    start = time.monotonic()
    error = error_of(lambda: step(3))
    took = time.monotonic() - start
    assert isinstance(error, RuntimeError), error
    assert took < 2 * TIMEOUT, took
    assert parameters_of(model) == before
    assert isinstance(error_of(lambda: compressed_all_reduce(torch.zeros(5))), RuntimeError)
    return before


@pytest.mark.parametrize("training", [False, True], ids=["all_reduce", "ddp"])
@pytest.mark.parametrize("how", ["die", "stall"])
def test_a_lost_rank_is_an_error_within_the_timeout(how, training):
    seen = run_ranks(lose_a_rank, 3, how, training, timeout=TIMEOUT, lost=[1])
    assert seen[0] == seen[2]


def reduce_what_fails_by_way_of_a_group(rank):
    """Whoever waits for a process group's work gets its error; torch's own work, made of a future, has none to give."""
    group = CompressedProcessGroup()
    x = torch.full((5000,), 1.0 + rank)
    dist.all_reduce(x, group=group)
    torch.testing.assert_close(x, torch.full((5000,), 3.0))
    with pytest.raises(ValueError):  # or what torch says of groups that it has not made, while it logs that error
        dist.all_reduce(torch.ones(5000 + 100 * rank), group=group)
    with pytest.raises((PayloadError, PeerError)):
        dist.all_reduce(torch.ones(5000), group=group, async_op=True).wait()
    return True


def test_errors_come_out_of_a_process_groups_work():
    run_ranks(reduce_what_fails_by_way_of_a_group, 2)


def reduce_in_inference_mode(rank):
    with torch.inference_mode(), pytest.raises(ValueError, match=r"not made in torch\.inference_mode"):
        compressed_all_reduce(torch.ones(5000))
    x = torch.ones(5000)
    with torch.inference_mode():
        compressed_all_reduce(x, dist.ReduceOp.SUM)
    assert x[0] == 2
    with pytest.raises(ValueError, match="per_channel: tensors are sent flat"):
        compressed_all_reduce(x, config=CompressionConfig(per_channel=True))
    with pytest.raises(TypeError, match="config: expected a CompressionConfig, got dict"):
        compressed_all_reduce(x, config={"bits": 4})
    compressed_all_reduce(x, dist.ReduceOp.SUM)
    return float(x[0]) == 4


def test_what_cannot_be_sent_is_refused_before_anything_is():
    assert all(run_ranks(reduce_in_inference_mode, 2))


def end_with_work_under_way(rank):
    """The interpreter ends with threads that wait and, on rank 0, with sums that nobody waited for."""
    compressed_all_reduce(values(rank, (3_000_000,)), async_op=rank == 0)
    dist.barrier()
    return True


def test_processes_end_while_threads_run():
    run_ranks(end_with_work_under_way, 2)


def make_the_group_again(rank, port):
    """destroy_process_group and a new one: nothing is left of the old channel."""
    first = values(rank, (20_000,))
    compressed_all_reduce(first)
    dist.destroy_process_group()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    second = values(rank, (20_000,))
    compressed_all_reduce(second)
    assert torch.equal(first, second)
    return True


def test_a_group_can_be_destroyed_and_made_again():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run_ranks(make_the_group_again, 2, store.port)
