# Every target runs in .venv, which the first one makes; NO_INSTALL=1 runs in an environment that exists.
PYTHON ?= python3
NO_INSTALL ?=
WORKERS ?= 2

ifeq ($(NO_INSTALL),)
RUN := .venv/bin/python
READY := .venv/.installed
else
RUN := PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
READY :=
endif

SUITE_FOR_THIS_MACHINE := import torch; print("gpu" if torch.cuda.is_available() else "quick")

.DEFAULT_GOAL := help
.PHONY: bench test certify lint results clean help

bench: $(READY) ## measure: suites/gpu.toml where torch sees a CUDA GPU, else suites/quick.toml
	@suite=$$($(RUN) -c '$(SUITE_FOR_THIS_MACHINE)') && $(RUN) -m moebench run "$$suite"

test: lint ## lint, types and tests
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

certify: $(READY) ## the proofs that take long, at their full size: fault bench, false alarms, power
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --certify -m certify --timeout 0

lint: $(READY) ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

results: $(READY) ## write all that follows from results/published/: CSV, plots, reports, documents' tables, notebooks
	$(RUN) results/rewrite.py
	$(RUN) -m tests.figures
	$(RUN) notebooks/execute.py
	$(RUN) -m moebench.report.columntable docs/results.md

clean: ## remove caches and builds; .venv and results/runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12          the Python that .venv is made of (3.11 or later)"
	@echo "  PYTHON=... NO_INSTALL=1    run in that environment as it is: no .venv, nothing installed"

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("moebench needs Python 3.11 or later, this is %s: make PYTHON=..." \
		% sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
