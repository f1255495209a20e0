"""Model files: exact round trips, outside readers, hostile bytes, and saves that fail half-way."""

from __future__ import annotations

import enum
import json
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from platonic.persistence import ModelFormatError, load_model, save_model

DTYPES = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES += ["float16", "float32", "float64"]


def same(a, b):
    """Equal in type, value and order, NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (float, np.floating)):
        return (np.isnan(a) and np.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def header_of(path):
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["platonic"])


def write_raw(path, metadata, tensors=None):
    """A valid safetensors file with a "platonic" entry of our choosing."""
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    path.write_bytes(safetensors.torch.save(tensors or {"w": torch.ones(2)}, metadata={"platonic": text}))


def valid(**changes):
    return {"format": "platonic-model", "version": 1, "tensors": [], "metadata": {"dict": []}, **changes}


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.sampled_from(DTYPES).flatmap(lambda d: hnp.from_dtype(np.dtype(d))),
    st.text().map(np.str_),
)  # fmt: skip
keys = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.tuples(st.integers(), st.text()))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=12,
)
any_array = st.sampled_from(DTYPES).flatmap(
    lambda d: hnp.arrays(np.dtype(d), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)


@given(metadata=st.dictionaries(st.text(), values, max_size=4))
def test_metadata_round_trips_with_types(metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    save_model(path, {}, metadata)
    arrays, back = load_model(path)
    assert arrays == {}
    assert same(metadata, back)


@given(
    arrays=st.dictionaries(st.text().filter(lambda s: s != "__metadata__"), any_array, max_size=3),
    torch_too=st.booleans(),
)
def test_arrays_round_trip_bit_for_bit(arrays, torch_too, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.safetensors"
    given_ = {k: torch.from_numpy(a) if torch_too else a for k, a in arrays.items()}
    save_model(path, given_, {})
    back, _ = load_model(path)
    assert back.keys() == given_.keys()
    for key, array in back.items():
        assert isinstance(array, torch.Tensor if torch_too else np.ndarray)
        plain = array.numpy() if torch_too else array
        assert plain.dtype == arrays[key].dtype
        assert plain.shape == arrays[key].shape
        assert plain.tobytes() == arrays[key].tobytes()


@pytest.mark.parametrize("text", ["", "a\0", "\0", "é", "\ud800"])
def test_strings_keep_what_numpy_drops(text, tmp_path):
    save_model(tmp_path / "m", {}, {"plain": text, "numpy": np.str_(text)})
    back = load_model(tmp_path / "m")[1]
    assert same(back, {"plain": text, "numpy": np.str_(text)})
    assert len(back["numpy"]) == len(text)


def test_safetensors_reads_the_file(tmp_path):
    path = tmp_path / "m.safetensors"
    weights = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    save_model(path, {"w": weights, "b": np.float32([1, 2])}, {"alpha": 0.5})
    outside = safetensors.torch.load_file(path)
    assert torch.equal(outside["w"], weights)
    assert outside["b"].tolist() == [1.0, 2.0]


def test_header_is_what_the_module_documents(tmp_path):
    path = tmp_path / "m.safetensors"
    metadata = {"a": (1, None), "b": float("-inf"), "c": np.float32(0.5), "d": [True, "é"], "e": {1: 2.0}}
    save_model(path, {"w": torch.ones(1), "v": np.ones(1)}, metadata)
    header = header_of(path)
    assert re.fullmatch("[0-9a-f]{64}", header.pop("sha256"))
    assert header == {
        "format": "platonic-model",
        "version": 1,
        "tensors": ["w"],
        "metadata": {
            "dict": [
                ["a", {"tuple": [1, None]}],
                ["b", {"float": "-inf"}],
                ["c", {"numpy": ["float32", 0.5]}],
                ["d", [True, "é"]],
                ["e", {"dict": [[1, 2.0]]}],
            ]
        },
    }


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12.0).reshape(3, 4).T,
        np.arange(12.0)[::-2],
        np.arange(3, dtype=">f8"),
        np.broadcast_to(np.float32(3), (2, 2)),
        torch.arange(12.0).reshape(3, 4).T,
        torch.ones(1).expand(5),
        torch.ones(2, requires_grad=True),
        np.float64([]),
    ],
    ids=["transposed", "reversed", "big-endian", "stride-0", "tensor-T", "expanded", "requires-grad", "empty"],
)
def test_any_layout_is_saved_by_value(array, tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(path, {"w": array}, {})
    back = load_model(path)[0]["w"]
    expected = array.detach().numpy() if isinstance(array, torch.Tensor) else array
    np.testing.assert_array_equal(np.asarray(back), expected)
    assert np.asarray(back).flags.writeable


def test_two_names_of_one_tensor_are_saved_twice(tmp_path):
    w = torch.ones(3)
    save_model(tmp_path / "m", {"a": w, "b": w[:2]}, {})
    assert load_model(tmp_path / "m")[0]["b"].tolist() == [1.0, 1.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_come_back_on_the_cpu(tmp_path):
    save_model(tmp_path / "m", {"w": torch.ones(3, device="cuda")}, {})
    assert load_model(tmp_path / "m")[0]["w"].device.type == "cpu"


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [np.tanh, lambda x: x, object(), {1, 2}, b"x", 1j, np.ones(2), torch.ones(2), Colour.RED, np.complex64(1),
     np.datetime64("2020-01-01"), np.longdouble(1)],
)  # fmt: skip
def test_what_cannot_be_saved_is_named(value, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(TypeError, match=r"metadata\['params'\]\['activation'\]\[1\] is of type"):
        save_model(path, {}, {"params": {"activation": [1, value]}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "array", [np.array(["a"]), np.array([None]), np.array([1j]), np.ones(1, np.longdouble), [1.0],
              torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.complex64)]
)  # fmt: skip
def test_an_array_that_cannot_be_saved_is_named(array, tmp_path):
    with pytest.raises(TypeError, match="array 'classes'"):
        save_model(tmp_path / "m", {"classes": array}, {})
    with pytest.raises(TypeError, match="name of an array"):
        save_model(tmp_path / "m", {"__metadata__": np.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_contains_itself_is_refused(tmp_path):
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="contains itself"):
        save_model(tmp_path / "m", {}, {"loop": loop})


def test_every_truncation_is_a_named_error(tmp_path):
    whole = tmp_path / "whole"
    save_model(whole, {"w": torch.ones(3, 2), "b": np.arange(3)}, {"a": [1, 2, (3, None)]})
    content = whole.read_bytes()
    cut = tmp_path / "cut"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelFormatError, match="cut"):
            load_model(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(ModelFormatError):
        load_model(cut)


def test_damaged_bytes_load_or_raise_but_never_crash(tmp_path):
    whole = tmp_path / "whole"
    save_model(whole, {"w": torch.ones(3, 2), "b": np.arange(3)}, {"a": [1.5, 2, (3, None)], "n": np.int8(3)})
    content = bytearray(whole.read_bytes())
    refused = 0
    for position in range(len(content)):
        for flip in (0x01, 0x80):
            content[position] ^= flip
            whole.write_bytes(content)
            content[position] ^= flip
            try:
                load_model(whole)
            except ModelFormatError:
                refused += 1
    assert refused > len(content) // 2  # most of the file is header, where a flipped bit shows


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4", b"\x80\x04K\x01.", struct.pack("<Q", 2**63) + b"{}", bytes(range(64))]
)
def test_foreign_files_are_refused(content, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match="not a readable safetensors file"):
        load_model(path)


def test_a_safetensors_file_of_someone_else_is_refused(tmp_path):
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "m", metadata={"format": "pt"})
    with pytest.raises(ModelFormatError, match="not one that platonic's save wrote"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"format": NaN}', "not JSON"),
        ([1], "does not say format"),
        (valid(format="other"), "does not say format"),
        (valid(version=2), "upgrade platonic-dl"),
        (valid(version=0), "format version"),
        (valid(version=True), "format version"),
        (valid(version="1"), "format version"),
        (valid(tensors="w"), "list of names"),
        (valid(tensors=[1]), "list of names"),
        (valid(tensors=["missing"]), "'missing'"),
        ({"format": "platonic-model", "version": 1, "tensors": []}, "lacks 'metadata'"),
        (valid(metadata=[1]), "expected a dictionary"),
        (valid(metadata={"dict": [[1, 2]]}), "expected a dictionary"),
        (valid(metadata={"dict": [["a"]]}), "expected pairs"),
        (valid(metadata={"dict": [[[], 1]]}), "cannot be a key"),
        (valid(metadata={"dict": 1}), "does not know"),
        (valid(metadata={"dict": [["a", {"float": "1"}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {"float": [1]}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {"tuple": [], "dict": []}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {"numpy": ["object", 1]}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {"numpy": [["x"], 1]}]]}), "does not know"),
        (valid(metadata={"dict": [["a", {"numpy": ["int8", 300]}]]}), "is no int8"),
        (valid(metadata={"dict": [["a", {"numpy": ["int8", "3"]}]]}), "is no int8"),
        (valid(metadata={"dict": [["a", json.loads("[" * 60 + "]" * 60)]]}), "nested deeper"),
    ],
)
def test_hostile_headers_are_refused(metadata, message, tmp_path):
    path = tmp_path / "m"
    write_raw(path, metadata)
    with pytest.raises(ModelFormatError, match=message):
        load_model(path)


def test_a_dtype_that_save_never_writes_is_refused(tmp_path):
    write_raw(tmp_path / "m", valid(), {"w": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(ModelFormatError, match=r"bfloat16|BF16"):
        load_model(tmp_path / "m")


def test_every_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "m"
    save_model(path, {"w": torch.arange(5.0), "v": np.ones((2, 3), np.int8)}, {"a": 1.5, "b": ["x", None]})
    good = path.read_bytes()
    for i in range(8, len(good)):
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        try:
            arrays, metadata = load_model(path)
        except ModelFormatError:
            continue
        assert torch.equal(arrays["w"], torch.arange(5.0)) and (arrays["v"] == 1).all()  # white space, say
        assert metadata == {"a": 1.5, "b": ["x", None]}


def test_missing_files_and_folders_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError):
        save_model(tmp_path / "no" / "m", {}, {})


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(fails, tmp_path, monkeypatch):
    path = tmp_path / "m"
    save_model(path, {}, {"a": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, fail)
        with pytest.raises(OSError, match="disk full"):
            save_model(path, {}, {"a": 2})
    assert load_model(path)[1] == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_and_its_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.path.isdir(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("rename"), replace(*names)))
    save_model(tmp_path / "m", {}, {})
    assert events == [False, "rename", True]


def test_a_link_is_followed_and_the_mode_is_that_of_a_new_file(tmp_path):
    real, link, plain = tmp_path / "real", tmp_path / "link", tmp_path / "plain"
    save_model(real, {}, {"a": 1})
    link.symlink_to(real)
    save_model(link, {}, {"a": 2})
    assert link.is_symlink()
    assert load_model(real)[1] == {"a": 2}
    plain.touch()
    assert Path(real).stat().st_mode == plain.stat().st_mode
