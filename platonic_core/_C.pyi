from types import ModuleType
from typing import Any

version: str
has_cuda: bool
cuda_version: str
cuda_archs: str
compiler: str
platonic: Any
weight_compression: Any
gradamp: Any

def isa() -> str: ...
def limit_isa(name: str) -> None: ...
def __getattr__(name: str) -> ModuleType: ...
