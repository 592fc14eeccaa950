# SPDX-License-Identifier: LGPL-2.1-or-later
#
# Everything starts here; `make` alone tells what there is. Each target does the set-up that it
# needs (packaging/setup), which costs nothing once it is done.

VENV := .venv/bin/python
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

# A checkout may be another user's; mypy does not run where it cannot write its cache.
export MYPY_CACHE_DIR := $(shell test -w .mypy_cache -o ! -e .mypy_cache -a -w . \
	&& echo .mypy_cache || echo /dev/null)

define LINT
$(VENV) -m ruff check --no-cache .
$(VENV) -m ruff format --no-cache --check .
$(VENV) -m mypy
endef

.PHONY: help
help: ## Tell what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Stop a real guest over D-Bus and watch it (about a minute)
	@$(VENV) -m tests.demo

.PHONY: test
test: setup ## Check the code and run every test
	$(LINT)
	$(VENV) -m pytest

.PHONY: lint
lint: venv ## Check the code: ruff, its format, mypy --strict
	$(LINT)

.PHONY: bench
bench: ## Measure, beside libvirt, and print a table
	@packaging/setup build lab bench guest venv
	@$(VENV) -m tests.bench

.PHONY: bench-safety
bench-safety: ## Stop guests on storage of every kind in every way, and print a table (OPTIONS=--help)
	@packaging/setup build lab bench guest venv
	@$(VENV) -m tests.safety $(OPTIONS)

.PHONY: setup
setup: ## Install Debian packages, fetch a kernel for guests, make .venv
	@packaging/setup build lab guest venv

.PHONY: venv
venv: ## Make .venv alone, with qkilld and qkillctl in .venv/bin
	@packaging/setup build venv

# Where it is installed. systemd, D-Bus and polkit look in places of their own, whatever PREFIX is.
# Each can be given: make install DESTDIR=/tmp/root PREFIX=/usr/local UNITDIR=/etc/systemd/system
PREFIX := /usr
# The interpreter of the programs.
PYTHON := /usr/bin/python3
BINDIR = $(PREFIX)/bin
LIBDIR = $(PREFIX)/lib
MANDIR = $(PREFIX)/share/man
DOCDIR = $(PREFIX)/share/doc/qkilld
UNITDIR = $(call ask,systemd,systemdsystemunitdir,/usr/lib/systemd/system)
USERUNITDIR = $(call ask,systemd,systemduserunitdir,/usr/lib/systemd/user)
CATALOGDIR = $(call ask,systemd,catalogdir,/usr/lib/systemd/catalog)
DBUSDATADIR = $(call ask,dbus-1,datadir,/usr/share)
POLKITDIR = $(call ask,polkit-gobject-1,actiondir,/usr/share/polkit-1/actions)

# Of pkg-config, or else the usual. /lib is a link to /usr/lib on most systems.
ask = $(shell realpath -m "$$(pkg-config --variable=$(2) $(1) 2>/dev/null || echo $(3))")
lower = $(shell echo $(1) | tr A-Z a-z)
places = BINDIR LIBDIR MANDIR DOCDIR UNITDIR USERUNITDIR CATALOGDIR DBUSDATADIR POLKITDIR
INSTALL = $(PYTHON) -I -B packaging/install.py $@ --destdir="$(DESTDIR)" --python="$(PYTHON)" \
	$(foreach place,$(places),--$(call lower,$(place))="$($(place))")

.PHONY: install
install: ## Put qkilld into the system: DESTDIR=, PREFIX=/usr, PYTHON=/usr/bin/python3
	@$(INSTALL)

.PHONY: uninstall
uninstall: ## Take it away again, with the same DESTDIR and PREFIX; leaves your configuration
	@$(INSTALL)

.PHONY: clean
clean: ## Remove all that was made in this checkout, not the Debian packages
	rm -rf .venv .lab .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
