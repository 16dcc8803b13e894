# make run: everything on a tiny model, from nothing but Python.   make test: what CI runs.
# make test-faults: what takes minutes: every layout of 8 ranks, and kills, hangs and preemptions at length (writes docs/reliability.md).
# make test-images: the images, on a Docker engine that it starts where none runs (docs/verification.md).
# make test-cluster: chart, pipeline and a killed pod on the cluster in KUBECONFIG; OPTIONS='--keep' and others (docs/verification.md).
PYTHON ?= python3
BIN := .venv/bin
# OpenMP threads that spin while they wait starve the other processes of a small machine.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: run test test-faults test-images test-cluster lint
run: .venv/installed
	@$(BIN)/canvastune demo

test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-images: .venv/installed
	@$(BIN)/python -m tools.images

test-cluster: .venv/installed
	@$(BIN)/python -m tools.cluster $(OPTIONS)

test-faults: .venv/installed
	@$(BIN)/python -m pytest -m slow
	@$(BIN)/python -m tools.faults

lint: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Renewed when pyproject.toml changes.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "canvastune needs Python 3.11 or newer: make run PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch, transformers, kfp and mlflow into .venv: minutes, once"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
