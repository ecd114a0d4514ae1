# make demo    set up .venv and prune the example network to half its latency
# make test    set up .venv and run the tests
# make lint    style and types
#
# Another Python or torch build: make demo PYTHON=python3.12 TORCH=torch

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
READY  := .venv/.installed

.PHONY: demo test lint clean

demo: $(READY)
	test -f examples/digits/digits.safetensors || $(BIN)/python examples/digits/train.py
	$(BIN)/deploy build --target local --project examples/digits --budget 0.5x

test: $(READY)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first and alone, so that the build asked for is the one that stays
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "edge-deploy needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
