# One command each, from a fresh clone, with Python >= 3.11 and make:
#   make demo         train an LSTM on Shakespeare and read what it writes (about a minute and a half)
#   make test         ruff and the tests
#   make test-peers   the tests against PyTorch, Keras and ONNX Runtime (installs them)
#   make test-browser the viewer's page in headless Chromium (which must be there, with chromedriver)
#   make test-gpu     the kernels for GPUs compiled and checked, without a GPU (installs NVIDIA's compilers)
# PYTHON=python3.12 picks another interpreter, VENV=... another environment.

VENV ?= .venv
TORCH ?= torch==2.13.0
KERAS ?= keras==3.15.1
PYTEST_ARGS ?= -n auto

# The first interpreter that runs, is new enough and can make an environment.
ifndef PYTHON
PYTHON := $(shell for python in python3 python python3.14 python3.13 python3.12 python3.11; do \
  $$python -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 \
  && echo $$python && break; done)
endif

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
RUN := $(BIN)/python
STAMP = $(RUN) -c "import pathlib; pathlib.Path('$@').touch()"

.PHONY: demo test test-peers test-browser test-gpu lint format clean

demo: $(VENV)/.stamp-demo
	$(RUN) -m numlstm demo

test: lint
	$(RUN) -m pytest -m "not peers and not browser and not gpu and not gpu_compile" $(PYTEST_ARGS)

# Keras takes its backend from there when it is imported; the comparison needs gradients, so PyTorch.
test-peers: export KERAS_BACKEND = torch
test-peers: $(VENV)/.stamp-peers
	$(RUN) -m pytest -m peers $(PYTEST_ARGS)

# One process: one browser serves all tests.
test-browser: $(VENV)/.stamp-browser
	$(RUN) -m pytest -m browser

test-gpu: $(VENV)/.stamp-gpu
	$(RUN) -m pytest -m gpu_compile $(PYTEST_ARGS)

lint: $(VENV)/.stamp-test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/.stamp-test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# A stamp says which extras the environment holds; a changed pyproject.toml installs them again.
$(VENV)/.stamp-venv:
ifeq ($(PYTHON),)
	@echo "make: no Python >= 3.11 that can create an environment was found; name one: make PYTHON=..." >&2
	@exit 2
endif
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'numlstm needs Python >= 3.11, got ' + sys.version)"
	$(PYTHON) -m venv $(VENV)
	@$(STAMP)

$(VENV)/.stamp-demo: pyproject.toml $(VENV)/.stamp-venv
	$(RUN) -m pip install --quiet --editable ".[plot]"
	@$(STAMP)

$(VENV)/.stamp-test: pyproject.toml $(VENV)/.stamp-venv
	$(RUN) -m pip install --quiet --editable ".[test]"
	@$(STAMP)

# Keras at a fixed version, as the comparison changes a table private to it (tests/conformance/keras_live.py).
$(VENV)/.stamp-peers: $(VENV)/.stamp-test
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet "$(KERAS)" --editable ".[peers]"
	@$(STAMP)

$(VENV)/.stamp-browser: $(VENV)/.stamp-test
	$(RUN) -m pip install --quiet --editable ".[browser-test]"
	@$(STAMP)

$(VENV)/.stamp-gpu: $(VENV)/.stamp-test
	$(RUN) -m pip install --quiet --editable ".[gpu-test]"
	@$(STAMP)

clean:
	$(PYTHON) -c "import shutil; [shutil.rmtree(name, ignore_errors=True) for name in ('$(VENV)', 'build', 'dist')]"
