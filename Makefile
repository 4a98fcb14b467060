# Everything a fresh machine needs: `make demo` or `make test`. PYTHON may name another interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VIEW_PARTS := drafters verifiers kernels cli analysis

.PHONY: demo test test-fast check bench format clean install model

demo: model
	$(BIN)/specdec bench --limit 8 --max-new-tokens 48 --drafter ngram --drafter hybrid

# One process per core, one file at a time each.
test: model
	$(BIN)/pytest -n logical --dist loadfile

# For daily work: about a minute, without the model.
test-fast: install
	$(BIN)/pytest -m "not slow"

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory types

.PHONY: types
types: install view
	MYPYPATH=.view $(BIN)/mypy --strict -p specdec

# mypy does not follow the package mapping of pyproject.toml: it gets a view of symbolic links instead.
.PHONY: view
view:
	@mkdir -p .view/specdec
	@for f in specdec/*; do ln -sfn ../../$$f .view/specdec/$$(basename $$f); done
	@for p in $(VIEW_PARTS); do ln -sfn ../../$$p .view/specdec/$$p; done
	@find .view -xtype l -delete

bench: model
	$(BIN)/specdec bench --output benchmarks/cpu-float32.json

# About an hour on a machine that does nothing else.
.PHONY: workloads
workloads: model
	$(BIN)/python benchmarks/workloads.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: install
	$(BIN)/specdec models fetch smollm2-135m

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "specdec needs Python 3.11 or newer; name one with make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv .view build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
