"""``python -m platonic_core``: versions, CPU features in use, CUDA build and device, thread count."""

from __future__ import annotations

import platform

from platonic_core import _C, __version__

__all__ = ["describe"]


def describe() -> dict[str, str]:
    """What was built and what this machine offers, as printable pairs."""
    import numpy
    import sklearn
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    else:
        device = "none visible to torch"
    cuda = f"CUDA {_C.cuda_version} for sm_{', sm_'.join(_C.cuda_archs.split(','))}" if _C.has_cuda else "not built"
    return {
        "platonic-dl": __version__,
        "extension": _C.__file__,
        "compiler": _C.compiler,
        "CPU kernels": f"{_C.isa()} ({platform.machine()})",
        "CPU threads": str(torch.get_num_threads()),
        "CUDA kernels": cuda,
        "CUDA device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit-learn": sklearn.__version__,
    }


if __name__ == "__main__":
    for name, value in describe().items():
        print(f"{name:14} {value}")
