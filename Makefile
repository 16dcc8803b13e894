# `make` lists the targets. `make run` needs nothing but Python; `make test` is what CI runs.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# OpenMP threads that spin while they wait starve the other processes of a small machine.
export OMP_WAIT_POLICY = PASSIVE
# Half of all modules: compiled where one is imported.
SELDOM := /(tests|transformers/models|databricks|fontTools|google|mypy|mypyc|pip|scipy|sklearn|trl)/

.PHONY: help run demo-support test lint format test-faults test-images test-cluster test-apiserver test-gpu-dry test-serving test-newest dev

##@ General
help: ## Show this help
	@awk 'BEGIN { FS = ":.*## "; print "Usage: make TARGET" } \
		/^##@/ { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: .venv/installed ## Run the whole pipeline on a tiny model, on this machine
	@$(BIN)/canvastune demo

demo-support: .venv/installed ## Run it on a support desk's answers: prose, some with a tool
	@$(BIN)/canvastune demo support

##@ Development
test: lint ## Run the linters and the tests, as CI does
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed ## Check code style, imports, types, spelling, prose and YAML
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/codespell
	@$(BIN)/yamllint --strict .
	@$(BIN)/python -m tools.prose
	@$(BIN)/mypy -n 2

format: .venv/installed ## Format the code and apply ruff's safe fixes
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

dev: ## Install the exact versions of requirements-dev.txt into .venv
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch .venv/installed

##@ Slow tests
test-faults: .venv/installed ## Kill, freeze and preempt runs on up to 8 ranks; write docs/reliability.md
	@$(BIN)/python -m pytest -m slow
	@$(BIN)/python -m tools.faults

test-images: .venv/installed ## Build and run the images; start Docker if it is not running
	@$(BIN)/python -m tools.images

test-apiserver: .venv/installed ## Check chart, launcher and upload against the API server in KUBEBUILDER_ASSETS
	@$(BIN)/python -m tools.apiserver $(OPTIONS)

test-gpu-dry: .venv/installed ## Count what training steps of the released model ask of 8 GPUs, without one
	@$(BIN)/python -m tools.gpu_dry_run $(OPTIONS)

test-serving: .venv/installed ## Try the tiny run's model with mlx-vlm on this CPU, over HTTP; OPTIONS="mlx transformers vllm"
	@$(BIN)/python -m tools.serving $(OPTIONS)

test-newest: .venv/installed ## Run the tests with the newest libraries that resolve; OPTIONS="-- TESTS"
	@$(BIN)/python -m tools.newest $(OPTIONS)

test-cluster: .venv/installed ## Test chart and pipeline on the cluster in KUBECONFIG; OPTIONS=--keep and others
	@$(BIN)/python -m tools.cluster $(OPTIONS)

# Renewed when pyproject.toml changes.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "canvastune needs Python 3.11 or newer: make run PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing torch, transformers, kfp and mlflow into .venv: minutes, once"
	@# Older ones take a minute longer to choose the versions.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile 'pip>=25'
	@$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]'
	@# Byte code by all cores, of what is imported most; pip uses one. Some files are templates.
	@$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' .venv/lib || true
	@touch $@
