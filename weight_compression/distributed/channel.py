"""Two threads with a process group each, which exchange the pieces of all jobs in the order in which they came.

The first stage adds up (reduce-scatter), the second hands out (all-gather). A stage codes the next piece while the last one
is on its way, and both stages run side by side. Which collective follows which does not depend on timing, as
torch.distributed demands: on each group it is the lengths of a piece, its bytes, the lengths of the next one, which follow
the bytes that are on their way.

A rank that fails tells the others so in place of lengths. One that dies or stalls, torch.distributed reports, within the
timeout of the group that the channel is for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

__all__ = ["Channel", "PeerError", "Received", "Stage", "Task", "channel_of"]

CLOSING = 5.0  # seconds
FAILED = -1  # in place of 0 behind the lengths


class PeerError(RuntimeError):
    """Another rank could not do its part of a collective; its own error says why."""


@dataclass
class Received:
    """By sender: payloads' lengths as they were sent, and their bytes one behind the other."""

    lengths: list[list[int]]
    data: list[torch.Tensor]


class Task(ABC):
    """A piece on its way through a stage.

    Attributes
    ----------
    device : torch.device
        Of what is sent.
    sends, expects : list of int
        How many payloads go to each rank and come from each. All ranks know: it follows from the tensors' sizes.
    stream : torch.cuda.Stream or None
        Where kernels and collectives are queued; None on the CPU.
    """

    device: torch.device
    sends: list[int]
    expects: list[int]
    stream: torch.cuda.Stream | None = None

    @abstractmethod
    def encode(self) -> tuple[list[list[int]], list[torch.Tensor]]:
        """By receiver: lengths of the payloads, below 0 for those that are read differently, and uint8 tensors.

        Called in the order in which tasks were submitted.
        """

    @abstractmethod
    def complete(self, received: Received) -> None:
        """Called when everything has come, in the same order."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Called in place of either, or after both."""

    @abstractmethod
    def spend(self, coding: float, sending: float) -> None:
        """Seconds that this rank coded, and that it waited for bytes, for this task."""


@dataclass
class _Lengths:
    """Lengths on their way."""

    work: dist.Work
    got: torch.Tensor
    counts: list[int]
    kept: torch.Tensor  # what is sent lives until it is

    def read(self) -> list[list[int] | None]:
        """By sender, None if it failed."""
        self.work.wait()
        split = [of_rank.tolist() for of_rank in torch.split(self.got.cpu(), self.counts)]
        return [None if of_rank[-1] == FAILED else of_rank[:-1] for of_rank in split]


@dataclass
class _Announced:
    task: Task
    parts: list[torch.Tensor]
    lengths: _Lengths
    coding: float


@dataclass
class _OnItsWay:
    task: Task
    works: list[dist.Work]
    received: Received
    parts: list[torch.Tensor]  # what is sent lives until it is
    coding: float
    waiting: float


class Stage:
    """A thread and a process group."""

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self.group = group
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._abandoned: tuple[_OnItsWay | None, _OnItsWay | None] = None, None
        self._told = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread = threading.Thread(target=self._run, name=f"weight_compression {name}", daemon=True)
        self._thread.start()

    def submit(self, task: Task) -> None:
        self._tasks.put(task)

    def stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """This stage's own on a CUDA device. Two groups' collectives in one stream could wait for each other for ever."""
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def close(self) -> None:
        """End the thread when it has done what was submitted before, and wait for that, but not for ranks that are lost.

        A thread that still ran while the interpreter ends would take the process down.
        """
        self._tasks.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(CLOSING)

    def _run(self) -> None:
        before: _OnItsWay | None = None
        with torch.no_grad():
            while True:
                try:
                    task = self._tasks.get(block=before is None)
                except queue.Empty:
                    before = self._advance(None, before)
                    continue
                if task is None:
                    self._advance(None, before)
                    return
                before = self._advance(task, before)
                del task  # the last job's tensors should not live as long as the thread

    def _advance(self, task: Task | None, before: _OnItsWay | None) -> _OnItsWay | None:
        """Encode and send `task`, and complete the one before it, whose bytes arrive in the meantime."""
        sent: _OnItsWay | None = None
        try:
            if self._error is not None:
                raise self._error
            announced: _Announced | None = None
            if task is not None:
                announced = self._announce(task)
            if before is not None:
                start = time.perf_counter()
                with self._exchanging(), _on(before.task):
                    for work in before.works:
                        work.wait()
                before.waiting += time.perf_counter() - start
            if announced is not None:
                sent = self._send(announced)
            if before is not None:
                start = time.perf_counter()
                with _on(before.task):
                    before.task.complete(before.received)
                before.task.spend(before.coding + time.perf_counter() - start, before.waiting)
            return sent
        except BaseException as error:  # whatever it is: somebody waits for the result
            self._give_up(error, task, before, sent)
            return None

    def _announce(self, task: Task) -> _Announced:
        """Encode, and put the lengths behind the bytes that are on their way: they are there when those are."""
        start = time.perf_counter()
        with _on(task):
            lengths, parts = task.encode()
            coded = time.perf_counter()
            with self._exchanging():
                return _Announced(task, parts, self._start_lengths(task, lengths, 0), coded - start)

    def _send(self, announced: _Announced) -> _OnItsWay:
        task, parts = announced.task, announced.parts
        start = time.perf_counter()
        with self._exchanging(), _on(task):
            received = announced.lengths.read()
            for rank, of_rank in enumerate(received):
                if of_rank is None:
                    who = dist.get_global_rank(self.group, rank)
                    raise PeerError(f"rank {who} could not do its part; its own error says why")
            lengths_of = [of_rank for of_rank in received if of_rank is not None]
            sizes = [sum(map(abs, of_rank)) for of_rank in lengths_of]
            data = [torch.empty(size, dtype=torch.uint8, device=task.device) for size in sizes]
            works = self._start_bytes(parts, data)
        waiting = time.perf_counter() - start
        return _OnItsWay(task, works, Received(lengths_of, data), parts, announced.coding, waiting)

    def _start_bytes(self, parts: list[torch.Tensor], data: list[torch.Tensor]) -> list[dist.Work]:
        """Send parts[r] to rank r, receive data[r] from it.

        Receiving goes first. gloo's sender waits for a word that the receiver is ready, which takes its place behind all
        that the receiver itself sends before: ranks would take turns on a link that carries both ways at once.
        """
        operations = [
            dist.P2POp(operation, part, group=self.group, group_peer=rank)
            for operation, of_ranks in ((dist.irecv, data), (dist.isend, parts))
            for rank, part in enumerate(of_ranks)
            if part.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Whoever fails here has nobody to tell: another rank has said that it failed, or does not answer."""
        try:
            yield
        except BaseException:
            self._told = True
            raise

    def _start_lengths(self, task: Task, lengths: list[list[int]], status: int) -> _Lengths:
        """A status comes with them, because who failed may have nothing to send."""
        sent = torch.tensor([x for of_rank in lengths for x in (*of_rank, status)], dtype=torch.int64, device="cpu").to(
            task.device
        )
        counts = [count + 1 for count in task.expects]
        got = torch.empty(sum(counts), dtype=torch.int64, device=task.device)
        work = dist.all_to_all_single(
            got, sent, counts, [count + 1 for count in task.sends], group=self.group, async_op=True
        )
        return _Lengths(work, got, counts, sent)

    def _give_up(
        self, error: BaseException, task: Task | None, before: _OnItsWay | None, sent: _OnItsWay | None
    ) -> None:
        """All that is under way or comes later fails, because the ranks' collectives no longer match."""
        self._error = error
        # gloo does not read from a rank again whose message has nowhere to go: what is on its way keeps its memory.
        self._abandoned = before, sent
        if task is not None and sent is None and not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError), _on(task):  # another rank may have died by now
                self._start_lengths(task, [[0] * count for count in task.sends], FAILED).read()
        for failed in (None if before is None else before.task, task):
            if failed is not None:
                failed.fail(error)


@contextlib.contextmanager
def _on(task: Task) -> Iterator[None]:
    if task.stream is None:
        yield
    else:
        with torch.cuda.device(task.device), torch.cuda.stream(task.stream):
            yield


class Channel:
    """Both stages. Making one is a collective operation of all ranks of `group`.

    Attributes
    ----------
    group : torch.distributed.ProcessGroup
        The group that it is for. It has two of its own, of the same ranks, backend and timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.adding = Stage(_twin_of(group, "adds up"), "adds up")
        self.handing = Stage(_twin_of(group, "hands out"), "hands out")
        self._global_ranks = dist.get_process_group_ranks(group)
        weakref.finalize(self, _close, self.adding, self.handing)  # also when the interpreter ends

    def global_rank(self, rank: int) -> int:
        """Of a rank of the group."""
        return self._global_ranks[rank]

    def rank_of(self, global_rank: int) -> int:
        """In the group."""
        if global_rank not in self._global_ranks:
            raise ValueError(f"expected a rank of the group, {self._global_ranks}, got {global_rank}")
        return self._global_ranks.index(global_rank)


def _close(*stages: Stage) -> None:
    for stage in stages:
        stage.close()


def _twin_of(group: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """Another group of the same ranks in the same order.

    ``new_group`` names groups after how many a rank has, which differs between ranks that belong to several: they would
    wait for each other for ever. This name is the same on all.
    """
    ranks = dist.get_process_group_ranks(group)
    default = c10d._get_default_group()
    if default.bound_device_id is not None and len(ranks) < dist.get_world_size(default):
        # torch would split the default group's communicator, which all its ranks have to take part in.
        raise NotImplementedError(
            "expected init_process_group without device_id where part of the ranks communicate coded: pass device_id=None"
        )
    _, store = c10d._world.pg_map[default]
    kind = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    timeout = group._get_backend(torch.device(kind)).options._timeout  # torch has no public way to ask
    twin, _ = c10d._new_process_group_helper(
        len(ranks), dist.get_rank(group), ranks, dist.Backend(dist.get_backend(group)), store,
        c10d.GroupName(f"{group.group_name} weight_compression {name}"), timeout=timeout,
        device_id=default.bound_device_id, group_desc=f"weight_compression, {name}",
    )  # fmt: skip
    c10d._world.pg_group_ranks[twin] = {rank: i for i, rank in enumerate(ranks)}
    return twin


# torch keeps its groups in tables like this one; a group's channel ends with it.
_channels: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel] = weakref.WeakKeyDictionary()


def channel_of(group: dist.ProcessGroup | None) -> Channel:
    """The channel of a process group, None for the default one. The first call is a collective operation."""
    if group is None:
        group = dist.group.WORLD
    if group is None:
        raise ValueError("expected torch.distributed to be initialised: call torch.distributed.init_process_group")
    channel = _channels.get(group)
    if channel is None:
        channel = _channels[group] = Channel(group)
    return channel
