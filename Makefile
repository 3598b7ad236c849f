# kvfold's chores; `make help` lists them. Everything lives in .venv, and nothing outside the checkout changes.

PYTHON ?= python3
EXTRAS ?= dev,gpu,eval,episodes,ray
PYTEST_FLAGS ?=
# off: without the compiled kernels, in plain torch.
KVFOLD_COMPILE ?= require

DEMO_DOC ?= examples/documents/blue-carbuncle.txt
DEMO_QUESTION ?= What was the name of the hotel?
DEMO_MODEL ?= smollm2-135m-instruct
DEMO_LINES ?= 70,180
DEMO_METHODS ?= full,kvfold,h2o,snapkv,streamingllm
DEMO_BUDGET ?= 0.2,0.1

VENV = .venv
PY = $(VENV)/bin/python
# As variables, because they then pin the build backend too, which -c does not.
PINS = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt KVFOLD_COMPILE=$(KVFOLD_COMPILE)
PIP = $(PINS) $(PY) -m pip --disable-pip-version-check
STAMP = $(VENV)/.installed

.PHONY: help venv test test-fast mutants gpu-check lint format types snippets newest check demo clean
.DEFAULT_GOAL := help
.SUFFIXES:
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## create .venv with kvfold, its tools and extras (EXTRAS=dev,gpu,eval,episodes,ray)

# torch goes first, at its pinned version: an open range would bring in gigabytes of CUDA packages where a CPU
# build is to be had. The stamp comes last, so that an interrupted install runs again.
$(STAMP): pyproject.toml constraints.txt hatch_build.py CMakeLists.txt $(wildcard cpp/*)
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

# Nightly, not in CI: it takes about half an hour. Ends with an error where a change of the code is seen by no test.
mutants: $(STAMP) ## change the core a line at a time and see that a test fails (docs/mutants.md)
	@OMP_NUM_THREADS=1 $(PY) tests/mutants.py

# Ends with an error, and says so, where there is no GPU.
gpu-check: $(STAMP) ## on a GPU: CUDA tests and benchmarks, ten minutes, results in benchmarks/results
	@$(PY) benchmarks/gpu_check.py

lint: $(STAMP) ## ruff: lint rules and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(STAMP) ## ruff: fix and format in place
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: $(STAMP) ## mypy, strict
	@$(PY) -m mypy

snippets: $(STAMP) ## README.md's snippets on a wheel, installed in build/site
	@rm -rf build/wheel build/site
	@$(PIP) wheel -q --no-deps -w build/wheel .
	@$(PIP) install -q --no-deps --target build/site build/wheel/*.whl
	@PYTHONPATH=build/site KVFOLD_IS_AT="$(CURDIR)/build/site" $(PY) -m pytest -q -o addopts= \
		tests/test_snippets.py -k README

# Tests say past_key_values, which all releases hear; the newest warn of it.
newest: $(STAMP) ## quick tests of what touches transformers, on its newest release (in build/newest)
	@$(PY) -m pip --disable-pip-version-check install -q --upgrade --target build/newest transformers
	@PYTHONPATH=build/newest $(PY) -m pytest -q -n 2 --dist loadfile -m 'not slow' --hypothesis-profile=quick \
		-o addopts='--strict-markers --strict-config' \
		-W 'ignore:`past_key_values` is deprecated:FutureWarning' tests/hf tests/cli

check: ## what CI runs: lint, types, all tests
	@bash .ci/run

demo: $(STAMP) ## compare the methods on one document and draw build/demo.html
	@mkdir -p build
	@echo "About a minute on two free cores, the first answer after twenty seconds; the first time the model is"
	@echo "fetched, and kernels are compiled for half a minute."
	@sed -n '$(DEMO_LINES)p' "$(DEMO_DOC)" > build/demo.txt
	$(PY) -m kvfold compare --model $(DEMO_MODEL) --methods $(DEMO_METHODS) --budget $(DEMO_BUDGET) \
		--file build/demo.txt --ask "$(DEMO_QUESTION)" --max-new-tokens 32 --chart build/demo.html

clean: ## remove .venv, build and the tools' caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
