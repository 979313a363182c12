# Two commands for a fresh machine: `make quickstart` and `make test`. Both build .venv first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: quickstart test lint types clean

# The stamp is newer than pyproject.toml exactly when the environment holds what it asks for.
$(VENV)/.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

.PHONY: .venv
.venv: $(VENV)/.stamp

quickstart: .venv
	$(BIN)/autotune profile --quick
	$(BIN)/autotune search recipes/quickstart.toml
	$(BIN)/autotune run recipes/quickstart.toml

lint: .venv
	$(BIN)/ruff check autotune tests
	$(BIN)/ruff format --check autotune tests

types: .venv
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not alone"
	$(BIN)/python -m pytest -m alone

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
