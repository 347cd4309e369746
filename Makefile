# make demo   install into .venv, convert the embedded teacher, show teacher beside student
# make test   the test suite (CPU)          make lint   ruff and mypy
# Needs Python >= 3.10, git and make; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo-out
# About three minutes of training on two cores: enough to see each stage work, far too little for a good model.
BUDGET ?= context=512 align.tokens=250k align.batch_tokens=2048 finetune.tokens=60k finetune.batch_tokens=2048
SAMPLE := --prompt 'def read_file(path):' --temperature 0.7 --seed 1 --max-new-tokens 60 --dtype float32
TEST_JOBS ?= 2
EXTRAS ?= test,dev
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INPUTS := pyproject.toml setup.py constraints.txt

.PHONY: demo test lint install clean help
.DELETE_ON_ERROR:

help:
	@sed -n '1,3s/^# //p' Makefile

install: $(VENV)/.installed

# A broken .venv (Debian without python3-venv leaves one) is removed, so that the next try starts anew.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "linearize needs Python >= 3.10 and found: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12" >&2; exit 2; }
	@test -e $(VENV) && old=1 || old=; $(PYTHON) -m venv $(VENV) || { test -n "$$old" || rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed. On Debian and Ubuntu: sudo apt-get install python3-venv. Then run make again." >&2; exit 2; }
	@touch $@

$(VENV)/.installed: $(INPUTS) | $(VENV)/.created
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(VENV)/.created
	$(PIP) install --quiet --progress-bar off -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	@if [ -f $(OUT)/linearize.json ]; then rm -rf $(OUT); fi
	$(BIN)/linearize convert demo $(OUT) --recipe lolcats --data demo $(BUDGET)
	$(BIN)/linearize audit $(OUT) --against demo --data demo --context 512 --dtype float32
	@echo; echo 'The teacher continues a prompt:'
	@$(BIN)/linearize generate demo $(SAMPLE)
	@echo; echo 'The student continues the same prompt:'
	@$(BIN)/linearize generate $(OUT) $(SAMPLE)
	@echo 'Up to 128 tokens a lolcats layer is all window, so short texts tell the two apart by rounding alone.'
	@echo; echo 'This is a toy budget (250k tokens of alignment, 60k of finetuning); the measured recipes are in README.md.'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	@if [ -f $(OUT)/linearize.json ]; then rm -rf $(OUT); fi
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
