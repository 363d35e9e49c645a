# Targets for work on Whetstone itself; the Makefile includes them.
.PHONY: test test-all bench lint format docs audit lock

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-people.txt requirements-quantise.txt
	@$(PIP) $(VENV)/install-dev.log -r requirements.txt -r requirements-dev.txt
	@$(PIP) $(VENV)/install-dev.log --no-deps -r requirements-people.txt -r requirements-quantise.txt
	@touch $@

test: $(VENV)/installed-dev ## Run the tests but for the slow end-to-end ones
	@python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m 'not end_to_end'

test-all: $(VENV)/installed-dev ## Run all tests
	@python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

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
