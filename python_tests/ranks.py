"""Tests in real processes: a function is called once for every rank of a gloo group."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist

GRACE = 10.0  # seconds that other ranks get to report, or to end, after the first one that failed

# Forked from a server that has imported torch once; it holds no threads and nothing of the test's process.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch.distributed", "torch._dynamo", "weight_compression.distributed"])


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 30.0,
    limit: float = 120.0,
    lost: Collection[int] = (),
) -> list[Any]:
    """``function(rank, *args)`` in a process for every rank, with gloo initialised as the default group.

    Parameters
    ----------
    function : callable
        Importable by its name: no lambda, nothing defined inside a test. Arguments and results are pickled.
    ranks : int
    timeout : float, default 30
        Seconds, of the group's collectives.
    limit : float, default 120
        Seconds after which processes that have not returned are ended.
    lost : collection of int, optional
        Ranks that die or stall on purpose. They are ended when all others have returned; their result is None.

    Returns
    -------
    list
        What the ranks returned.

    Raises
    ------
    AssertionError
        If a rank raised, died or did not return; it has the tracebacks.
    """
    __tracebackhide__ = True
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(ranks):
        here, there = _processes.Pipe()
        process = _processes.Process(
            target=_work, args=(there, function, rank, ranks, store.port, timeout, limit, args), daemon=True
        )
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    try:
        deadline = time.monotonic() + limit
        waiting = {pipes[rank]: rank for rank in range(ranks) if rank not in lost}
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    processes[rank].join(GRACE)
                    ok, result = False, f"died with exit code {processes[rank].exitcode}"
                (results if ok else errors)[rank] = result
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        errors |= {rank: f"did not return within {limit} s" for rank in waiting.values() if not errors}
        if not errors:
            for pipe in pipes:
                pipe.close()  # ranks wait for this, so that none ends while others still need it
            for rank, process in enumerate(processes):
                if rank not in lost:
                    process.join(GRACE)
                    if process.exitcode != 0:
                        errors[rank] = f"returned, but then ended with exit code {process.exitcode}"
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    if errors:
        raise AssertionError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
    return [results.get(rank) for rank in range(ranks)]


def _work(
    pipe: multiprocessing.connection.Connection,
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    port: int,
    timeout: float,
    limit: float,
    args: tuple,
) -> None:
    faulthandler.dump_traceback_later(0.9 * limit)  # of all threads, to stderr, if it hangs
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    span = datetime.timedelta(seconds=timeout)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=datetime.timedelta(seconds=limit))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=span)
        message = True, function(rank, *args)
    except BaseException:
        message = False, traceback.format_exc()
    try:
        pipe.send_bytes(pickle.dumps(message))
        pipe.recv_bytes()
    except (EOFError, OSError):
        pass
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()
