# Whetstone. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pipeline's stages call `python`: let it be the environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install repro round summary test test-all chat gateway promote seal bench lint format docs audit lock clean

help: ## List the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

PIP := $(BIN)/python install.py

$(VENV)/installed: requirements.txt requirements-base.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(VENV)/install.log -r requirements.txt
	@$(PIP) $(VENV)/install.log --no-deps -r requirements-base.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-people.txt requirements-quantise.txt
	@$(PIP) $(VENV)/install-dev.log -r requirements.txt -r requirements-dev.txt
	@$(PIP) $(VENV)/install-dev.log --no-deps -r requirements-people.txt -r requirements-quantise.txt
	@touch $@

install: $(VENV)/installed ## Make the environment, and close the project's folders to other users
	@python -c 'from fine_tuning.common.protection import protect; protect()'

repro: $(VENV)/installed ## Run the pipeline on what is new and print the summary
	@python -m fine_tuning sample
	@python -m dvc repro
	@python -m fine_tuning summary

pull: $(VENV)/installed ## Bring data and models from the default DVC remote
	@python -m dvc config core.remote > /dev/null 2>&1 \
	  || { echo "no default remote: \`dvc remote add -d storage ADDRESS\` (docs/teams.md), then again" >&2; exit 1; }
	@python -m dvc pull

round: $(VENV)/installed ## Seal what was said, run the pipeline, commit the result with its verdict
	@python -m fine_tuning round

summary: $(VENV)/installed ## Print the last result again
	@python -m fine_tuning summary

test: $(VENV)/installed-dev ## Run the tests but for the slow end-to-end ones
	@python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m 'not end_to_end'

test-all: $(VENV)/installed-dev ## Run all tests
	@python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

chat: $(VENV)/installed ## Open the chat app; MODEL=base, candidate, live or a version answers new chats
	@WHETSTONE_MODEL="$(MODEL)" python -m streamlit run fine_tuning/integration/streamlit_app.py

gateway: $(VENV)/installed ## Record what other chat clients say
	@python -m fine_tuning gateway

seal: $(VENV)/installed ## Move logged conversations into the data
	@python -m fine_tuning seal

promote: $(VENV)/installed ## Register the candidate and make it champion
	@python -m fine_tuning promote

bench: $(VENV)/installed ## List the benchmarks, which are run by hand
	@for script in benchmarks/[!_]*.py; do echo "python -m benchmarks.$$(basename $$script .py)"; sed -n '1s/"""//gp' $$script; done

lint: $(VENV)/installed-dev ## Check style, types and container files, and that git holds no secret
	@ruff check .
	@ruff format --check .
	@python -m mypy
	@python -m tests.remote_config
	@check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	@check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@hadolint Containerfile

format: $(VENV)/installed-dev ## Put the code in style
	@ruff check --fix .
	@ruff format .

docs: $(VENV)/installed-dev ## Build the manual as a site in site/, its generated blocks anew
	@python -m tests.reference
	@zensical build --strict

remote-%: $(VENV)/installed-dev ## Try a DVC remote here: local, s3, webdav, ssh, http
	@python -m tests.servers $*

audit: $(VENV)/installed-dev ## Look the pinned packages up in the advisory database
	@python -m fine_tuning audit

# torch's own metadata names the CUDA packages that a GPU machine needs; pinning them here would bring gigabytes to
# machines without one.
lock: ## Compile requirements.in and requirements-dev.in
	@uv --version > /dev/null || { echo "uv is missing: python3 -m pip install uv"; exit 1; }
	@set -o pipefail; for name in requirements requirements-dev; do \
	  uv pip compile --quiet --python-version 3.11 --no-annotate --no-header $$name.in \
	    | grep -vE '^(nvidia-|cuda-|triton)' > $$name.lock && mv $$name.lock $$name.txt || exit 1; done

clean: ## Remove the environment and scratch files; data and models stay
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache site
