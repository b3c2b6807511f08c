.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-gpu-versions lint format types docs tiny-wan clean

# Everything runs in this virtual environment, which is made where it is missing.
VENV ?= .venv
ARGS ?=
export PATH := $(abspath $(VENV))/bin:$(PATH)
PACKAGES := pyproject.toml constraints.txt
SCRIPTS := run_train.sh .ci/run scripts/environment scripts/gpu_versions \
	scripts/slurm/train.sbatch scripts/slurm/install_test_cluster scripts/slurm/test_cluster

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/installed: $(PACKAGES)
	@scripts/environment $(VENV) .
	@touch $@

$(VENV)/installed-dev: $(PACKAGES)
	@scripts/environment $(VENV) '.[dev]'
	@touch $(VENV)/installed $@

demo: $(VENV)/installed ## Distil the small Wan into a few-step student; ARGS="--training.steps 20" changes the job
	PYTHON=$(abspath $(VENV))/bin/python ./run_train.sh $(ARGS)

test: $(VENV)/installed-dev ## Run all tests but the nightly ones; ARGS="tests/unit/test_config.py" chooses
	pytest $(ARGS)

test-unit: $(VENV)/installed-dev ## Run the tests that take seconds
	pytest tests/unit

test-gpu-versions: ## Run unit and integration tests with the versions of GPU machines, about 20 minutes
	scripts/gpu_versions

lint: $(VENV)/installed-dev ## Check style of Python and shell
	ruff check .
	ruff format --check .
	shellcheck $(SCRIPTS)

format: $(VENV)/installed-dev ## Format, and mend what can be mended
	ruff check --fix .
	ruff format .

types: $(VENV)/installed-dev ## Check types
	mypy

docs: $(VENV)/installed-dev ## Build the pages of docs/ as a site, in build/site
	python -m sphinx -W --keep-going -n -q docs build/site

tiny-wan: $(VENV)/installed ## Train the small Wan of tests/assets/tiny_wan again, about 2 hours
	python scripts/build_tiny_wan

clean: ## Remove caches and build products, never outputs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
