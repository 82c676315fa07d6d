# make demo     a venv with the [numpyro] extra alone (no torch), then `elbozoo demo`
# make test     a venv with everything, then the whole test suite (ELBOZOO_EVERY_ROW=1: all rows of it in both engines)
# make lint     ruff and pyright, in the same venv
# make format   what ruff can put right by itself
# make arviz1   the tests marked `arviz` under ArviZ 1.x, which needs Python 3.12
# make lowest   the demo with the oldest versions of what [numpyro] needs that pyproject.toml allows; not in CI
# make venvs    the venvs of all of these, and of ci/; with -j2, two at a time
#
# PYTHON=... and PYTHON312=... choose other interpreters, WORKERS=... the number of test processes, and ARGS=... is
# handed to pytest. A venv is rebuilt only when what it is made from changes.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

# The first of these interpreters that starts, can make a venv and has the version: a version manager's shim may be on
# PATH and still not start.
version = $(shell $(1) -c 'import sys, ensurepip, venv; print(sys.version_info.major * 100 + sys.version_info.minor)' 2>/dev/null)
first = $(firstword $(foreach python,$(1),$(if $(filter $(2),$(call version,$(python))),$(python))))

ifeq ($(origin PYTHON),undefined)
PYTHON := $(call first,python3.11 python3,311 312 313 314 315)
endif
ifeq ($(origin PYTHON312),undefined)
PYTHON312 = $(call first,python3.12 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python),312)
endif
# A worker keeps to one core: tests/conftest.py sees to that. A file's tests go to one worker, which computes and
# compiles but once what they share, and in the order of tests/conftest.py: the longest first.
WORKERS ?= 2
SPREAD := --dist loadfile --no-loadscope-reorder
ARGS ?=

.PHONY: demo test lint format arviz1 lowest venvs clean

demo: .venv-demo/stamp
	.venv-demo/bin/elbozoo demo

test: .venv/stamp
	.venv/bin/python -m pytest -n $(WORKERS) $(SPREAD) $(ARGS)

lint: .venv/stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/stamp
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

venvs: .venv/stamp .venv-demo/stamp .venv-pyro/stamp

ifeq ($(PYTHON312),)
arviz1:
	@echo "make arviz1: skipped, for want of Python 3.12. Pass PYTHON312=/path/to/python3.12."
else
arviz1: .venv-arviz1/stamp
	.venv-arviz1/bin/python -m pytest -m arviz $$(grep -l 'mark\.arviz' tests/test_*.py) $(ARGS)

venvs: .venv-arviz1/stamp
endif

lowest: .venv-lowest/stamp
	.venv-lowest/bin/python ci/one_engine.py numpyro
	.venv-lowest/bin/elbozoo demo

.venv-lowest/stamp: pyproject.toml setup.py ci/lowest.py
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python ci/lowest.py numpyro > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --no-compile --constraint $(@D)/constraints.txt --editable '.[numpyro]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache

# One recipe for every venv; the constraints keep torch at the one build that CI is about. Python compiles a module when
# it is first imported: all of them at once would be half of the time, and most are never imported.
VENVS := .venv .venv-demo .venv-pyro .venv-arviz1
.venv/stamp: EXTRAS := all,dev
.venv-demo/stamp: EXTRAS := numpyro
.venv-pyro/stamp: EXTRAS := pyro,test
.venv-arviz1/stamp: EXTRAS := numpyro,test
.venv-arviz1/stamp: override PYTHON = $(PYTHON312)

$(VENVS:%=%/stamp): pyproject.toml setup.py ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "PYTHON must be Python 3.11 or later, with venv; got none. Pass PYTHON=/path/to/python."; exit 1; }
	@echo "Building $(@D) for elbozoo[$(EXTRAS)] with $(PYTHON)."
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile --constraint ci/constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@
