PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo-output
BIN = $(VENV)/bin
BUILD_INPUTS = setup.py build_support.py pyproject.toml $(shell find csrc -type f)
CXX_SOURCES = $(shell find csrc tests/native benchmarks -name '*.h' -o -name '*.cpp' \
	-o -name '*.cu' -o -name '*.cuh')

.PHONY: demo demo-plan test test-all mutants lint lint-workflow format docs sanitize sweep-aarch64 macos-build cuda-build bench bench-gelu build-cost report clean

# A fresh machine needs Python 3.10+, its headers and a C++ compiler; everything else is installed here. Five epochs are
# enough for the picture, which does not show torch.compile.
demo: demo-plan $(VENV)/.built
	mkdir -p $(OUTPUT)
	$(BIN)/fastlane info
	$(BIN)/fastlane gradients --plot $(OUTPUT)/gradients.png
	$(BIN)/fastlane train --epochs 5 --no-compile --plot $(OUTPUT)/training.png
	@echo "Pictures: $(OUTPUT)/gradients.png and $(OUTPUT)/training.png"

demo-plan:
	@echo "The demo installs and compiles what is missing (minutes, the first time), lists versions, shows gradients and"
	@echo "trains on digits (less than two minutes). Pictures go to $(OUTPUT)/gradients.png and $(OUTPUT)/training.png."

# Two processes share tests and cores: most calls are too small for threads, and tests of threads set their number.
WORKERS = 2
PYTEST = -m pytest --numprocesses $(WORKERS) --dist worksteal
test test-all mutants cuda-build: export OMP_NUM_THREADS ?= $(shell expr \( $$(nproc) + 1 \) / $(WORKERS))

test: lint $(VENV)/.built
	$(BIN)/python $(PYTEST)

# The same with the tests that take minutes each, and the sanitizers; half an hour.
test-all: lint $(VENV)/.built
	$(BIN)/python $(PYTEST) --thorough
	$(MAKE) sanitize

# Breaks the kernels in many small ways, each of which the tests must notice; half an hour. FLAGS="--only dW"
# takes some.
mutants: $(VENV)/.built
	$(BIN)/python tests/mutation/run.py $(FLAGS)

# Nothing is built for this: the tests of the include rules read sources alone, so they go without conftest.py.
lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	@$(MAKE) --no-print-directory lint-workflow
	$(BIN)/python -m pytest -o addopts= --noconftest -p no:warnings -q -m "not slow" tests/test_include_rules.py tests/test_layers.py

# actionlint is a program in Go that pip cannot install without a network beyond the package index, so it may be absent.
lint-workflow: $(VENV)/.requirements
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	@if command -v actionlint > /dev/null; then echo actionlint && actionlint; \
	else echo "actionlint is not installed: only the schema of the workflow was checked"; fi

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The site of docs/, the README and the docstrings: build/docs/index.html. A warning, such as a link that leads nowhere, is an error.
docs: $(VENV)/.built
	$(BIN)/python -m sphinx -q -W --keep-going -n -c docs -d build/doctrees . build/docs
	@echo "The site: build/docs/index.html"

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, without torch: g++ is all it needs.
SANITIZE = build/sanitize
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZE_FLAGS = -std=c++17 -O1 -g -ffp-contract=off -pthread -Wall -Wno-psabi -Icsrc $(SANITIZERS)
SANITIZE_OBJECTS = $(patsubst %.cpp,$(SANITIZE)/%.o,$(wildcard csrc/kernels/cpu/*.cpp csrc/kernels/cpu/isa/*.cpp tests/native/cpu/*.cpp))
sanitize:
	@mkdir -p $(SANITIZE)
	@echo 'int main() {}' | $(CXX) $(SANITIZERS) -x c++ - -o $(SANITIZE)/probe || { echo "sanitize: $(CXX) cannot \
	compile or link with $(SANITIZERS); install g++ with libasan and libubsan, or set CXX" >&2; exit 1; }
	@$(MAKE) --no-print-directory -j2 $(SANITIZE)/sweep
	isas=$$($(SANITIZE)/sweep --isas) && test -n "$$isas" && printf '%s\n' $$isas | \
	xargs -P 2 -I isa env FASTLANE_CPU_ISA=isa $(SANITIZE)/sweep

$(SANITIZE)/sweep: $(SANITIZE_OBJECTS)
	$(CXX) $(SANITIZE_FLAGS) $^ -o $@

$(SANITIZE)/%.o: %.cpp Makefile
	@mkdir -p $(dir $@)
	$(CXX) $(SANITIZE_FLAGS) -MMD -MP -c $< -o $@

-include $(SANITIZE_OBJECTS:.o=.d)

# The kernels of 64-bit Arm, cross-compiled and emulated. The emulated CPU records its results, and this machine checks
# them. Debian: apt install g++-aarch64-linux-gnu qemu-user. All cases take the better part of an hour a set;
# SWEEP="0 99999 17" takes every 17th.
AARCH64 = build/aarch64
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU_AARCH64 ?= qemu-aarch64
SWEEP ?= 0 99999
SWEEP_FLAGS = -std=c++17 -O2 -ffp-contract=off -pthread -Wall -Wextra -Wno-psabi -Icsrc
SWEEP_SOURCES = $(wildcard csrc/kernels/cpu/*.cpp csrc/kernels/cpu/isa/*.cpp tests/native/cpu/*.cpp)
AARCH64_OBJECTS = $(patsubst %.cpp,$(AARCH64)/%.o,$(SWEEP_SOURCES))
CHECKER_OBJECTS = $(patsubst %.cpp,$(AARCH64)/checker/%.o,$(filter-out csrc/kernels/cpu/isa/%,$(SWEEP_SOURCES)) \
	$(wildcard tests/native/checker/*.cpp))
sweep-aarch64:
	@for tool in $(AARCH64_CXX) $(QEMU_AARCH64); do command -v $$tool > /dev/null || { echo "sweep-aarch64: $$tool was \
	not found; install g++-aarch64-linux-gnu and qemu-user, or set AARCH64_CXX and QEMU_AARCH64" >&2; exit 1; }; done
	@$(MAKE) --no-print-directory -j2 $(AARCH64)/sweep $(AARCH64)/checker/sweep
	@isas=$$($(QEMU_AARCH64) $(AARCH64)/sweep --isas) && test -n "$$isas" && printf '%s\n' $$isas | xargs -P 2 -n 1 sh -c '\
	FASTLANE_CPU_ISA=$$0 $(QEMU_AARCH64) $(AARCH64)/sweep --write $(AARCH64)/$$0.record $(SWEEP) && \
	FASTLANE_CPU_ISA= $(AARCH64)/checker/sweep --read $(AARCH64)/$$0.record $(SWEEP)'

$(AARCH64)/sweep: $(AARCH64_OBJECTS)
	$(AARCH64_CXX) -static -pthread $^ -o $@
$(AARCH64)/checker/sweep: $(CHECKER_OBJECTS)
	$(CXX) -pthread $^ -o $@

$(AARCH64)/checker/%.o: %.cpp Makefile
	@mkdir -p $(dir $@)
	$(CXX) $(SWEEP_FLAGS) -MMD -MP -c $< -o $@
$(AARCH64)/%.o: %.cpp Makefile
	@mkdir -p $(dir $@)
	$(AARCH64_CXX) $(SWEEP_FLAGS) -MMD -MP -c $< -o $@

-include $(AARCH64_OBJECTS:.o=.d) $(CHECKER_OBJECTS:.o=.d)

# The package compiled for macOS on 64-bit Arm by clang, and linked with torch's own build; ziglang brings the compiler
# and macOS's headers. Nothing runs.
MACOS = build/macos
macos-build: $(VENV)/.requirements
	@mkdir -p $(MACOS)
	rm -f $(MACOS)/torch-*.whl
	$(BIN)/python -m pip install --quiet --upgrade --target $(MACOS)/zig ziglang==0.17.1
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --platform macosx_14_0_arm64 --dest $(MACOS) \
	$(shell grep '^torch==' requirements.txt)
	cd $(MACOS) && ../../$(BIN)/python -m zipfile -e torch-*.whl .
	PYTHONPATH=$(MACOS)/zig $(BIN)/python tests/native/macos_build.py $(MACOS)

# The CUDA half without a GPU: a source distribution, compiled and linked for torch's CUDA build in an environment and a
# folder of its own, then the tests that this build or the newer torch may change. nvcc is all it needs; torch and its
# libraries take 5 GB.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= 2.14.1
CUDA_ARCHS ?= 8.0;9.0a+PTX
CUDA_COPY = build/cuda
CUDA_BIN = $(abspath $(CUDA_VENV))/bin
CUDA_TOOLS = nvidia-cutlass==4.2.0.0 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
# timm needs torchvision, which fits one release of torch only; the tests of its models run here.
CUDA_TIMM = torchvision==0.29.1 timm==1.0.31
cuda-build: $(CUDA_VENV)/.requirements
	mkdir -p $(CUDA_COPY)
	find $(CUDA_COPY) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	rm -rf build/sdist
	$(CUDA_BIN)/python -m build --sdist --no-isolation --outdir build/sdist . > /dev/null
	tar xf build/sdist/*.tar.gz --strip-components=1 -C $(CUDA_COPY)
	cd $(CUDA_COPY) && FASTLANE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" NVCC_APPEND_FLAGS=-Xptxas=-v \
	$(CUDA_BIN)/python -m pip install --verbose --no-build-isolation --no-deps --editable . > build.log 2>&1 || { tail -n 40 build.log; exit 1; }
	cd $(CUDA_COPY) && $(CUDA_BIN)/python tests/support/ptxas_report.py build.log
	cd $(CUDA_COPY) && $(CUDA_BIN)/fastlane info && $(CUDA_BIN)/python $(PYTEST) --other-torch

$(CUDA_VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	sed 's/^torch==.*/torch==$(CUDA_TORCH)/' requirements.txt > $(CUDA_VENV)/requirements.txt
	$(CUDA_BIN)/python -m pip install --quiet --requirement $(CUDA_VENV)/requirements.txt
	$(CUDA_BIN)/python -m pip install --quiet --no-deps $(CUDA_TOOLS) $(CUDA_TIMM)
	touch $@

# The tables and plots of README.md and docs/performance.md: measured on this machine, now, three runs. Leave it alone meanwhile; three
# quarters of an hour.
RESULTS = benchmarks/results
results_of = $(sort $(wildcard $(RESULTS)/$(1)-[0-9].json))
bench: $(VENV)/.built
	mkdir -p $(RESULTS)
	for suite in layer networks models; do for run in 1 2 3; do \
	$(BIN)/fastlane bench --suite $$suite --json $(RESULTS)/$$suite-$$run.json || exit 1; done; done
	$(BIN)/python benchmarks/bench_gelu.py --json $(RESULTS)/gelu.json
	$(MAKE) report

# GELU alone, old formulas against new, and its error over every float32: some minutes.
bench-gelu: $(VENV)/.built
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/bench_gelu.py --json $(RESULTS)/gelu.json
	$(BIN)/python benchmarks/report.py $(RESULTS)/gelu.json --readme benchmarks/RESULTS.md

REPORT = $(BIN)/python benchmarks/report.py
report: $(VENV)/.built
	$(REPORT) $(call results_of,layer) --suite layer --threads $$(nproc) --readme docs/performance.md --plot docs/bench.png
	$(REPORT) $(call results_of,networks) --suite networks --threads $$(nproc) --readme docs/performance.md --plot docs/bench-networks.png
	$(REPORT) $(call results_of,models) --suite models --threads $$(nproc) --readme docs/performance.md --plot docs/bench-models.png
	$(REPORT) $(call results_of,layer) $(call results_of,networks) --readme benchmarks/RESULTS.md
	$(REPORT) $(call results_of,zen4-quick) --readme benchmarks/RESULTS-zen4.md
	$(REPORT) $(call results_of,zen4-layer) --readme benchmarks/RESULTS-zen4-all.md
	$(REPORT) $(call results_of,zen4-none-layer) $(call results_of,zen4-none-networks) --readme benchmarks/RESULTS-zen4-none.md
	$(REPORT) $(call results_of,zen3-layer) --readme benchmarks/RESULTS-zen3.md
	$(REPORT) $(call results_of,zen3-networks) --suite networks --readme benchmarks/RESULTS-zen3.md
	$(REPORT) $(call results_of,zen3-mlps) --suite models --readme benchmarks/RESULTS-zen3.md
	$(REPORT) $(call results_of,zen3-float64) --readme benchmarks/RESULTS-zen3-float64.md
	$(REPORT) $(call results_of,zen3-tuned-layer) --readme benchmarks/RESULTS-zen3-tuned.md
	$(REPORT) $(call results_of,zen3-tuned-networks) --suite networks --readme benchmarks/RESULTS-zen3-tuned.md
	$(REPORT) $(call results_of,zen3-tuned-mlps) --suite models --readme benchmarks/RESULTS-zen3-tuned.md
	$(REPORT) $(call results_of,zen4-none-mlps) --readme benchmarks/RESULTS-zen4-none-mlps.md
	$(REPORT) $(RESULTS)/gelu.json --readme benchmarks/RESULTS.md
	$(BIN)/python benchmarks/summary.py --readme README.md

# Compiles every source once more.
build-cost: $(VENV)/.built
	PATH=$(BIN):$$PATH $(BIN)/python benchmarks/build_cost.py

clean:
	rm -rf build dist *.egg-info $(OUTPUT) fastlane_ext/_C*.so fastlane_ext/_build_record.json

# pip shows its progress on a terminal, and nothing elsewhere.
$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	[ -t 1 ] || quiet=--quiet; $(BIN)/python -m pip install $$quiet --requirement requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(BUILD_INPUTS)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@
