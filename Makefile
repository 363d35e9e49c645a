# Whetstone. `make help` lists what there is.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The pipeline's stages call `python`: let it be the environment's.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: help install repro pull round summary chat gateway seal promote clean

help: ## List the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

PIP := $(BIN)/python install.py

$(VENV)/installed: requirements.txt requirements-base.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(VENV)/install.log -r requirements.txt
	@$(PIP) $(VENV)/install.log --no-deps -r requirements-base.txt
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

chat: $(VENV)/installed ## Open the chat app; MODEL=base, candidate, live or a version answers new chats
	@WHETSTONE_MODEL="$(MODEL)" python -m streamlit run fine_tuning/integration/streamlit_app.py

gateway: $(VENV)/installed ## Record what other chat clients say
	@python -m fine_tuning gateway

seal: $(VENV)/installed ## Move logged conversations into the data
	@python -m fine_tuning seal

promote: $(VENV)/installed ## Register the candidate and make it champion
	@python -m fine_tuning promote

clean: ## Remove the environment and scratch files; data and models stay
	@rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis .cache site

# For work on Whetstone itself. A project that `python -m fine_tuning new` made has none of it.
-include .ci/targets.mk
