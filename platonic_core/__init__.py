"""The native extension of Platonic and what its rooms share: array entry, checks, build information.

``python -m platonic_core`` prints what was built and what the machine has.
"""

from importlib.util import find_spec
from pkgutil import extend_path

# In a source checkout that was installed rather than built in place, the compiled module lies in site-packages while
# Python finds this folder first: look for it there too.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"

if find_spec("platonic_core._C") is None:
    raise ImportError(
        "platonic_core._C, the compiled part of platonic-dl, was not found. Build it with `pip install .` in the "
        "source folder (needs a C++17 compiler)."
    )

from platonic_core import _C as _C

if _C.version != __version__:
    raise ImportError(
        f"platonic_core {__version__} found a compiled module of version {_C.version} ({_C.__file__}). "
        "Reinstall with `pip install --force-reinstall --no-deps .` in the source folder."
    )
