# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test mutations lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/baton run configs/quickstart.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Takes each guard out of a copy of the source; some test has to fail.
mutations: $(VENV)/.installed
	$(BIN)/python -m tests.mutations

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
