# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Everything starts here; `make` alone tells what there is. Each target does the set-up that it
# needs (packaging/setup), which costs nothing once it is done.

PYTHON := .venv/bin/python
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# A checkout may be another user's; mypy does not run where it cannot write its cache.
export MYPY_CACHE_DIR := $(shell test -w .mypy_cache -o ! -e .mypy_cache -a -w . \
	&& echo .mypy_cache || echo /dev/null)

define LINT
$(PYTHON) -m ruff check --no-cache .
$(PYTHON) -m ruff format --no-cache --check .
$(PYTHON) -m mypy
endef

.PHONY: help
help: ## Tell what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Stop a real guest over D-Bus and watch it (about a minute)
	@$(PYTHON) -m tests.demo

.PHONY: test
test: setup ## Check the code and run every test
	$(LINT)
	$(PYTHON) -m pytest

.PHONY: lint
lint: venv ## Check the code: ruff, its format, mypy --strict
	$(LINT)

.PHONY: bench
bench: ## Measure, beside libvirt, and print a table
	@packaging/setup build lab bench guest venv
	@$(PYTHON) -m tests.bench

.PHONY: bench-safety
bench-safety: ## Stop guests on storage of every kind in every way, and print a table
	@packaging/setup build lab bench guest venv
	@$(PYTHON) -m tests.safety

.PHONY: setup
setup: ## Install Debian packages, fetch a kernel for guests, make .venv
	@packaging/setup build lab guest venv

.PHONY: venv
venv: ## Make .venv alone, with qkilld and qkillctl in .venv/bin
	@packaging/setup build venv

.PHONY: clean
clean: ## Remove all that was made in this checkout, not the Debian packages
	rm -rf .venv .lab .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
