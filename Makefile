# Every target runs in .venv and creates it first if needed. NO_INSTALL=1 uses the environment of PYTHON as it is.
PYTHON ?= python3
NO_INSTALL ?=
WORKERS ?= 2

ifeq ($(NO_INSTALL),)
RUN := .venv/bin/python
READY := .venv/.installed
DOCS_READY := .venv/.installed-docs
else
RUN := PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
READY :=
DOCS_READY :=
endif

SUITE_FOR_THIS_MACHINE := import torch; print("gpu" if torch.cuda.is_available() else "quick")

# The tests start hundreds of processes. Each starts sooner where Python has stored the bytecode of this project.
WITH_BYTECODE := PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: bench test test-lowest test-pythons certify lint results docs clean help

# The tests that read and write results with every library that has a lower bound, without many processes.
LIBRARY_TESTS := tests/moebench/test_escapes.py tests/moebench/results tests/moebench/report/tables \
	$(addprefix tests/moebench/report/, test_github.py test_junit.py test_page.py plots/test_kinds.py plots/test_figures.py) \
	$(addprefix tests/moebench/workload/, test_case.py test_reader.py test_selection.py) \
	$(addprefix tests/moebench/verdicts/, test_document.py test_gate.py test_ranksum.py test_times.py) \
	$(addprefix tests/moebench/cli/, test_compare.py test_gate.py)
# These need torch.
TORCH_TESTS := tests/moebench/cli/test_show.py tests/moebench/workload/test_spec.py tests/moebench/run/test_lock.py \
	tests/moebench/machine/test_environment.py tests/moebench/parity/space/test_trial.py tests/moebench/verdicts/test_findings.py
LOWEST := .venv-lowest/bin/python

bench: $(READY) ## measure suites/gpu.toml if torch sees a CUDA GPU, else suites/quick.toml
	@suite=$$($(RUN) -c '$(SUITE_FOR_THIS_MACHINE)') && $(RUN) -m moebench run "$$suite"

test: lint ## check style and types, run the tests
	$(WITH_BYTECODE) $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

ifeq ($(NO_INSTALL),)
test-lowest: .venv-lowest/.installed ## run a part of the tests with the oldest libraries that pyproject.toml allows
	PYTHONPATH=. $(LOWEST) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(LIBRARY_TESTS) $(TORCH_TESTS)

test-pythons: ## run tests that need no torch with the other versions of Python that this machine has
	$(PYTHON) tests/pythons.py $(LIBRARY_TESTS)
else
test-lowest test-pythons:
	@echo "$@: skipped, because NO_INSTALL=1 installs nothing"
endif

certify: $(READY) ## run the proofs that take long in full: planted faults, false alarms, found slowdowns, additions
	$(WITH_BYTECODE) $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --certify -m certify --timeout 0

lint: $(READY) ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

results: $(READY) ## rewrite what follows from results/published/: CSV, plots, reports, tables in documents, notebooks
	$(RUN) results/rewrite.py
	$(RUN) -m tests.figures
	$(RUN) suites/scaling/curves.py
	$(RUN) notebooks/execute.py
	$(RUN) -m moebench.report.columntable docs/results.md

docs: $(DOCS_READY) ## build the site of the documents in build/site; fail at a link that leads nowhere
	$(RUN) docs/site/stage.py build/docs $(REPO_URL)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --config-file docs/site/mkdocs.yml

clean: ## remove caches and builds, but not environments and results/runs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12          make .venv with this Python (3.11 or later)"
	@echo "  REPO_URL=https://...       make docs: where readers find the files that are not on the site"
	@echo "  PYTHON=... NO_INSTALL=1    use the environment of this Python as it is; install nothing"

.venv-lowest/.installed: pyproject.toml constraints.txt tests/lowest.py
	$(PYTHON) -m venv --clear .venv-lowest
	$(LOWEST) -m pip install --quiet packaging
	$(LOWEST) tests/lowest.py > .venv-lowest/requirements.txt
	$(LOWEST) -m pip install --quiet --requirement .venv-lowest/requirements.txt
	@touch $@

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("moebench needs Python 3.11 or later, this is %s: make PYTHON=..." \
		% sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	@touch $@

.venv/.installed-docs: .venv/.installed
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@
