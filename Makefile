# The one task runner, for people and for .ci/run. `make` or `make help` lists what it does.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PYTEST ?= pytest -n 2 --dist loadfile --no-loadscope-reorder
FUZZ ?= --seconds 600
REFERENCE := models/reference
TEXTS := $(REFERENCE)/heldout
CALIBRATION := $(REFERENCE)/calibration.txt

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint fuzz test-arm docs bench bench-root mutate dist clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: $(STAMP)  ## make .venv with the package (editable) and everything it needs, in exact versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PocketMoE needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --quiet --editable '.[export,optimum,chat,grammar,serve,dev]'
	@touch $@

demo: $(STAMP)  ## export, quantize and run the reference model in 40% of its experts' memory
	pocketmoe export models/reference/checkpoint -o demo/olmoe
	pocketmoe quantize demo/olmoe -o demo/olmoe-int4 --scheme int4
	pocketmoe run demo/olmoe-int4 --prompt "To create an index, use the" --memory 40% --max-tokens 90 --temperature 0.6 --top-p 0.9 --seed 2 -v

test: $(STAMP)  ## run the tests
	$(PYTEST)

lint: $(STAMP)  ## check style, types, and that generated pages are up to date
	ruff check .
	ruff format --check .
	deptry .
	pyright
	$(foreach page,$(wildcard docs/generate*.py),python $(page) --check &&) true

fuzz: $(STAMP)  ## throw mutated bundles, checkpoints and inputs at the command line, for ten minutes
	python -m tests.fuzz $(FUZZ)

test-arm: $(STAMP)  ## run the runtime on emulated 64-bit Arm cores (docs/PLATFORMS.md; half an hour, root the first time)
	python -m scripts.emulated arm

docs: $(STAMP)  ## write the generated pages anew
	$(foreach page,$(wildcard docs/generate*.py),python $(page) &&) true

bench: demo  ## run the benchmarks that need no big checkpoint; each prints its table (an hour or two)
	python benchmarks/cache_policies.py
	python benchmarks/quantize_schemes.py
	python benchmarks/many_experts.py
	python benchmarks/portable_model.py demo/olmoe-int4
	python benchmarks/prefer_cached.py demo/olmoe-int4 $(TEXTS)
	python benchmarks/accuracy_levels.py demo/olmoe $(TEXTS)
	python benchmarks/broken_decoding.py demo/olmoe-int4 demo/olmoe $(TEXTS)
	python benchmarks/roundings.py demo/olmoe --calibration $(CALIBRATION) --text $(TEXTS)
	python benchmarks/mixed_precision.py demo/olmoe --calibration $(CALIBRATION) --text $(TEXTS)
	python benchmarks/long_context.py build/long_context --build
	python benchmarks/long_context.py build/long_context

bench-root: demo  ## run those that need a memory cgroup, and so root
	python benchmarks/budgets.py demo/olmoe-int4
	python benchmarks/soak.py demo/olmoe-int4

dist: $(STAMP)  ## build sdist, wheel and checksums of a tagged commit (RELEASE.md)
	python scripts/release.py

mutate: $(STAMP)  ## change the code a line at a time and see whether the tests notice (docs/MUTATION.md; half an hour)
	PIP_CONSTRAINT=constraints.txt python -m pip install --quiet --editable '.[mutate]'
	mutmut run --max-children 1
	mutmut results

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) demo build dist mutants .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
