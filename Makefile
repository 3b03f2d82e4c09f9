# make test   install into .venv, then run every check and test that needs no GPU
# make demo   install, then serve 24 users with and without the tiers, side by side (CPU, minutes)
# make demo-moe  install, then serve a small Mixture of Experts with a quarter of its experts (CPU)
# make check  the same as `make test`

# Any Python from 3.11 on: make PYTHON=/path/to/python3.12
PYTHON ?= python3

# What pip is asked for before everything else, so that it decides which build of torch is used.
# On Linux the default may be the CUDA build (several GB). For a smaller one without CUDA, add the
# index that PyTorch's install page shows for "CPU": make TORCH="torch==2.13.0 --index-url URL"
TORCH ?= torch==2.13.0

PIP := .venv/bin/python -m pip --disable-pip-version-check -qq

.PHONY: help test check demo demo-moe
help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

test check: .venv/installed
	scripts/check

demo: .venv/installed
	.venv/bin/hotset demo

demo-moe: .venv/installed
	.venv/bin/hotset demo-moe

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11, which hotset needs; \
	give another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments; \
	on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing into .venv (once, some minutes)" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) install $(TORCH)
	@$(PIP) install --editable '.[dev]'
	@touch $@
