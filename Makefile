# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test faults mutations lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/baton run configs/quickstart.yaml

# A worker for every core, each with one thread: models as small as those of the tests gain nothing by more.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal

# Takes each guard out of a copy of the source; some test has to fail.
mutations: $(VENV)/.installed
	$(BIN)/python -m tests.mutations

# The long form of tests/faults, which takes about an hour and writes docs/reliability.md. It needs Linux and strace
# (apt-get install strace), without which `make test` skips most of those tests.
faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy pipeline data reward stages

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
