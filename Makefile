PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= demo-output
BIN = $(VENV)/bin
BUILD_INPUTS = setup.py build_support.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint format bench report clean

# A fresh machine needs Python 3.10+, its headers and a C++ compiler; everything else is installed here.
demo: $(VENV)/.built
	mkdir -p $(OUTPUT)
	$(BIN)/fastlane info
	$(BIN)/fastlane gradients --plot $(OUTPUT)/gradients.png
	$(BIN)/fastlane train --plot $(OUTPUT)/training.png
	@echo "Plots: $(OUTPUT)/gradients.png and $(OUTPUT)/training.png"

test: $(VENV)/.built lint
	$(BIN)/python -m pytest

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc')

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.inc')

# The README's table and plots: measured on this machine, now. Leave it alone meanwhile; it takes many minutes.
RESULTS = benchmarks/results/bench.json
bench: $(VENV)/.built
	mkdir -p $(dir $(RESULTS))
	$(BIN)/fastlane bench --suite all --json $(RESULTS)
	$(MAKE) report

report: $(VENV)/.built
	$(BIN)/python benchmarks/report.py $(RESULTS) --suite layer --threads $$(nproc) --readme README.md --plot docs/bench.png
	$(BIN)/python benchmarks/report.py $(RESULTS) --suite networks --plot docs/bench-networks.png
	$(BIN)/python benchmarks/report.py $(RESULTS) --readme benchmarks/RESULTS.md

clean:
	rm -rf build dist *.egg-info $(OUTPUT) fastlane_ext/_C*.so fastlane_ext/_build_record.json

$(VENV)/.requirements: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/.built: $(VENV)/.requirements $(BUILD_INPUTS)
	$(BIN)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@
