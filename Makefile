# Every command sets up what it needs in .venv. PYTHON=python3.12 make test uses another interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt
NATIVE := $(shell find csrc -type f) setup.py pyproject.toml
PYTHON_SOURCES := platonic_core platonic weight_compression gradamp layerwise python_tests benchmarks examples setup.py

.PHONY: demo test bench gpu-check fuzz lint format clean

demo: $(VENV)/.plot
	$(BIN)/python examples/digits.py --plot demo.png
	$(BIN)/python examples/layerwise_digits.py
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/compressed_ddp.py --sync fp32 coded averaging --epochs 5

test: $(VENV)/.test
	$(BIN)/python -m pytest

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.lint $(VENV)/.test
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# On a machine with torch, nvcc and a GPU, but possibly without a package index: uses the interpreter's own packages.
gpu-check:
	PLATONIC_CUDA=1 PLATONIC_CUDA_ARCHS="$${PLATONIC_CUDA_ARCHS-$$($(PYTHON) -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')}" \
	  $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -q -k cuda python_tests
	$(PYTHON) -m benchmarks --device cuda

# The decoder of weight_compression under sanitizers (x86-64; CXX=clang++ works too).
FUZZ_FLAGS := -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=off -pthread -Icsrc
FUZZ_AVX2 := -mavx2 -mfma
FUZZ_AVX512 := -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512
CXX ?= c++
fuzz:
	mkdir -p build/fuzz
	for file in csrc/weight_compression/*_simd.cpp; do \
	  name=build/fuzz/$$(basename $$file .cpp); \
	  $(CXX) $(FUZZ_FLAGS) -DPLATONIC_ISA=scalar -c $$file -o $$name.scalar.o && \
	  $(CXX) $(FUZZ_FLAGS) $(FUZZ_AVX2) -DPLATONIC_ISA=avx2 -c $$file -o $$name.avx2.o && \
	  $(CXX) $(FUZZ_FLAGS) $(FUZZ_AVX512) -DPLATONIC_ISA=avx512 -c $$file -o $$name.avx512.o || exit 1; \
	done
	$(CXX) $(FUZZ_FLAGS) benchmarks/fuzz_decoder.cpp \
	  $(addprefix csrc/weight_compression/,measure.cpp encode.cpp decode.cpp payload.cpp code_lengths.cpp huffman_tables.cpp) \
	  csrc/common/cpu.cpp csrc/common/parallel.cpp build/fuzz/*.o -o build/fuzz/decoder
	build/fuzz/decoder

clean:
	rm -rf build dist *.egg-info $(VENV) platonic_core/*.so

# The build environment is the virtual environment itself, so that ninja rebuilds only what changed. The package is
# installed in editable form: Python files are used from here, and the extension is compiled into platonic_core/.
$(VENV)/.base: requirements/constraints.txt requirements/build.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -r requirements/build.txt
	touch $@

$(VENV)/.built: $(VENV)/.base $(NATIVE)
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.plot: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[plot]'
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[test,bench]'
	touch $@

$(VENV)/.lint: $(VENV)/.base requirements/lint.txt
	$(PIP) -r requirements/lint.txt
	touch $@
