# What one does with this project. Each target first sets up what it needs: a virtual environment in
# .venv, and Prometheus, Alertmanager, PostgreSQL, Chromium and npm where apt can bring them. Needs: make, Python >= 3.11.

VENV  := .venv
BIN   := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0

# The first Python that is new enough and can make virtual environments; `make PYTHON=...` chooses another.
CAPABLE := import sys, venv, ensurepip; sys.version_info >= (3, 11) or sys.exit(1); print(sys.executable)
PYTHON  ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 /usr/bin/python3,$(shell $(p) -c '$(CAPABLE)' 2>/dev/null)))

# What Debian calls the programs that are not Python packages.
SERVICES := prometheus prometheus-alertmanager postgresql chromium chromium-driver npm

# Checks of manifests. checkov pins half a hundred packages otherwise than ours do: it has an environment of its own.
CHECKOV              := .venv-checkov
CHECKOV_READY        := $(CHECKOV)/.ready
OPERATOR_KINDS       := tests/ops/operator_kinds
OPERATOR_KINDS_READY := $(OPERATOR_KINDS)/node_modules/.ready

.DEFAULT_GOAL := help
.PHONY: help setup services checkers demo test chaos verify bench examples docs generate clean

help:
	@echo 'make demo      train a small LSTM with everything on, one minute, in this terminal'
	@echo 'make test      all tests'
	@echo 'make chaos     kill trainers and agents, count what is lost, write docs/reliability.md'
	@echo 'make verify    format, lint, types, import direction, generated files up to date'
	@echo 'make generate  write the generated files anew'
	@echo 'make examples  the worked examples in full, into docs/examples; half an hour'
	@echo 'make docs      the documentation as a site, in site/'
	@echo 'make bench     what the probe and the agent cost on this machine'
	@echo 'make checkers  only what looks over manifests: checkov, and schemas of prometheus-operator'
	@echo 'make setup     only the environment, in $(VENV)'
	@echo 'make clean     remove the environment and what the tools left behind'

setup: $(READY)

# torch goes first and by itself: what it drags in is then settled, and no later resolution replaces it.
$(READY): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'gradwatch needs Python >= 3.11 with venv (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@echo 'setting up $(VENV) with $(PYTHON)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo '  1 of 2: torch, some 200 MB'
	@$(BIN)/python -m pip install --quiet $(TORCH)
	@echo '  2 of 2: gradwatch with all that its tests need, two or three minutes'
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

# RUNLEVEL=1 keeps Debian from starting the daemons: tests start their own, on loopback.
services:
	@if { command -v prometheus && command -v promtool && command -v prometheus-alertmanager && command -v amtool && command -v chromium && command -v chromedriver && command -v npm && ls /usr/lib/postgresql/*/bin/initdb; } >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && [ -e /etc/debian_version ] && command -v apt-get >/dev/null; then \
	  echo 'installing $(SERVICES) by apt'; \
	  { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(SERVICES); } >/dev/null \
	    || echo 'apt could not install $(SERVICES): the tests that need them will say so' >&2; \
	else echo 'not installed: some of $(SERVICES); the tests that need them are skipped'; fi

checkers: $(CHECKOV_READY) $(OPERATOR_KINDS_READY)

$(CHECKOV_READY): tests/ops/checkov-requirements.txt
	@echo 'setting up $(CHECKOV), to look over manifests'
	@test -x $(CHECKOV)/bin/python || $(PYTHON) -m venv $(CHECKOV)
	@$(CHECKOV)/bin/python -m pip install --quiet -r $< && touch $@ \
	  || echo 'pip could not install checkov: the test that needs it will say so' >&2

# Types of prometheus-operator's kinds, published for JavaScript; the versions are those of package-lock.json.
$(OPERATOR_KINDS_READY): $(OPERATOR_KINDS)/package.json $(OPERATOR_KINDS)/package-lock.json
	@if command -v npm >/dev/null; then \
	  echo "setting up $(OPERATOR_KINDS), to look over monitors and rules"; \
	  cd $(OPERATOR_KINDS) && npm ci --silent && touch node_modules/.ready \
	    || echo 'npm could not install the schemas of prometheus-operator: the tests that need them will say so' >&2; \
	else echo 'not installed: npm; the tests of the kinds of prometheus-operator are skipped'; fi

demo: $(READY)
	@$(BIN)/gradwatch demo

test: $(READY) services checkers
	@$(BIN)/python -m pytest -n 2 --dist loadgroup

chaos: $(READY)
	@$(BIN)/python -m tests.chaos.campaign --trainers 200 --agents 100 --write docs/reliability.md

verify: $(READY) services
	@PATH="$(BIN):$$PATH" bash .ci/verify

generate: $(READY)
	@PATH="$(BIN):$$PATH" bash .ci/verify --write

bench: $(READY)
	@set -e; for bench in benchmarks/*.py; do echo "== $$bench"; $(BIN)/python "$$bench"; done

examples: $(READY)
	@set -e; for example in examples/*/*.py; do echo "== $$example"; OMP_NUM_THREADS=1 GRADWATCH_AGENT=0 $(BIN)/python "$$example" --write; done

docs: $(READY)
	@$(BIN)/python -m mkdocs build --strict --site-dir site

clean:
	rm -rf $(VENV) $(CHECKOV) $(OPERATOR_KINDS)/node_modules .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache gradwatch-demo
