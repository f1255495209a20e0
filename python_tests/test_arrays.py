"""Arrays of every library: what comes in, whose memory it is, and where results go."""

from __future__ import annotations

import re

import array_api_strict
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from platonic_core.arrays import library_of, to_torch

DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "float32", "float64", "complex64", "complex128"]


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5),
)
def test_round_trip_of_any_numpy_view(data, dtype, shape):
    """Any dtype, byte order, shape and stride comes in with its values and goes back with its dtype."""
    order = data.draw(st.sampled_from("<>"))
    base = data.draw(
        hnp.arrays(
            np.dtype(dtype).newbyteorder(order), shape, elements={"allow_nan": False} if dtype[0] in "fc" else None
        )
    )
    view = base[data.draw(hnp.basic_indices(base.shape, allow_newaxis=True))]
    before = base.copy()
    tensor, origin = to_torch(view)
    assert tuple(tensor.shape) == np.shape(view)
    back = origin.back(tensor)
    assert back.dtype == np.dtype(dtype)  # native byte order
    np.testing.assert_array_equal(back, view)
    np.testing.assert_array_equal(base, before)


def test_plain_and_strided_memory_is_shared():
    X = np.arange(24.0).reshape(4, 6)
    for view in (X, X.T, X[::2, 1::3], X[:0], X[1]):
        tensor, _ = to_torch(view)
        assert np.shares_memory(tensor.numpy(), view) or view.size == 0
        assert tensor.stride() == tuple(s // 8 for s in view.strides)


@pytest.mark.parametrize(
    "make",
    [
        lambda X: X[::-1],
        lambda X: X[:, ::-2],
        lambda X: X.astype(">f8"),
        lambda X: np.broadcast_to(X[0], X.shape),
        lambda X: np.array([(1, v) for v in X.flat], dtype=[("a", "u1"), ("b", "f8")])["b"],
    ],
    ids=["reversed", "negative step", "foreign byte order", "read-only broadcast", "field at an odd offset"],
)
def test_what_torch_cannot_describe_is_copied(make):
    X = make(np.arange(24.0).reshape(4, 6))
    tensor, _ = to_torch(X)
    np.testing.assert_array_equal(tensor.numpy(), X)
    assert not np.shares_memory(tensor.numpy(), X)


def test_read_only_memory_is_never_written():
    X = np.arange(6.0)
    X.flags.writeable = False
    tensor, _ = to_torch(X)
    tensor += 1
    np.testing.assert_array_equal(X, np.arange(6.0))


@pytest.mark.parametrize("order", ["=", "S"], ids=["native", "swapped"])
def test_long_double_becomes_float64(order):
    X = np.array([1, 1e-5, 3], dtype=np.dtype(np.longdouble).newbyteorder(order))
    tensor, _ = to_torch(X)
    assert tensor.dtype == torch.float64
    np.testing.assert_array_equal(tensor.numpy(), X.astype(np.float64))


def test_lists_and_numbers_are_numpy():
    tensor, origin = to_torch([[1, 2], [3, 4]])
    assert tensor.dtype == torch.int64
    assert isinstance(origin.back(tensor), np.ndarray)
    assert to_torch(3.5)[0].shape == ()


@pytest.mark.parametrize(
    "array",
    [np.array(["a"]), np.array([object()]), np.array(["2020-01-01"], "M8[D]")],
    ids=["str", "object", "datetime"],
)
def test_dtypes_without_a_tensor(array):
    with pytest.raises(TypeError, match=re.escape(f"expected a numeric array, got dtype {array.dtype}")):
        to_torch(array)


def test_torch_shares_memory_and_leaves_the_graph():
    X = torch.arange(6.0).reshape(2, 3).T.requires_grad_()
    tensor, origin = to_torch(X)
    assert tensor.data_ptr() == X.data_ptr()
    assert tensor.stride() == X.stride()
    assert not tensor.requires_grad
    assert origin.back(tensor) is not None
    assert isinstance(origin.back(tensor * 2), torch.Tensor)


@pytest.mark.parametrize("device", array_api_strict.__array_namespace_info__().devices(), ids=str)
def test_array_api_strict_comes_back_to_its_device(device):
    X = array_api_strict.asarray([[1.0, 2.0], [3.0, 4.0]], device=device)
    assert library_of(X) == "array_api_strict"
    tensor, origin = to_torch(X)
    assert tensor.tolist() == [[1, 2], [3, 4]]
    for back in (origin.back(tensor.T), origin.asarray(np.array([1, 2], dtype=np.int32))):
        assert isinstance(back, type(X))
        assert back.device == device


def test_strings_stay_in_numpy():
    _, origin = to_torch(torch.ones(2))
    labels = np.array(["a", "b"])
    assert origin.asarray(labels) is labels
    assert isinstance(origin.asarray(np.array([1, 2])), torch.Tensor)


def test_results_share_memory_with_the_tensor():
    tensor = torch.arange(4.0)
    _, origin = to_torch(np.zeros(1))
    assert np.shares_memory(origin.back(tensor), tensor.numpy())


def test_cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    X = cupy.arange(6.0).reshape(2, 3)
    tensor, origin = to_torch(X)
    assert tensor.device.type == "cuda"
    assert tensor.data_ptr() == X.data.ptr
    assert isinstance(origin.back(tensor), cupy.ndarray)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_stay_there():
    X = torch.ones(2, 3, device="cuda")
    tensor, origin = to_torch(X)
    assert tensor.data_ptr() == X.data_ptr()
    assert origin.back(tensor.cpu()).device == X.device
