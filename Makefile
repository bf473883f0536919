# `make demo` and `make test` need Python 3.11 and nothing else. Both build .venv on first use: demo without torch, in half
# a minute; test, and all else, with everything (about 3 minutes), whichever comes first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
# Processes that share the tests; a file's tests stay together.
JOBS ?= 2
BENCH_ARGS ?=
LOAD_ARGS ?= --clients 4 8 12 --seconds 30
SAMPLES_ARGS ?=

# Two threads fight over two cores; idle workers that spin make it worse.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test lint bench dist samples clean
help:
	@echo "make demo   translate sixteen spoken Spanish sentences while they are spoken; results in demo-output/"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make bench  measure the speed on this machine (about 8 minutes): docs/benchmarks.md with a picture, and the server under load"
	@echo "make samples  translate the demo's sentences into docs/samples: Opus files, pictures, a page"
	@echo "make dist   build wheel and source archive into dist/"
	@echo "make clean  remove .venv and demo-output"

define MAKE_VENV
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "EchoStream needs Python 3.11 or later, this is " + sys.version.split()[0] + "; name another: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
endef

$(VENV)/.demo: setup.py
	$(MAKE_VENV)
# Not compiled: half of the installing would be that, mostly of files which the demo never imports.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[demo]'
	@touch $@

$(VENV)/.installed: setup.py
	$(MAKE_VENV)
# torch first and alone: an unpinned torch, asked for by another package, may bring gigabytes of another build.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[train,simuleval,test]'
# What these two ask for besides: another torch, numba, which no test runs, and a tokenizer that is no wheel.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		simulstream==1.0.0 librosa==0.11.0 lazy_loader==0.6 pycountry 'OmniSTEval>=0.1.10,<0.2'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Close what else is running: the page tells the load. BENCH_ARGS='--clock cpu' on a machine that is never quiet.
bench: $(VENV)/.installed
	$(BIN)/python scripts/benchmark.py all --report docs/benchmarks.md $(BENCH_ARGS)
	$(BIN)/python scripts/load_test.py $(LOAD_ARGS)

samples: $(VENV)/.installed
	$(BIN)/python scripts/make_samples.py $(SAMPLES_ARGS)

# Built from what git knows, so that nothing else gets in.
dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'build>=1.2'
	$(BIN)/python scripts/build_dist.py --output dist

clean:
	rm -rf $(VENV) demo-output
