# make env   one environment with every extra, in .venv
# make demo  trains, lowers, simulates and reports the jets demo: runs/jets_hgq/report.html
# make test  lint, types, and the tests that take seconds
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONSTRAINTS := constraints.txt

.PHONY: env demo test test-slow lint types check-clean bench clean

env: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[all]'
	@touch $@

demo: $(STAMP)
	$(BIN)/pquant-jax run configs/jets_hgq.yaml --overwrite

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

test: $(STAMP) lint types
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow

bench: $(STAMP)
	JAX_PLATFORMS=cpu $(BIN)/python benchmarks/bench_step.py

clean:
	rm -rf $(VENV) runs .pytest_cache .hypothesis .ruff_cache
