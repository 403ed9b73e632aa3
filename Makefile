# The one task runner, for people and for .ci/run. `make` or `make help` lists what it does.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PYTEST ?= pytest -n 2 --dist loadfile
FUZZ ?= --seconds 600
BENCHMARKS := quantize_schemes cache_policies

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint fuzz docs bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

venv: $(STAMP)  ## make .venv with the package (editable) and everything it needs, in exact versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PocketMoE needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(VENV)/bin/python -m pip install --quiet --editable '.[export,dev]'
	@touch $@

demo: $(STAMP)  ## export, quantize and run the reference model in 40% of its experts' memory
	pocketmoe export models/reference/checkpoint -o demo/olmoe
	pocketmoe quantize demo/olmoe -o demo/olmoe-int4 --scheme int4
	pocketmoe run demo/olmoe-int4 --prompt "To create an index, use the" --memory 40% --max-tokens 90 --temperature 0.6 --top-p 0.9 --seed 2

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

docs: $(STAMP)  ## write the generated pages anew
	$(foreach page,$(wildcard docs/generate*.py),python $(page) &&) true

bench: $(STAMP)  ## run the benchmarks; each prints its table (minutes to hours)
	$(foreach name,$(BENCHMARKS),python benchmarks/$(name).py &&) true

clean:  ## remove what the other targets made, .venv included
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
