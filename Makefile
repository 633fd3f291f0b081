# make demo and make test set up all that they need, in this folder.
# Another Python: make test PYTHON=python3.12 (the virtual environment is made with it, once).

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= cuda13,train,test,docs
JOBS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.klif_sj-installed

# The suite runs on both SpikingJelly lines, JOBS processes at a time; this folder on PYTHONPATH is the old one.
OLD_LINE := .sj14
OLD_LINE_INSTALLED := $(OLD_LINE)/.klif_sj-installed

# make matrix runs the quick suite on these Pythons, pyenv's or those on the PATH, with the packages in constraints/.
MATRIX := 3.10 3.12 3.13
QUICK := tests/neuron tests/runtime tests/codegen tests/swap tests/models tests/cli tests/docs/test_package.py
python_of = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)),python$(1))

.PHONY: demo test matrix nvrtc-matrix bench-quick lint docs venv clean

demo: $(INSTALLED)
	$(BIN)/klif-sj compare --out demo

# JOBS processes with one thread each: more threads than cores stall one another.
test: export OMP_NUM_THREADS = 1
test: lint docs $(OLD_LINE_INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS)
	PYTHONPATH=$(CURDIR)/$(OLD_LINE) $(BIN)/python -m pytest -n $(JOBS) -m "not once"

# The compile tests with NVRTC 12.4 to 13.0 and CuPy 13.6 and 14.2, which are fetched into .nvrtc; needs no GPU.
nvrtc-matrix: $(INSTALLED)
	$(BIN)/python tests/nvrtc_matrix.py

matrix: $(MATRIX:%=matrix-%)

matrix-%: export OMP_NUM_THREADS = 1
matrix-%: .matrix/%/.klif_sj-installed
	.matrix/$*/bin/python -m pytest -n $(JOBS) $(QUICK)

bench-quick: $(OLD_LINE_INSTALLED)
	$(BIN)/python benchmarks/run.py --suite all --quick --device cpu --old-line $(OLD_LINE) --out bench-quick
	$(BIN)/python benchmarks/plot.py bench-quick

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages, the API reference and the gallery, to be opened at docs/_build/html/index.html. A warning is an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -E -q -W --keep-going -b html docs docs/_build/html

venv: $(INSTALLED)

$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

.PRECIOUS: .matrix/%/.klif_sj-installed
.matrix/%/.klif_sj-installed: constraints/python%.txt setup.cfg
	test -x $(@D)/bin/python || $(call python_of,$*) -m venv $(@D)
	$(@D)/bin/python -m pip install -c $< -e ".[train,test]"
	touch $@

$(OLD_LINE_INSTALLED): $(INSTALLED)
	rm -rf $(OLD_LINE)
	$(BIN)/python -m pip install --no-deps --target $(OLD_LINE) spikingjelly==0.0.0.0.14
	touch $@

clean:
	rm -rf $(VENV) $(OLD_LINE) .nvrtc .matrix demo klif-sj-compare klif-sj-train bench-quick build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
