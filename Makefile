# `make demo` and `make test` set everything up by themselves on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

KFP := .kfp/.installed
# the image has no tools of tests and no aggregators, whose solvers are under the GPL
IMAGE_EXTRAS := pipelines serve optuna sources transformers vision

.PHONY: install .kfp demo test soak lint format docs lock wheel bench audit

install: $(STAMP)

# bytecode now: where Python may not write it later, each process of Ray would compile torch again
$(STAMP): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode --require-hashes -r requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps -e .
	$(BIN)/python -m compileall -q dmtg_core pipelines
	touch $(STAMP)

# Kubeflow's SDK needs an older protobuf than the lock file has
.kfp: $(KFP)

$(KFP): cluster/kubeflow/requirements.lock $(STAMP)
	test -x .kfp/bin/python || $(PYTHON) -m venv .kfp
	$(BIN)/uv pip install --python .kfp/bin/python --quiet --require-hashes -r cluster/kubeflow/requirements.lock
	touch $(KFP)

demo: install
	$(BIN)/dmtg demo

# what a test has freed goes back to the machine: two long processes would keep gigabytes of it for nothing
test: install $(KFP)
	MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=16777216 $(BIN)/python -m pytest -m "not soak" -n 2 -rs

soak: install $(KFP)
	$(BIN)/python -m pytest -m soak

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# a warning is an error: a dead link, a page that is in no menu, a docstring that cannot be read
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lock:
	$(BIN)/uv pip compile cluster/kubeflow/requirements.in --generate-hashes --no-emit-index-url \
		--python-version 3.11 -o cluster/kubeflow/requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra pipelines --extra dev --generate-hashes --no-emit-index-url \
		--python-version 3.11 -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(IMAGE_EXTRAS)) --constraints requirements.lock \
		--generate-hashes --no-emit-index-url --python-version 3.11 -o cluster/requirements.lock

wheel: install
	$(BIN)/python -m build --wheel --no-isolation

bench: install
	$(BIN)/python -m bench $(ROWS)

# where the database of known vulnerabilities cannot be reached, a few known pins are compared instead
audit: install
	$(BIN)/python -m tests.audit
