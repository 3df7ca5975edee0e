# Every target builds `.venv` first when it is missing or older than the requirements.
# Another interpreter: `make venv PYTHON=/path/to/python3.12` (Python 3.11 or 3.12).

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.requirements-installed
CANDIDATES := $(PYTHON) python3.12 python3.11 python3

# The packages are used from the checkout, so that scripts in experiments/ find them uninstalled.
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := test
.PHONY: venv demo test test-all lint clean

venv: $(STAMP)

demo: $(STAMP)
	$(VENV_PYTHON) experiments/demo.py

test: $(STAMP)
	$(VENV_PYTHON) -m pytest -m "not slow"

test-all: $(STAMP)
	$(VENV_PYTHON) -m pip install --quiet --requirement requirements-parity.txt
	$(VENV_PYTHON) -m pytest

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate is run, not just looked up: version managers leave launchers behind that only fail.
# An existing .venv is kept and brought up to date, unless its own interpreter no longer runs.
$(STAMP): requirements.txt requirements-dev.txt
	@if ! $(VENV_PYTHON) -c "" 2>/dev/null; then \
	  for candidate in $(CANDIDATES); do \
	    if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	        >/dev/null 2>&1; then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "make: no working Python 3.11 or 3.12 among: $(CANDIDATES); install one, or name it: make venv PYTHON=/path/to/python3.12" >&2; \
	    exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$python ($$($$python --version))"; \
	  $$python -m venv --clear $(VENV); \
	fi
	$(VENV_PYTHON) -m pip install --quiet --requirement requirements-dev.txt
	@touch $@
