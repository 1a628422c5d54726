# `make` lists the targets. Everything runs in one environment, .venv, which is made (and brought up to date) on demand.
SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SUPPORTED := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
# Two notebooks or tests at a time, one computing thread each: two cores are not asked for more than they have.
# `make test TIMES=1` says how long each notebook and the slowest tests take.
NBDEV_TEST := OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 $(if $(TIMES),--timing)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(if $(TIMES),--durations=40)
# Tests start many interpreters: none of them shall compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help report test test-slow faults docs pdf readme clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' Makefile

$(STAMP): pyproject.toml constraints.txt settings.ini
	@$(BIN)/python $(SUPPORTED) 2>/dev/null || $(PYTHON) $(SUPPORTED) 2>/dev/null || { \
	  echo "hybridvae needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is none of them: name one, as in 'make PYTHON=python3.12'." >&2; exit 1; }
	@$(BIN)/python $(SUPPORTED) 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): PyTorch is large, so this takes some minutes."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

report: $(STAMP)  ## run the small models and render the report
	$(BIN)/hybridvae report

test: $(STAMP)  ## package in step with the notebooks, notebooks run, tests pass
	TIMEFORMAT='in step: %0R seconds'; time $(BIN)/pytest tests/test_sync.py
	export HYBRIDVAE_BUDGET=0.1 TIMEFORMAT='notebooks: %0R seconds'; time $(NBDEV_TEST)
	TIMEFORMAT='tests: %0R seconds'; time $(PYTEST) --ignore tests/test_sync.py

test-slow: $(STAMP)  ## the checks of quality, with full training budgets
	$(NBDEV_TEST) --flags slow
	$(BIN)/pytest -m slow

faults: $(STAMP)  ## plant known faults in a copy: the tests must notice each of them
	$(BIN)/python tests/planted_faults.py

docs: $(STAMP)  ## render the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { \
	  echo "Quarto is not installed (https://quarto.org/docs/get-started/): the site needs it, everything else does without." >&2; exit 1; }
	rm -rf _proc
	$(BIN)/nbdev_proc_nbs
	set -o pipefail; cd _proc && quarto render --no-execute 2>&1 | tee quarto.log
	@! grep -n WARN _proc/quarto.log || { echo "Quarto warned (above): mend the notebooks it names." >&2; exit 1; }
	@rm -rf _docs && mv _proc/_docs _docs && echo "The site is in _docs/index.html."

pdf: $(STAMP)  ## the report as report.pdf, typeset by Typst (needs Quarto)
	@command -v quarto >/dev/null || { \
	  echo "Quarto is not installed (https://quarto.org/docs/get-started/): 'hybridvae report --pdf' needs a browser only." >&2; exit 1; }
	rm -rf _proc
	$(BIN)/nbdev_proc_nbs
	cd _proc && quarto render 07_report.ipynb --to typst --no-execute
	@mv "$$(find _proc -name 07_report.pdf | head -n 1)" report.pdf && echo "The report is in report.pdf."

readme: $(STAMP)  ## write README.md from nbs/index.ipynb
	$(BIN)/python tests/readme.py

clean:  ## remove what can be made again (.venv and runs stay)
	rm -rf _docs _proc report.pdf build dist *.egg-info .pytest_cache
	find hybridvae tests nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
