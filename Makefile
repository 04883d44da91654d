# Everything runs in .venv, which the first target that needs it makes from requirements.lock.
PYTHON ?= python3
JOBS ?= auto
PY := .venv/bin/python
ENV := .venv/.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types stubs unit long exhaustive explore spin fuzz bench fidelity site lock clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(ENV)  ## replay the bundled recordings on their own backend and on the other one
	@$(PY) -m kvmfault.cli.demo

test: lint types unit  ## all checks: ruff, import-linter, mypy, pyright, pytest with doctests, examples and docs

lint: $(ENV)  ## ruff and import-linter
	@echo "== ruff"
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || { echo "not formatted: run $(PY) -m ruff format ."; exit 1; }
	@echo "== import-linter"
	@.venv/bin/lint-imports > .venv/lint-imports.log 2>&1 || { cat .venv/lint-imports.log; exit 1; }

types: $(ENV)  ## mypy --strict, pyright, and how complete the public types are
	@echo "== mypy"
	@$(PY) -m mypy --no-error-summary
	@echo "== pyright"
	@$(PY) -m pyright --pythonpath $(PY) > .venv/pyright.log 2>&1 || { cat .venv/pyright.log; exit 1; }
	@PYTHONPATH=. $(PY) -m pyright --pythonpath $(PY) --verifytypes kvmfault --ignoreexternal > .venv/verifytypes.log 2>&1 || { cat .venv/verifytypes.log; exit 1; }

stubs: $(ENV)  ## compare declared types with what is there at run time (minutes)
	@MYPYPATH=. $(PY) -m mypy.stubtest kvmfault --concise --mypy-config-file pyproject.toml --allowlist tests/stubtest.txt --ignore-unused-allowlist

unit: $(ENV)  ## pytest alone
	@echo "== pytest"
	@$(PY) -m pytest -q -rfEs -n $(JOBS)

long: $(ENV)  ## many more random cases, and the tests marked long
	@HYPOTHESIS_PROFILE=long $(PY) -m pytest -q -rfEs -n $(JOBS) -m "long or hypothesis"

exhaustive: $(ENV)  ## compare emitted C with Python on all 2^32 values of ESR_EL2
	@$(PY) -m tests.exhaustive

spin: $(ENV)  ## the invalidation protocol and its mutants, as spin judges a model of it and as the explorer does
	@$(PY) -m tests.spin

fuzz: $(ENV)  ## read damaged recordings for ten minutes; what breaks a reader is kept in tests/data/fuzz
	@$(PY) -m tests.fuzz --seconds 600

explore: $(ENV)  ## every interleaving of the standing scenarios on every backend, and every bug of the past; minutes
	@$(PY) -m bench.explore

bench: $(ENV)  ## measure the speed budgets, as ratios
	@$(PY) -m bench

fidelity: $(ENV)  ## measure how far the model agrees with ../shared/traces, into docs/fidelity.md
	@$(PY) -m docs.fidelity

site: $(ENV)  ## build the documentation into build/site, without a network; look at it with python3 -m http.server -d build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

lock:  ## write requirements.lock anew from pyproject.toml
	@$(PYTHON) -m venv build/lock && build/lock/bin/pip install -qq pip-tools
	@echo '# Every package of .venv, exact. Written by `make lock` from pyproject.toml; installed by the Makefile.' > build/requirements.lock
	@build/lock/bin/pip-compile -q --upgrade --all-extras --strip-extras --no-header --annotation-style line \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links -o build/lock.txt pyproject.toml
	@sed 's/  *#/  #/' build/lock.txt >> build/requirements.lock && mv build/requirements.lock requirements.lock

clean:  ## remove .venv and every cache
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(ENV): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("kvmfault needs Python 3.11 or newer, $(PYTHON) is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "== .venv (about a minute the first time)"
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	@.venv/bin/pip install -qq -r requirements.lock
	@.venv/bin/pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
