# New users need only `make demo` and `make test`; both set up .venv first.
PY := .venv/bin/python
DEMO_ARGS ?=
LAYOUT_ARGS ?=

.PHONY: help setup demo test test-random test-long test-layouts test-hf4 test-versions test-te test-energon test-frameworks lint format unit functional clean clean-venv

help:
	@echo "make demo        digits -> HF checkpoint -> Megatron -> training -> HF -> answers, in demo-out/ (DEMO_ARGS=...)"
	@echo "make test        lint, types, unit and functional tests"
	@echo "make test-random  unit tests with random values, examples and order; prints its seed, SEED=... repeats a run;"
	@echo "                 EXAMPLES=5000 runs only the property tests, with this many examples of each"
	@echo "make test-long   the functional tests that take minutes or gigabytes of disk"
	@echo "make test-layouts  every layout in all variants, all random batches; writes docs/layouts.md unless LAYOUT_ARGS=--check"
	@echo "make test-hf4    checkpoints saved and loaded by transformers 4.57, in .venv-hf4"
	@echo "make test-versions  a selection of the tests with the oldest and the newest supported versions; two venvs of 5 GB"
	@echo "make test-te     the Transformer Engine backend without a GPU, its compiled extension replaced; in .venv-te. All its"
	@echo "                 layouts: .venv-te/bin/python -m tests.te.write_layouts, which writes them to docs/layouts.md"
	@echo "make test-energon  conversations read by Megatron Energon, in .venv-energon"
	@echo "make test-frameworks  peft (its adapters read, written and merged), mbridge and verl, in .venv-frameworks"
	@echo "make lint        ruff and mypy              make format      reformat and fix with ruff"
	@echo "make unit        unit tests                 make functional  functional tests"
	@echo "make clean       remove generated files     make clean-venv  also remove the venvs"

setup:
	@ci/setup.sh

demo: setup
	$(PY) -m megatron_vlbridge.demo $(DEMO_ARGS)

# The stages are lines of one recipe, cheapest first: it stops at the first failure, also with `make -j` and `make -k`.
test: setup
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory unit
	@$(MAKE) --no-print-directory functional

# `make test` is deterministic. This is deterministic only for a given SEED.
test-random: setup
	@seed=$${SEED:-$$(date +%s)}; echo "make test-random SEED=$$seed"; \
	PYTHONHASHSEED=$$((seed % 4294967296)) $(PY) -m pytest tests/unit --hypothesis-seed=$$seed -n logical \
	    --dist loadfile $(if $(EXAMPLES),-m "hypothesis and not layouts" --examples=$(EXAMPLES),-m "not layouts")

test-long: setup
	$(PY) -m pytest tests/functional -m long

test-layouts: setup
	$(PY) -m tests.functional.write_layouts $(LAYOUT_ARGS)
	$(PY) -m pytest tests/unit tests/functional -m layouts -n 2 --dist loadfile

test-hf4: setup
	@ci/setup_hf4.sh
	.venv-hf4/bin/python -m pytest tests/hf4 -n 2

test-versions:
	ci/versions.sh

test-te: setup
	@ci/setup_te.sh
	.venv-te/bin/python -m pytest tests/te -m "not layouts" -n 2 --dist loadfile --no-loadscope-reorder

test-energon: setup
	@ci/setup_energon.sh
	.venv-energon/bin/python -m pytest tests/energon -n 2

test-frameworks: setup
	@ci/setup_frameworks.sh
	.venv-frameworks/bin/python -m pytest tests/frameworks -n 2

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

unit: setup
	$(PY) -m pytest tests/unit -m "not layouts" -n logical --dist loadfile

functional: setup
	$(PY) -m pytest tests/functional -m "not long and not layouts" -n 2 --dist loadfile

clean:
	rm -rf build dist *.egg-info demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

clean-venv: clean
	rm -rf .venv .venv-hf4 .venv-te .venv-energon .venv-frameworks .venv-oldest .venv-newest
