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
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: setup ## Stop a real guest over D-Bus and watch it (about a minute)
	@$(VENV) -m tests.demo

# The tests wait more than they work: more processes than processors. Each boots a container.
WORKERS := 8

.PHONY: test
test: setup ## Check the code and run every test, WORKERS=8 at once
	$(LINT)
	$(VENV) -m pytest --numprocesses=$(WORKERS) --dist=loadgroup

.PHONY: test-dbus-fast
test-dbus-fast: ## Run the tests of the bus with dbus-fast instead of dbus-next
	@packaging/setup build lab guest venv
	$(VENV) -m pytest --numprocesses=$(WORKERS) --dist=loadgroup --dbus-library=dbus-fast tests/bus tests/pure

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

.PHONY: bench-shutdown
bench-shutdown: ## Stop guests in every state in five ways, and print a table (OPTIONS=--help)
	@packaging/setup build lab bench guest debian aarch64 venv
	@$(VENV) -m tests.shutdown $(OPTIONS)

.PHONY: fuzz
fuzz: ## Send hostile input to the daemon and its parsers, and print a table (OPTIONS=--help)
	@packaging/setup build lab guest venv
	@$(VENV) -m tests.fuzz $(OPTIONS)

.PHONY: bench-judgement
bench-judgement: ## Stop QEMUs on random storage, with the truth known, and judge (OPTIONS=--help)
	@packaging/setup build lab campaign venv
	@$(VENV) -m tests.campaign $(OPTIONS)

.PHONY: bench-units
bench-units: ## Stop guests in units from the field, before and after adopting, and print a table (OPTIONS=--help)
	@packaging/setup build lab guest venv
	@$(VENV) -m tests.corpus $(OPTIONS)

.PHONY: chaos
chaos: ## Stop guests while the daemon, bus, journal and systemd fail (OPTIONS=--help)
	@packaging/setup build lab guest venv
	@$(VENV) -m tests.chaos $(OPTIONS)

.PHONY: setup
setup: ## Install Debian packages, make guests to test with and .venv
	@packaging/setup build lab campaign guest debian venv

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
BASHDIR = $(PREFIX)/share/bash-completion/completions
# Debian's zsh looks in a directory of its own for what packages have.
ZSHDIR = $(or $(wildcard $(PREFIX)/share/zsh/vendor-completions),$(PREFIX)/share/zsh/site-functions)
FISHDIR = $(PREFIX)/share/fish/vendor_completions.d
lower = $(shell echo $(1) | tr A-Z a-z)
places = BINDIR LIBDIR MANDIR DOCDIR UNITDIR USERUNITDIR CATALOGDIR DBUSDATADIR POLKITDIR \
	BASHDIR ZSHDIR FISHDIR
# For the makers of packages: PACKAGE=yes leaves byte code, the list of files and the licence to them.
PACKAGE := no
INSTALL = $(PYTHON) -I -B packaging/install.py $@ --destdir="$(DESTDIR)" --python="$(PYTHON)" \
	--package="$(PACKAGE)" \
	$(foreach place,$(places),--$(call lower,$(place))="$($(place))")

.PHONY: install
install: ## Put qkilld into the system: DESTDIR=, PREFIX=/usr, PYTHON=/usr/bin/python3
	@$(INSTALL)

.PHONY: uninstall
uninstall: ## Take it away again, with the same DESTDIR and PREFIX; leaves your configuration
	@$(INSTALL)

.PHONY: deb
deb: ## Build the Debian package of what is committed, into dist/
	@packaging/setup package
	@packaging/build-deb

.PHONY: packages
packages: ## Build all packages that can be built on this machine, and tell which cannot
	@packaging/build-packages

.PHONY: test-packages
test-packages: deb ## Install, use, upgrade and remove it in clean Debians (RELEASES="trixie sid")
	@packaging/setup build lab debian venv
	@$(VENV) -m tests.distros packages $(RELEASES)

.PHONY: test-distros
test-distros: ## Run the suite in Debian 13 and sid (RELEASES="trixie sid", OPTIONS='--tests tests/bus')
	@packaging/setup build lab debian venv
	@$(VENV) -m tests.distros suite $(OPTIONS) $(or $(RELEASES),trixie sid)

.PHONY: clean
clean: ## Remove all that was made in this checkout, not the Debian packages
	rm -rf .venv .lab .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
