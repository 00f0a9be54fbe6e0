# `make run` and `make test` set up what they need in .venv; nothing but Python 3.11 or newer has to be there.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS = 1

# Seed of the moments at which runs are killed: another one each time, to be given to repeat one.
KILLS ?= $(shell $(PYTHON) -c 'import random; print(random.randrange(10**6))')

.PHONY: docs run test test-fast test-field test-outages test-reproductions check format bench config clean

run: .venv/installed
	$(BIN)/fedkd compare fedavg fedavg_ft fedgen --engine simulation --rounds 30 --seeds 1,2,3 --out runs/digits

test: .venv/installed-dev
	$(BIN)/python -m pytest

test-fast: .venv/installed-dev
	$(BIN)/python -m pytest -m "not slow"

# All four at a time, also on two cores, since devices mostly wait.
test-field: .venv/installed-dev
	FEDKD_KILLS=$(KILLS) $(BIN)/python -m pytest -m field -n 4 --dist load $(shell grep -l pytest.mark.field tests/*.py)

test-outages: .venv/installed-dev
	$(BIN)/python -m pytest -m outage --dist load $(shell grep -l pytest.mark.outage tests/*.py)

test-reproductions: .venv/installed-dev
	$(BIN)/python -m pytest -m reproduction --dist load

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -W error::DeprecationWarning -m mkdocs build --strict --quiet

format: .venv/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/installed
	$(BIN)/python -m bench

config: .venv/installed
	$(BIN)/python -m sims.defaults

clean:
	rm -rf .venv build *.egg-info

.venv/pip:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

.venv/installed-docs: .venv/installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@
