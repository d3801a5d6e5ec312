# make help lists the targets. Each creates .venv, installs what it needs at the versions of constraints.txt, and does its
# job; a second run starts at once. C++ and build files that change are compiled again, Python files need nothing.

PYTHON ?= python3
ENV := .venv/bin
# A file goes to one worker whole, for what its tests share; tests/conftest.py says which files come first.
PYTEST := OMP_NUM_THREADS=1 $(ENV)/pytest tests --numprocesses auto --maxprocesses 4 --dist loadfile \
  --no-loadscope-reorder --durations 10
SOURCES := pyproject.toml constraints.txt CMakeLists.txt ddfast/__init__.py $(shell find csrc -type f)

# Threads that wait must not spin: other processes may share the cores.
export OMP_WAIT_POLICY ?= passive
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all lint types wheel bench gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' Makefile

demo: .venv/installed-demo  ## both bundled teachers: 21,000 pairs, a student, its one-step pictures and figures, and the exported file
	$(ENV)/ddfast pairs --teacher digits-var --num 21000 --out demo/var/pairs
	$(ENV)/ddfast pairs --teacher digits-llamagen --num 21000 --out demo/llamagen/pairs
	@echo "Training both students, on a core each; that of digits-llamagen writes to demo/llamagen/train.log"
	@export OMP_NUM_THREADS=1; \
	$(ENV)/ddfast train --teacher digits-llamagen --pairs demo/llamagen/pairs --out demo/llamagen/student > demo/llamagen/train.log 2>&1 & \
	$(ENV)/ddfast train --teacher digits-var --pairs demo/var/pairs --out demo/var/student \
	  && wait $$! && tail -n 1 demo/llamagen/train.log || { kill $$! 2> /dev/null; tail demo/llamagen/train.log; exit 1; }
	$(ENV)/ddfast digits eval --student demo/var/student --student demo/llamagen/student
	@set -e; for family in var llamagen; do \
	  $(ENV)/ddfast sample --student demo/$$family/student --compare --out demo/$$family/compare.png; \
	  rm -rf demo/$$family/onnx; \
	  $(ENV)/ddfast export --student demo/$$family/student --to onnx --out demo/$$family/onnx; \
	  $(ENV)/ddfast run demo/$$family/onnx --classes 0-9 --num 40 --out demo/$$family/exported.png; \
	done

test: .venv/installed-test  ## the tests, but for slow ones whose kind others cover
	$(PYTEST) -m "not slow"

test-all: .venv/installed-test  ## all tests, as .ci/run runs them
	$(PYTEST)

lint: .venv/installed-lint  ## ruff: errors and formatting
	$(ENV)/ruff check .
	$(ENV)/ruff format --check .

types: .venv/installed-lint  ## mypy, strict
	$(ENV)/mypy

wheel: .venv/python-ready  ## dist/ddfast-*.whl
	$(ENV)/pip wheel --quiet --no-deps --wheel-dir dist .

bench: .venv/installed-bench  ## every benches/bench_*.py; figures go to benches/results
	@set -e; for bench in benches/bench_*.py; do echo "$$bench"; $(ENV)/python "$$bench"; done

# Nothing is installed: PYTHON has torch for CUDA, Triton, pytest and pybind11 already, and cmake finds nvcc. What does
# not compile is reported at the end and keeps nothing else from running.
gpu:  ## on a machine with an NVIDIA GPU: its tests and benches; figures go to benches/results/gpu-NAME.json
	@$(PYTHON) -c 'import importlib.util as u, sys; sys.exit(None if u.find_spec("torch") and __import__("torch").cuda.is_available() else "make gpu needs a CUDA device, and torch that sees it: $(PYTHON) has none")'
	cmake -S . -B build/gpu $(if $(shell command -v ninja),-G Ninja) -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  -DDDFAST_CUDA_ARCHITECTURES="$$($(PYTHON) -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())')"
	cmake --build build/gpu --parallel || echo "does not compile: going on without what is missing" >&2
	PYTHONPATH=$(CURDIR)/build/gpu/python $(PYTHON) benches/gpu.py $(GPU_FLAGS)

clean:  ## remove .venv and everything built
	rm -rf .venv build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

EXTRAS_demo := [train,export]
EXTRAS_test := [test,bench]
EXTRAS_bench := [test,bench]

.venv/installed-%: .venv/python-ready $(SOURCES)
	@echo "Installing ddfast$(EXTRAS_$*) into .venv"
	@if ! $(ENV)/python -c 'from sysconfig import get_path; open(get_path("include") + "/Python.h")' 2> /dev/null; then \
	  echo "Python.h is missing, so the slower torch code is used: for C++, apt install python3-dev and make clean" >&2; \
	  export SKBUILD_WHEEL_CMAKE=false; \
	fi; $(ENV)/pip install --quiet --editable '.$(EXTRAS_$*)'
	@touch $@

# The extra lint, without building ddfast again.
.venv/installed-lint: .venv/installed-test
	$(ENV)/pip install --quiet ruff mypy
	@touch $@

.venv/python-ready:
	@missing() { echo "$$1 is missing: on Debian or Ubuntu, apt install $$2" >&2; exit 1; }; \
	command -v $(PYTHON) > /dev/null || missing $(PYTHON) "python3 python3-venv"; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || missing "Python 3.10 or later" "python3.11 python3.11-venv, then: make PYTHON=python3.11"; \
	$(PYTHON) -c 'import venv, ensurepip' 2> /dev/null || missing "Python's venv" "python3-venv"; \
	for cxx in $$CXX c++ g++ clang++ none; do command -v "$$cxx" > /dev/null && break; done; \
	test "$$cxx" != none || missing "a C++ compiler" "g++"
	@$(PYTHON) -m venv .venv
	@touch $@
