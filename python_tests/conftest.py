"""Settings of the whole suite: repeatable hypothesis runs, two torch threads, array API dispatch in SciPy."""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"  # SciPy reads it once, when it is imported; scikit-learn's array API checks need it

import numpy as np
import pytest
import sklearn.datasets
import torch
from hypothesis import settings

from cuda_emulation import library as emulation

torch.set_num_threads(2)
pytest.register_assert_rewrite("device_backend")
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def one_thread():
    """For steps so small that threads wait for one another more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def iris() -> tuple[np.ndarray, np.ndarray]:
    """Read-only, so that no test can pass something on to another."""
    X, y = sklearn.datasets.load_iris(return_X_y=True)
    X.flags.writeable = y.flags.writeable = False
    return X, y


@pytest.fixture(scope="session")
def diabetes() -> tuple[np.ndarray, np.ndarray]:
    X, y = sklearn.datasets.load_diabetes(return_X_y=True)
    X.flags.writeable = y.flags.writeable = False
    return X, y


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    """The CUDA sources that run on the CPU; see cuda_emulation/."""
    if reason := emulation.why_not():
        pytest.skip(reason)
    return emulation.build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=["emulated", "cuda"])
def backend(request, monkeypatch):
    """The codec's CUDA kernels: under the emulation, and on a GPU where there is one."""
    from cuda_emulation.codec import EmulatedCodec
    from device_backend import NO_GPU, Backend, gpu_is_here
    from weight_compression import _device_ops

    if request.param == "cuda":
        if not gpu_is_here():
            pytest.skip(NO_GPU)
        return Backend("cuda", None)
    kernels = EmulatedCodec(request.getfixturevalue("emulated_library"))
    monkeypatch.setattr(_device_ops, "kernels", kernels)
    return Backend("cpu", kernels)
