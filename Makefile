# kvfold's chores; `make help` lists them. Everything lives in .venv, and nothing outside the checkout changes.

PYTHON ?= python3
EXTRAS ?= dev,gpu,eval,episodes,ray
PYTEST_FLAGS ?=

DEMO_DOC ?= examples/documents/blue-carbuncle.txt
DEMO_QUESTION ?= What was the name of the hotel?
DEMO_MODEL ?= smollm2-135m-instruct
DEMO_METHODS ?= full,kvfold,kvmerger,h2o,snapkv,tova,streamingllm
DEMO_BUDGET ?= 0.35,0.5,0.2

VENV = .venv
PY = $(VENV)/bin/python
# As variables, because they then pin the build backend too, which -c does not.
PINS = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
PIP = $(PINS) $(PY) -m pip --disable-pip-version-check
STAMP = $(VENV)/.installed

.PHONY: help venv test test-fast lint format types check demo clean
.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## create .venv with kvfold, its tools and extras (EXTRAS=dev,gpu,eval,episodes,ray)

# torch goes first, at its pinned version: an open range would bring in gigabytes of CUDA packages where a CPU
# build is to be had. The stamp comes last, so that an interrupted install runs again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("kvfold needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -qq -e '.[$(EXTRAS)]'
	@touch $@

test: $(STAMP) ## all tests, the slow ones too
	@$(PY) -m pytest -n 2 --dist loadfile $(PYTEST_FLAGS)

# No shape checks at calls, and few examples of a property: they take more than half of the time, and `make test` has them.
test-fast: $(STAMP) ## the quick tests, without shape checks at calls
	@$(PY) -m pytest -n 2 --dist loadfile -m 'not slow' --hypothesis-profile=quick \
		-o addopts='--strict-markers --strict-config' $(PYTEST_FLAGS)

lint: $(STAMP) ## ruff: lint rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP) ## ruff: fix and format in place
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP) ## mypy, strict
	@$(PY) -m mypy

check: ## what CI runs: lint, types, all tests
	@bash .ci/run

demo: $(STAMP) ## compare the methods on one document and draw build/demo.html
	@mkdir -p build
	$(PY) -m kvfold compare --model $(DEMO_MODEL) --methods $(DEMO_METHODS) --budget $(DEMO_BUDGET) \
		--file "$(DEMO_DOC)" --ask "$(DEMO_QUESTION)" --chart build/demo.html

clean: ## remove .venv, build and the tools' caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
