# make demo: train, transfer and draw on bundled digits (1 to 3 minutes).
# make test: lint, types, arrows, spelling, documentation and tests (10 to 40
# minutes).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long docs torch browser dist clean

demo: $(VENV)/.run
	$(BIN)/python train.py --config=configs/digits_source.py \
	  --workdir=runs/demo/source
	$(BIN)/python -m l2t_jax.table --config=configs/digits.py \
	  --methods=scratch,fm_one_to_one,l2t_ww --seeds=3 --reference=scratch \
	  --workdir=runs/demo

test: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(MAKE) docs
	$(BIN)/pytest

# What takes long: a run that is disturbed 20 times, several processes, every
# code block of the documentation, the examples, 2,000 iterations.
test-long: $(VENV)/.dev
	$(BIN)/pytest -m "long or soak"

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Optional: torch, for the tests that compare with it or convert its networks.
torch: $(VENV)/.run
	$(BIN)/pip install --quiet torch==2.13.0 torchax==0.0.14.dev20261026

# Optional, on Debian as root: a browser, for the tests of the report.
browser:
	apt-get update -qq
	apt-get install -y -qq chromium chromium-driver

$(VENV)/.run: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"error: {sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	@touch $@

# A source distribution and a wheel, in dist/.
dist: $(VENV)/.run
	$(BIN)/pip install --quiet -c requirements-dev.txt build
	$(BIN)/python -m build --outdir=dist

# Everything that is made here but the runs.
clean:
	rm -rf $(VENV) build dist *.egg-info .*_cache .hypothesis site
