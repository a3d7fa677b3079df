# Each target works from a fresh clone on a machine that has python3 (3.10 or later) with pip and venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test slow quickstart lint format bench clean

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

slow: $(INSTALLED)
	$(BIN)/python -m pytest -q -m slow

quickstart: $(INSTALLED)
	$(BIN)/python recipes/quickstart.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Speed: half an hour of one core (and some minutes of a GPU, if there is one), on a machine without other work.
# Accuracy: some hours on 2 cores; runs that are in runs/benchmarks are kept. Both need the data and weights in ../shared.
SPEED := frozen_training trainer_cost input_pipeline distillation_cost evaluation_cost probes import_time \
	memory_formats cost_curves peers accelerator

bench: $(INSTALLED)
	for name in $(SPEED); do OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/report.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stamp is written last: an install that failed or was interrupted is done again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("python3 is %d.%d; hf_transfer needs 3.10 or later: make PYTHON=python3.12 ..." % v[:2])'
	@echo "installing into $(VENV) (PyTorch included: some minutes, some GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@
