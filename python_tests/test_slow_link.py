"""benchmarks/slow_link.py: processes joined by shaped links, of which nothing is left whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import link_ranks

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from slow_link import RankError, SlowLink, _in_namespace  # noqa: E402

RANKS = 2


@pytest.fixture
def link():
    with SlowLink("1gbit", RANKS) as net:
        if net.link == "none":
            pytest.skip(net.note)
        namespaces = [os.fstat(descriptor).st_ino for descriptor in net.namespaces]
        assert len(set(namespaces)) == RANKS
        before = _interfaces()
        yield net
        assert _interfaces() == before
    assert not _holders(namespaces)


def _interfaces():
    return sorted(os.listdir("/sys/class/net"))


def _holders(namespaces):
    """Files under /proc that keep one of the network namespaces, of these inodes, alive."""
    names = {f"net:[{inode}]" for inode in namespaces}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        for path in [process / "ns/net", *_list(process / "fd")]:
            try:
                target = os.readlink(path)
            except OSError:  # it has ended
                continue
            if target in names:
                found.append(str(path))
    return found


def _list(folder):
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def test_ranks_meet_over_tcp_and_their_interfaces_count(link):
    numel = 1 << 18
    for sent, value in link.run(link_ranks.sum_ranks, numel):
        assert value == 3.0
        # With two ranks each sends the tensor once: its bytes, under 7 % of headers and acknowledgements (66 of 1,514
        # bytes a packet each way), and the group's small messages.
        assert 4 * numel <= sent <= 1.07 * 4 * numel + 4096


def test_the_link_is_shaped_on_both_ends(link):
    def shown():
        return subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True).stdout

    for namespace in link.namespaces:
        assert "tbf" in _in_namespace(namespace, shown)
    assert _in_namespace(link.switch, shown).count("rate 1Gbit") == RANKS


def test_a_rank_that_raises_ends_the_others_and_is_named(link):
    with pytest.raises(RankError, match=r"rank 1:\n(?s:.)*rank 1 gives up"):
        link.run(link_ranks.raise_on_one)
    assert [value for _, value in link.run(link_ranks.sum_ranks, 4)] == [3.0, 3.0]  # the link is still good


def test_a_rank_that_dies_ends_the_others_and_is_named(link):
    with pytest.raises(RankError, match="rank 1 died, exit code -9"):
        link.run(link_ranks.die_on_one)


def test_ranks_that_stall_are_killed_in_time(link):
    with pytest.raises(RankError, match="rank 0, 1 did not end within 2 s"):
        link.run(link_ranks.stall, timeout=2)


def test_nothing_is_left_of_a_killed_parent(link):
    program = (
        "import os, sys; import slow_link, link_ranks\n"
        "if __name__ == '__main__':\n"
        "    with slow_link.SlowLink('1gbit', 2) as net:\n"
        "        print(*(os.fstat(n).st_ino for n in net.namespaces), flush=True)\n"
        "        net.run(link_ranks.stall)\n"
    )
    path = os.pathsep.join([str(BENCHMARKS), str(Path(__file__).parent)])
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}) as parent:
        try:
            namespaces = parent.stdout.readline().split()
            _wait_until(lambda: len([h for h in _holders(namespaces) if h.endswith("ns/net")]) == RANKS)
        finally:
            parent.send_signal(signal.SIGKILL)
    _wait_until(lambda: not _holders(namespaces))


def _wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_iproute2_the_ranks_run_on_loopback_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with SlowLink("1gbit", RANKS) as net:
        assert (net.link, net.namespaces) == ("none", [])
        assert "ip and tc of iproute2 not found" in net.note
        assert net.note in capsys.readouterr().err
        assert [value for _, value in net.run(link_ranks.sum_ranks, 4)] == [3.0, 3.0]


def test_links_and_ranks_are_checked():
    with pytest.raises(ValueError, match="100mbit, 1gbit, 10gbit, none"):
        SlowLink("56k", 2)
    with pytest.raises(ValueError, match="at least 1"):
        SlowLink("none", 0)
