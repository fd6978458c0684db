# Two commands matter: `make quickstart` and `make test`. Both set themselves up in .venv the first time.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Bytecode is kept: commands that tests start read the same modules again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
# A process a core, and each test file in one process: files share what they compile. In the order of tests/conftest.py:
# by number of tests, a file of one long test would run last, beside nothing.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test check slow test-cuda golden docs lock clean

quickstart: $(STAMP)  ## train a small transformer on 8 fake devices
	@$(BIN)/trellax train configs/quickstart.toml

test: check  ## linters, types and the fast tests: what CI runs
	@$(PYTEST) -q $(PARALLEL)

check: $(STAMP)  ## format, lint, types and the import contract
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	@$(BIN)/lint-imports

slow: $(STAMP)  ## every test, the slow ones too
	@$(PYTEST) -q $(PARALLEL) -m ""

test-cuda: $(STAMP)  ## compile for GPUs that are not there; skipped without the extra `cuda`
	@$(PYTEST) -q -m cuda

golden: $(STAMP)  ## rewrite tests/golden from what the code says now; read the diff
	@GOLDEN=1 $(PYTEST) -q $(PARALLEL)
	@git --no-pager diff --stat -- tests/golden

docs: $(STAMP)  ## build the documentation into site/, every warning an error
	@$(BIN)/python -c 'import material, mkdocstrings_handlers.python' 2>/dev/null || $(PIP) -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html; its search needs a server: python3 -m http.server --directory site"

lock: $(STAMP)  ## resolve requirements.lock anew for every supported Python
	@$(PIP) uv
	@head -n 1 requirements.lock > $(VENV)/lock.head
	@$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --extra dev --no-annotate --no-header \
	  pyproject.toml --output-file $(VENV)/lock.body > /dev/null
	@cat $(VENV)/lock.head $(VENV)/lock.body > requirements.lock

clean:  ## remove what was built here, but no run
	rm -rf $(VENV) .cache dist build site

# Where Python comes without ensurepip (Debian), the machine's own pip fills the new environment.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "trellax needs Python 3.11 or newer, and '$(PYTHON)' is not. Fix: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "Setting up $(VENV) (once, a minute or two) ..."
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --without-pip --clear $(VENV) && \
	    $(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip; }
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps -e .
	@touch $@
