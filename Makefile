.DEFAULT_GOAL := help
.PHONY: help install lint format types test-unit test test-gpu-versions tiny-wan train clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Install for development, with the tested versions
	pip install -e ".[dev]" -c constraints.txt

lint: ## Check style of Python and shell
	ruff check .
	ruff format --check .
	shellcheck run_train.sh .ci/run scripts/gpu_versions scripts/slurm/train.sbatch scripts/slurm/install_test_cluster scripts/slurm/test_cluster

format: ## Format, and mend what can be mended
	ruff check --fix .
	ruff format .

types: ## Check types
	mypy

test-unit: ## Run the tests that take seconds
	pytest tests/unit

test: ## Run all tests but the nightly ones
	pytest

test-gpu-versions: ## Run unit and integration tests with the versions of GPU machines, about 20 minutes
	scripts/gpu_versions

tiny-wan: ## Train the small Wan of tests/assets/tiny_wan again, about 2 hours
	python scripts/build_tiny_wan

train: ## Run the main job: distil the small Wan into four steps
	./run_train.sh

clean: ## Remove caches and build products, never outputs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
