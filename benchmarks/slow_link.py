"""Processes of torch.distributed joined by a link of a given rate: a network namespace for each, real TCP between them.

    with SlowLink("1gbit", ranks=2) as link:
        results = link.run(work, *arguments)  # work(rank: Rank, *arguments) in each process, rank 0's result first

*Network.* A namespace of its own holds a bridge; each rank's namespace holds ``eth0``, one end of a veth pair whose other
end is a port of that bridge. ``tc tbf`` shapes both ends, so that a rank neither sends nor receives faster than the rate.
The queue is the bucket's: it holds :data:`QUEUE` seconds. The bucket, :data:`BURST` seconds of the rate, is what a link
that was idle passes at once, and what makes up for timers that fire late; TSO packets larger than it are cut by tbf.
No packet, name or setting touches the host's network.

*Teardown.* Namespaces have no names: this process's file descriptors and the ranks hold them, so they vanish with both,
whatever ends them, and runs beside each other do not meet. A rank is killed when another fails and, by the kernel, when
this process dies.

Namespaces need root and iproute2. Without them the ranks share the host's loopback, unshaped, and `SlowLink.note`, which is
also printed, says so. ``none`` is loopback on purpose: with root in a namespace of its own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from typing import Any

RATES = {"100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9, "none": None}  # bits per second
BURST = 0.0005  # seconds of the rate that an idle link passes at once
SMALLEST_BURST = 16 << 10  # bytes
QUEUE = 0.05  # seconds of the rate that wait in front of the bucket; what is beyond is dropped
CONGESTION = "cubic"  # Linux's default; the host's choice, if it has another, does not enter the namespaces
SUBNET = "198.18.0"  # of the range that RFC 2544 sets aside for measurements
PORT = 29500
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """Namespaces or shaping cannot be had here; the message says why."""


class RankError(RuntimeError):
    """A rank raised, died or did not end in time; the message names it and holds its traceback."""


@dataclass(frozen=True)
class Rank:
    """What a rank knows of its place.

    Attributes
    ----------
    rank, ranks : int
        This process's number, and how many there are.
    link : str
        Key of :data:`RATES`; ``none`` also where shaping cannot be had.
    interface : str
        The interface that carries the traffic.
    """

    rank: int
    ranks: int
    link: str
    interface: str

    def bytes_sent(self) -> float:
        """Bytes that this rank's interface has sent so far, by its counter: payload, acknowledgements, headers.

        A TSO packet counts its headers once, though the link carries, and tbf charges for, those of each segment. On
        loopback, which all ranks share, the counter over the number of ranks.
        """
        with open("/proc/self/net/dev") as file:
            line = next(line for line in file if line.strip().startswith(f"{self.interface}:"))
        sent = int(line.split(":")[1].split()[8])
        return sent / self.ranks if self.interface == "lo" else sent


class SlowLink:
    """The namespaces of `ranks` processes and the links between them, while the context lasts.

    Parameters
    ----------
    link : {'100mbit', '1gbit', '10gbit', 'none'}
        Rate of every rank's link, each way.
    ranks : int
        Number of processes.

    Attributes
    ----------
    link : str
        The link that is there: ``none`` where it cannot be shaped.
    note : str
        How the ranks are joined.
    namespaces, switch : list of int, int or None
        File descriptors of the ranks' namespaces, empty on the host's loopback, and of the bridge's.
    """

    def __init__(self, link: str, ranks: int):
        if not sys.platform.startswith("linux"):
            raise OSError("network namespaces, and the counters under /proc/net, need Linux")
        if link not in RATES:
            raise ValueError(f"link is one of {', '.join(RATES)}, not {link!r}")
        if ranks < 1:
            raise ValueError(f"ranks is at least 1, not {ranks}")
        self.link, self.ranks, self.note = link, ranks, ""
        self.namespaces: list[int] = []
        self.switch: int | None = None
        self._held = ExitStack()

    def __enter__(self) -> SlowLink:
        rate = RATES[self.link]
        try:
            _check_tools(rate is not None)
            self.note = self._join_loopback() if rate is None else self._join_veth(rate)
        except Unavailable as reason:
            self._release()
            self.link, self.note = "none", f"the host's loopback, unshaped: {reason}"
            print(f"no slow link: {self.note}", file=sys.stderr, flush=True)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        self.namespaces, self.switch = [], None
        self._held.close()

    def run(self, work: Callable[..., Any], *arguments: Any, timeout: float = 1800.0) -> list[Any]:
        """``work(Rank, *arguments)`` in a new process a rank, torch.distributed's gloo group made; their results.

        Parameters
        ----------
        work : callable
            A module's function; it, the arguments and the results are pickled.
        timeout : float
            Seconds after which the ranks are killed.

        Raises
        ------
        RankError
            At the first rank that raises or dies, or at the time limit, when the others have been killed.
        """
        interface = "eth0" if self.link != "none" else "lo"
        address = f"{SUBNET}.1" if self.link != "none" else "127.0.0.1"
        port = PORT if self.namespaces else _free_port()
        context = get_context("spawn")
        processes: list[BaseProcess] = []
        pipes: list[connection.Connection] = []
        try:
            for index in range(self.ranks):
                rank = Rank(index, self.ranks, self.link, interface)
                namespace = self.namespaces[index] if self.namespaces else None
                pipe, far_end = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank,
                    args=(far_end, os.getpid(), namespace, rank, address, port, timeout, work, arguments),
                )
                with _environment(TORCH_CPP_LOG_LEVEL="ERROR"):  # c10d warns of addresses without a name
                    process.start()
                far_end.close()  # so that the pipe ends with the process
                processes.append(process)
                pipes.append(pipe)
            return _collect(processes, pipes, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for pipe in pipes:
                pipe.close()

    def _join_loopback(self) -> str:
        namespace = self._add_namespace()
        _in_namespace(namespace, lambda: _configure("ip", "link set lo up"))
        self.namespaces = [namespace] * self.ranks
        return "loopback of a namespace, unshaped"

    def _join_veth(self, rate: float) -> str:
        self.switch = switch = self._add_namespace()
        self.namespaces = [self._add_namespace() for _ in range(self.ranks)]
        burst = max(SMALLEST_BURST, round(rate / 8 * BURST))
        packet = min(64 << 10, burst // 2)
        shape = f"root tbf rate {rate:.0f}bit burst {burst} latency {QUEUE * 1000:g}ms"
        lines = ["link add bridge0 type bridge", "link set bridge0 addrgenmode none up"]
        for index, namespace in enumerate(self.namespaces):
            file = f"/proc/{os.getpid()}/fd/{namespace}"
            lines += [
                f"link add port{index} type veth peer name eth0 netns {file}",
                f"link set port{index} master bridge0 addrgenmode none up",
            ]
        _in_namespace(switch, lambda: _configure("ip", *lines))
        _in_namespace(switch, lambda: _configure("tc", *(f"qdisc add dev port{i} {shape}" for i in range(self.ranks))))
        for index, namespace in enumerate(self.namespaces):
            _in_namespace(namespace, lambda index=index: _set_up_rank(index, shape, packet))
        return f"veth, tbf {self.link}, burst {burst} bytes, queue {QUEUE * 1000:g} ms, TCP {CONGESTION}"

    def _add_namespace(self) -> int:
        """A new network namespace, kept by a file descriptor."""

        def make() -> int:
            if _libc.unshare(CLONE_NEWNET):
                raise Unavailable(f"a network namespace needs root ({os.strerror(ctypes.get_errno())})")
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

        descriptor = _in_thread(make)
        self._held.callback(os.close, descriptor)
        return descriptor


@contextmanager
def _environment(**added: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _in_thread(call: Callable[[], Any]) -> Any:
    """Its result; the thread may change namespace, since that is a thread's own, and ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def _in_namespace(namespace: int, call: Callable[[], Any]) -> Any:
    def inside() -> Any:
        _enter(namespace)
        return call()

    return _in_thread(inside)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _check_tools(shaped: bool) -> None:
    missing = [name for name in ("ip", *(["tc"] if shaped else [])) if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"{' and '.join(missing)} of iproute2 not found")


def _configure(tool: str, *lines: str) -> None:
    """Run iproute2's `tool` on the lines, in the calling thread's namespace."""
    done = subprocess.run([tool, "-batch", "-"], input="\n".join(lines) + "\n", capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{tool}: {' '.join(done.stderr.split())}")


def _set_up_rank(index: int, shape: str, packet: int) -> None:
    _configure(
        "ip",
        "link set lo up",
        f"link set eth0 addrgenmode none gso_max_size {packet} up",
        f"address add {SUBNET}.{index + 1}/24 dev eth0 noprefixroute",
        f"route add {SUBNET}.0/24 dev eth0 congctl {CONGESTION}",
    )
    _configure("tc", f"qdisc add dev eth0 {shape}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_rank(
    pipe: connection.Connection,
    parent: int,
    namespace: int | None,
    rank: Rank,
    address: str,
    port: int,
    timeout: float,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    """In the rank's process: enter the namespace, join the group, work, send (result, None) or (None, traceback)."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    try:
        if namespace is not None:
            descriptor = os.open(f"/proc/{parent}/fd/{namespace}", os.O_RDONLY)
            _enter(descriptor)
            os.close(descriptor)
        import torch.distributed as dist

        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": rank.interface}
        dist.init_process_group("gloo", rank=rank.rank, world_size=rank.ranks, timeout=timedelta(seconds=timeout))
        result = work(rank, *arguments)
        dist.barrier()  # rank 0 holds the store that the others may still need
        dist.destroy_process_group()
        pipe.send((result, None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    pipe.close()


def _collect(processes: list[BaseProcess], pipes: list[connection.Connection], timeout: float) -> list[Any]:
    end = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for index, pipe in enumerate(pipes) if index not in results]
        ready = connection.wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            absent = ", ".join(str(index) for index in range(len(pipes)) if index not in results)
            raise RankError(f"rank {absent} did not end within {timeout:g} s")
        for pipe in ready:
            index = pipes.index(pipe)
            try:
                results[index], trace = pipe.recv()
            except EOFError:
                processes[index].join()
                raise RankError(f"rank {index} died, exit code {processes[index].exitcode}") from None
            if trace is not None:
                raise RankError(f"rank {index}:\n{trace}")
    return [results[index] for index in range(len(pipes))]


def measure_throughput(rank: Rank, seconds: float = 1.0) -> float:
    """Bits of payload per second while every rank sends to its right neighbour and receives from its left one.

    The bytes are those of `seconds` of the nominal rate, or 2^30 of an unshaped link. Call it on all ranks at once.
    """
    import torch.distributed as dist

    rate = RATES[rank.link]
    count = round(rate / 8 * seconds) if rate else 1 << 30
    chunk = bytes(1 << 20)
    host = f"{SUBNET}.{rank.rank + 1}" if rank.interface == "eth0" else "127.0.0.1"
    with socket.create_server((host, 0)) as server:
        addresses: list[Any] = [None] * rank.ranks
        dist.all_gather_object(addresses, server.getsockname()[:2])
        right = socket.create_connection(addresses[(rank.rank + 1) % rank.ranks])
        left, _ = server.accept()
    with right, left:
        dist.barrier()
        start = time.perf_counter()

        def send() -> None:
            for first in range(0, count, len(chunk)):
                right.sendall(chunk[: min(len(chunk), count - first)])

        sender = threading.Thread(target=send)
        sender.start()
        buffer, received = bytearray(1 << 20), 0
        while received < count:
            size = left.recv_into(buffer)
            if not size:
                raise ConnectionError(f"rank {rank.rank}: the left neighbour closed after {received} bytes")
            received += size
        sender.join()
        elapsed = time.perf_counter() - start
    return 8 * count / elapsed
