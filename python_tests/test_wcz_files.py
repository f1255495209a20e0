"""Containers: state dicts to files and back, one tensor at a time, ties, damage."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import torch

import weight_compression as wc
from weight_compression import _ops


class Net(torch.nn.Module):
    """Tied weights, integer buffers, a scalar and an empty entry."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(300, 64)
        self.norm = torch.nn.BatchNorm1d(64)
        self.head = torch.nn.Linear(64, 300, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("mask", torch.arange(12).view(3, 4) % 2 == 0)


def test_module_round_trip(tmp_path):
    net, path = Net(), tmp_path / "net.wcz"
    wc.save_file(net, path, metadata={"epoch": "3", "ünï": "cödé"})
    loaded = wc.load_file(path)
    assert list(loaded) == list(net.state_dict())
    for name, tensor in net.state_dict().items():
        assert loaded[name].shape == tensor.shape and loaded[name].dtype == tensor.dtype
        with wc.WczFile(path) as file:
            bound = file.info(name).error_bound
        assert (loaded[name].double() - tensor.double()).abs().sum() <= (bound * 1.001 + 1e-7) * max(1, tensor.numel())
    assert torch.equal(loaded["mask"], net.mask) and int(loaded["norm.num_batches_tracked"]) == 0
    assert loaded["head.weight"] is loaded["embedding.weight"]
    assert path.stat().st_size < 300 * 64 * 4 / 3
    Net().load_state_dict(loaded)
    with wc.WczFile(path) as file:
        assert file.metadata == {"epoch": "3", "ünï": "cödé"}
        assert len(file) == len(loaded) and "scale" in file and list(file) == file.keys()
        assert torch.equal(file["embedding.weight"], loaded["embedding.weight"])
        assert file.info("head.weight").mode == "entropy"


def test_only_and_names(tmp_path):
    path = tmp_path / "net.wcz"
    state = {"a.weight": torch.randn(3000), "a.bias": torch.randn(3000)}
    wc.save_file(state, path, wc.CompressionConfig(floor_bits=6), only=lambda name, _: name.endswith("weight"))
    loaded = wc.load_file(path, names=["a.bias"])
    assert list(loaded) == ["a.bias"] and torch.equal(loaded["a.bias"], state["a.bias"])
    with pytest.raises(KeyError, match=r"'c' is not in .*a\.weight"):
        wc.load_file(path, names=["c"])


def test_reading_one_tensor_does_not_touch_the_others(tmp_path):
    path = tmp_path / "net.wcz"
    wc.save_file({"a": torch.randn(5000), "b": torch.randn(5000)}, path)
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert wc.load_file(path, names=["a"])["a"].shape == (5000,)
    with pytest.raises(wc.BadChecksumError, match=r"^b: block 0"):
        wc.load_file(path)


def test_errors_name_the_tensor(tmp_path):
    path = tmp_path / "net.wcz"
    path.write_bytes(b"old")
    with pytest.raises(wc.NonFiniteError, match=r"^layer\.1: expected finite"):
        wc.save_file({"layer.0": torch.randn(5), "layer.1": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(TypeError, match=r"^x: expected one of"):
        wc.save_file({"x": torch.zeros(3, dtype=torch.float8_e8m0fnu)}, path)
    with pytest.raises(TypeError, match="'step': int"):
        wc.save_file({"step": 3}, path)
    with pytest.raises(TypeError, match="metadata"):
        wc.save_file({}, path, metadata={"a": 1})
    # Nothing was half-written, and nothing is left behind.
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["net.wcz"]


def test_interrupted_saves_leave_the_old_file(tmp_path):
    path = tmp_path / "net.wcz"
    wc.save_file({"a": torch.ones(3)}, path)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wc.save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, path, progress=stop)
    assert torch.equal(wc.load_file(path)["a"], torch.ones(3)) and os.listdir(tmp_path) == ["net.wcz"]


def test_empty_and_permissions(tmp_path):
    path = tmp_path / "empty.wcz"
    wc.save_file({}, path)
    assert wc.load_file(path) == {}
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_payloads_survive_a_closed_file(tmp_path):
    path = tmp_path / "a.wcz"
    wc.save_file({"a": torch.randn(100)}, path)
    file = wc.WczFile(path)
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file["a"]


def sealed(index: object, payloads: bytes = b"") -> bytes:
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    start = struct.pack("<4sIQ", b"PLWZ", 0, len(text)) + text
    return start + struct.pack("<I", _ops.crc32c(np.frombuffer(start, np.uint8))) + payloads


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", wc.TruncatedError),
        (b"PK\x03\x04" + bytes(40), wc.BadMagicError),
        (struct.pack("<4sIQ", b"PLWZ", 5, 0) + bytes(40), wc.UnsupportedVersionError),
        (struct.pack("<4sIQ", b"PLWZ", 0, 1 << 62) + bytes(40), wc.TruncatedError),
        (struct.pack("<4sIQ", b"PLWZ", 0, 4) + bytes(40), wc.BadChecksumError),
        (sealed(b"\xff\xfe"), wc.BadHeaderError),
        (sealed(b"[" * 100_000), wc.BadHeaderError),
        (sealed([]), wc.BadHeaderError),
        (sealed({"tensors": {}}), wc.BadHeaderError),
        (sealed({"tensors": {"a": [0]}, "metadata": {}}), wc.BadHeaderError),
        (sealed({"tensors": {"a": [0, 100]}, "metadata": {}}), wc.TruncatedError),
        (sealed({"tensors": {"a": [0, 2]}, "metadata": {}}, b"abcd"), wc.BadOffsetError),
        (sealed({"tensors": {"a": [2, 4]}, "metadata": {}}, b"abcd"), wc.BadOffsetError),
        (sealed({"tensors": {"a": [0, 3], "b": [2, 4]}, "metadata": {}}, b"abcd"), wc.BadOffsetError),
        (sealed({"tensors": {"a": [0, -5]}, "metadata": {}}, b"abcd"), wc.BadOffsetError),
        (sealed({"tensors": {"a": [0, 4]}, "metadata": {}}, b"abcd"), wc.BadMagicError),
    ],
)
def test_damaged_containers(tmp_path, content, error):
    path = tmp_path / "damaged.wcz"
    path.write_bytes(content)
    with pytest.raises(error):
        wc.load_file(path)


def test_every_byte_of_a_container_is_covered(tmp_path):
    path = tmp_path / "a.wcz"
    wc.save_file({"a": torch.randn(400), "b": torch.arange(9)}, path, metadata={"k": "v"})
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        mutated = bytearray(data)
        mutated[place] ^= 16
        path.write_bytes(mutated)
        with pytest.raises(wc.PayloadError):
            wc.load_file(path)


def test_only_what_is_the_same_is_tied(tmp_path):
    path = tmp_path / "ties.wcz"
    z, w = torch.randn(50, dtype=torch.complex64), torch.randn(3000)
    wc.save_file({"a": z, "b": z.conj(), "c": torch._neg_view(z)}, path)
    loaded = wc.load_file(path)
    assert torch.equal(loaded["b"], z.conj()) and torch.equal(loaded["c"], -z)
    # Tied, but to be kept exactly under one of its names.
    wc.save_file({"a": w, "b": w}, path, only=lambda name, _: name == "a")
    loaded = wc.load_file(path)
    assert torch.equal(loaded["b"], w) and not torch.equal(loaded["a"], w)


def test_tensors_made_on_access_are_not_tied(tmp_path):
    class Lazy(dict):
        def items(self):
            return ((str(i), torch.full((5000,), float(i))) for i in range(8))

    wc.save_file(Lazy(), tmp_path / "lazy.wcz")
    loaded = wc.load_file(tmp_path / "lazy.wcz")
    assert [float(loaded[str(i)][0]) for i in range(8)] == list(range(8))


def test_tensors_without_values_are_named(tmp_path):
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.zeros([1] * 65)):
        with pytest.raises(TypeError, match=r"^odd: expected"):
            wc.save_file({"odd": tensor}, tmp_path / "odd.wcz")
