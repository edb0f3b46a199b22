# Two commands matter: `make book` builds the site, `make test` checks everything. Both set up .venv themselves.
.DEFAULT_GOAL := help
.PHONY: help setup book test notebooks bench clean
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

help: ## show this help
	@grep -hE '^[a-z]+:.*##' Makefile | awk -F':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@echo "== set-up: .venv from constraints.txt"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(STAMP) ## create .venv with the pinned versions

book: $(STAMP) ## export, re-execute stale chapters, render the site into _docs/
	@echo "== export"; nbdev_export
	@echo "== stale chapters"; python tools/book.py run
	@echo "== ledger, status, home page"; python tools/book.py sync
	@echo "== site"; $(MAKE) --no-print-directory _docs/index.html
	@echo "open $(CURDIR)/_docs/index.html"

SITE := _quarto.yml site.yml index.qmd README.md $(wildcard nbs/*.ipynb nbs/*.qmd nbs/*.bib nbs/*.scss tools/*)
_docs/index.html: $(SITE)
	@command -v quarto >/dev/null || test -e .venv/.quarto-tried || { touch .venv/.quarto-tried; \
		echo "no quarto on PATH: trying pip install quarto-cli, once"; \
		timeout 300 python -m pip install --quiet --disable-pip-version-check quarto-cli >/dev/null 2>&1 || true; }
	@if quarto --version >/dev/null 2>&1; then quarto render; else \
		echo "Quarto is not on this machine and could not be installed with pip install quarto-cli."; \
		echo "Rendering with the embedded renderer, tools/preview; for the full site install Quarto 1.9 or newer."; \
		python tools/preview; fi
	@touch $@

test: $(STAMP) ## everything that CI checks: exports in sync, notebooks, pytest
	@echo "== the exported package is in sync with the notebooks"
	@before=$$(cat altbp/*.py | sha256sum); nbdev_export; after=$$(cat altbp/*.py | sha256sum); \
		test "$$before" = "$$after" || { git --no-pager diff --stat -- altbp; \
		echo "altbp/ differed from what the notebooks export; it is now up to date: commit it"; exit 1; }
	@echo "== notebooks, in two processes"
	OMP_NUM_THREADS=1 python tools/book.py test
	@echo "== pytest"
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

notebooks: $(STAMP) ## re-execute every chapter and store its outputs
	nbdev_export
	python tools/book.py run --all
	python tools/book.py sync

bench: $(STAMP) ## every timing and memory table, side by side in one run; a GPU's too where there is one
	@bad=; for f in benchmarks/bench_*.py; do echo "== $$f"; OMP_NUM_THREADS=1 python "$$f" || bad="$$bad $$f"; done; \
		test -z "$$bad" || { echo "failed:$$bad"; exit 1; }

clean: ## remove the site and the caches; keep .venv
	rm -rf _docs _proc _preview .quarto nbdev.yml .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
