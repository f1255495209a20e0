"""Builds the extension platonic_core._C with ninja.

setup.py writes a ninja file that compiles every .cpp under csrc/ with the C++ compiler, every *_simd.cpp once per
instruction set, and, when nvcc is found, every .cu for the CUDA architectures below. No torch is needed.

Environment variables:
  PLATONIC_CUDA        0: never build the CUDA kernels; 1: fail if they cannot be built; unset: build them if nvcc is found
  PLATONIC_CUDA_ARCHS  e.g. "80;90": compute capabilities to compile for (default: 80, 90 and 100, those that nvcc knows)
  PLATONIC_WERROR      1: warnings are errors (what CI uses)
  CXX, NVCC            the compilers (default: c++ or g++, and nvcc on PATH or under CUDA_HOME)
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Rooms whose results are specified operation by operation: products and sums must not be contracted to one rounding.
STRICT_ROOMS = ("weight_compression",)
DEFAULT_CUDA_ARCHS = (80, 90, 100)
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512",
}


def find_cxx() -> str:
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise SystemExit("platonic-dl needs a C++17 compiler: install g++ (Debian: apt-get install g++) or set CXX.")


def find_nvcc() -> str | None:
    """The nvcc to use, or None for a build without CUDA; exits if PLATONIC_CUDA=1 and there is none."""
    choice = os.environ.get("PLATONIC_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"PLATONIC_CUDA must be 0, 1 or unset, got {choice!r}.")
    if choice == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for nvcc in (os.environ.get("NVCC"), shutil.which("nvcc"), home and f"{home}/bin/nvcc", "/usr/local/cuda/bin/nvcc"):
        if nvcc and Path(nvcc).exists():
            return nvcc
    if choice == "1":
        raise SystemExit(
            "PLATONIC_CUDA=1, but nvcc was not found. Put it on PATH, set NVCC or CUDA_HOME, "
            "or unset PLATONIC_CUDA to build for the CPU alone."
        )
    return None


def run_text(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Cuda:
    """What nvcc offers: its version, its toolkit's folders, the architectures to compile for."""

    def __init__(self, nvcc: str):
        self.nvcc = nvcc
        self.version = run_text(nvcc, "--version").split("release ")[1].split(",")[0]
        known = {int(line.split("_")[1]) for line in run_text(nvcc, "--list-gpu-arch").split()}
        wanted = os.environ.get("PLATONIC_CUDA_ARCHS")
        if wanted:
            self.archs = sorted(int(a) for a in wanted.replace(",", ";").split(";") if a.strip())
            if unknown := [a for a in self.archs if a not in known]:
                raise SystemExit(f"PLATONIC_CUDA_ARCHS: this nvcc knows {sorted(known)}, not {unknown}.")
        else:
            self.archs = [a for a in DEFAULT_CUDA_ARCHS if a in known]
        # --dryrun prints the toolkit's own layout (TOP=..., LIBRARIES="-L..."), wherever nvcc was installed.
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        lines = dict(line[3:].split("=", 1) for line in dry.splitlines() if line.startswith("#$ ") and "=" in line)
        self.library_flags = lines.get("LIBRARIES", "").replace('"', "").strip()

    def gencode(self) -> str:
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        newest = self.archs[-1]
        return " ".join([*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"])


class NinjaBuild(build_ext):
    """build_ext whose compiling is done by ninja: parallel, and incremental between runs."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        cuda = Cuda(nvcc) if nvcc else None
        # One folder for every kind of build (pip makes a new build_temp each time), so that only what changed is compiled.
        work = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{'cuda' if cuda else 'cpu'}"
        work.mkdir(parents=True, exist_ok=True)
        text = ninja_file(target, work, find_cxx(), cuda, self.distribution.get_version())
        file = work / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        what = f"CUDA {cuda.version} for sm_{', sm_'.join(map(str, cuda.archs))}" if cuda else "CPU only (no CUDA)"
        print(f"platonic-dl: building {ext.name} with {find_cxx()}: {what}", flush=True)
        if subprocess.run([*ninja_command(), "-f", str(file)], cwd=work).returncode != 0:
            raise SystemExit("platonic-dl: the native build failed; the compiler's messages are above.")


def ninja_command() -> list[str]:
    if on_path := shutil.which("ninja"):
        return [on_path]
    return [sys.executable, "-m", "ninja"]


def ninja_file(target: Path, work: Path, cxx: str, cuda: Cuda | None, version: str) -> str:
    import sysconfig

    import pybind11

    includes = f"-I{CSRC} -I{pybind11.get_include()} -I{sysconfig.get_paths()['include']}"
    warnings = "-Wall -Wextra" + (" -Werror" if os.environ.get("PLATONIC_WERROR") == "1" else "")
    defines = f"-DPLATONIC_VERSION={version}"
    if cuda:
        archs = ",".join(map(str, cuda.archs))
        defines += f" -DPLATONIC_CUDA -DPLATONIC_CUDA_VERSION={cuda.version} -DPLATONIC_CUDA_ARCHS={archs}"
    else:
        defines += " -DPLATONIC_CUDA_VERSION= -DPLATONIC_CUDA_ARCHS="
    host = f"-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -pthread {warnings}"
    mac = sys.platform == "darwin"
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} {host} {defines} {includes} $isa $contract -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $out",
        "rule link",
        f"  command = {cxx} {'-bundle -undefined dynamic_lookup' if mac else '-shared'} -pthread $in $libs -o $out",
        "  description = link $out",
    ]
    if cuda:
        werror = " -Werror all-warnings" if os.environ.get("PLATONIC_WERROR") == "1" else ""
        lines += [
            "rule nvcc",
            f"  command = {cuda.nvcc} -O3 -std=c++17 {cuda.gencode()}{werror} -Xcompiler "
            f"-fPIC,-fvisibility=hidden,-Wall -DPLATONIC_CUDA -I{CSRC} $contract -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $out",
        ]
    objects = []

    def add(rule: str, source: Path, suffix: str = "", isa: str = "") -> None:
        out = work / (str(source.relative_to(CSRC)).replace(os.sep, "_") + suffix + ".o")
        objects.append(out)
        strict = source.relative_to(CSRC).parts[0] in STRICT_ROOMS
        contract = ("-ffp-contract=off" if rule == "cxx" else "-fmad=false") if strict else ""
        lines.extend([f"build {out}: {rule} {source}", f"  isa = {isa}", f"  contract = {contract}"])

    x86 = platform.machine().lower() in ("x86_64", "amd64")
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.stem.endswith("_simd"):
            for isa in ISA_FLAGS if x86 else ("scalar",):
                add("cxx", source, f".{isa}", isa=f"{ISA_FLAGS[isa]} -DPLATONIC_ISA={isa}")
        else:
            add("cxx", source)
    if cuda:
        for source in sorted(CSRC.rglob("*.cu")):
            add("nvcc", source)
    libs = f"{cuda.library_flags} -lcudart_static -lrt -ldl" if cuda else ""
    lines += [f"build {target}: link {' '.join(map(str, objects))}", f"  libs = {libs}", f"default {target}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    setup(ext_modules=[Extension("platonic_core._C", [])], cmdclass={"build_ext": NinjaBuild})
