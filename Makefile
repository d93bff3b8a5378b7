# The two commands of the README: each installs what it needs into .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint install wheel clean

quickstart: .venv/.installed
	$(BIN)/cartl-hub quickstart

test: .venv/.installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: .venv/.installed

wheel: .venv/.installed-test
	$(BIN)/python -m build --wheel --outdir dist .

.venv/bin/uv:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade uv

.venv/.installed: pyproject.toml | .venv/bin/uv
	@echo "Installing into .venv: up to 6 GB, of which torch is the most"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e .
	@touch $@

.venv/.installed-test: pyproject.toml | .venv/bin/uv
	@echo "Installing into .venv, with what the tests need: up to 6 GB"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e ".[test]"
	@touch $@ .venv/.installed

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
