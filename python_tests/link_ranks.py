"""What the ranks of test_slow_link.py do; in a module of its own, since their processes import it by name."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist


def sum_ranks(rank, numel):
    """Bytes that an all-reduce sent, and its result's first value."""
    tensor = torch.full((numel,), float(rank.rank + 1))
    dist.barrier()
    sent = rank.bytes_sent()
    dist.all_reduce(tensor)
    dist.barrier()
    return rank.bytes_sent() - sent, float(tensor[0])


def raise_on_one(rank):
    if rank.rank == 1:
        raise ValueError("rank 1 gives up")
    dist.all_reduce(torch.zeros(1))


def die_on_one(rank):
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def stall(rank):
    time.sleep(600)
