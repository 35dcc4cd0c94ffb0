# Everything runs in an environment of its own, $(VENV), that the first target to need it makes.
# Wanted beforehand: Python >= 3.10 (3.11 for torch 2.15), make, g++.
#
# torch is installed first, by itself and pinned: left to the package's "torch>=2.13", pip picks the newest build there
# is, which on Linux brings gigabytes of CUDA libraries that nothing here uses. Where pip can see a CPU build of the
# pinned version (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL), it prefers that one. To use another torch, or your own environment:
#     make test TORCH=torch==2.15.0 TORCHVISION= TRITON=  (which brings its own Triton)
#     make test TORCH=wheels/torch-2.13.0+cpu-cp312-cp312-linux_x86_64.whl
#     make test TORCH= TORCHVISION= TRITON= TRANSFORMERS= VENV=my-environment
PYTHON ?= python3
TORCH ?= torch==2.13.0
# What goes with it, for tests: torchvision and transformers, whose models this package serves, and Triton. Empty,
# TORCHVISION=, TRANSFORMERS= and TRITON= keep what is there (a Triton-CPU, for one), or do without: tests that need it are
# skipped.
# torchvision comes without what it depends on, since pip would exchange torch for a build that it likes better.
TORCHVISION ?= torchvision==0.28.0
TRITON ?= triton==3.7.1
TRANSFORMERS ?= transformers==5.24.0
VENV ?= .venv

PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PIP := $(PY) -m pip install --disable-pip-version-check --quiet
# Stamps: the environment holds what pyproject.toml asked for when they were touched, and these four.
READY := $(VENV)/.ready-$(shell printf '%s' '$(TORCH) $(TORCHVISION) $(TRITON) $(TRANSFORMERS)' | cksum | cut -d ' ' -f 1)
PERF_READY := $(READY)-perf
DOCS_READY := $(READY)-docs

.DEFAULT_GOAL := help
.PHONY: help env demo train test test-all compat lint doctor perf docs dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## make the environment, or bring it up to date

demo: $(READY) ## a small network over a photograph: eager, compiled, and as a package on disk
	$(PY) examples/demo.py $(ARGS)

train: $(READY) ## train a deformable and a plain network on warped digits
	$(PY) examples/train.py $(ARGS)

# As many processes as cores, but at most 4: each takes up to 2 GB, part of it for compilers that it runs. A file's tests
# run in one of them, since they share what is compiled for the file; the order of files is that of tests/conftest.py.
# Each behaviour is tested once, with C++ that is not optimized, which compiles in half of the time.
test: $(READY) ## run the tests, in 8 to 20 minutes on two cores; ARGS="-n 0 -k nms" for some in one process
	$(PYTEST) -m "not slow" $(ARGS)

# All kinds of a behaviour, kernels as users get them and under sanitizers, more examples, clang, whole models.
test-all: $(READY) ## run everything that CI does, in half an hour on two fast cores
	$(PYTEST) --hypothesis-profile many $(ARGS)

# What depends on private parts of torch, and templates of each kind.
COMPAT := tests/test_import.py tests/test_explain.py tests/test_export.py tests/integrations/test_torchvision.py \
	tests/lowering/installation tests/lowering/workarounds $(addprefix tests/lowering/common/test_,registry.py cache_key.py \
	tuning.py template.py constants.py) $(addprefix tests/lowering/,test_nms.py test_regions.py test_deform_conv2d.py \
	$(addprefix passes/test_,depthwise_separable.py affine_maps.py concatenations.py)) tests/test_target.py \
	tests/integrations/test_models.py tests/integrations/test_transformers.py tests/integrations/test_one_image.py

compat: $(READY) ## a cross-section of the tests, for another torch: see docs/architecture.md
	$(MAKE) test ARGS="$(COMPAT) $(ARGS)"

# C++ of kernels, their tests and examples.
CPP := $(wildcard $(addsuffix /*.h,lowering/cpp tests/lowering/cpp tests/support) $(addsuffix /*.cpp,tests/lowering/cpp examples/cpp))

lint: $(READY) ## style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

doctor: $(READY) ## is this machine set up to run compiled kernels fast?
	$(PY) -m inductor_vision.doctor $(ARGS)

perf: $(PERF_READY) ## run the benchmarks; ARGS=--help says what there is
	$(PY) -m inductor_vision.perf $(ARGS)

docs: $(DOCS_READY) ## build docs/ and the API reference into out/docs; warnings are errors
	$(PY) -m sphinx --builder html --fail-on-warning --keep-going --quiet --doctree-dir out/doctrees docs out/docs

# Old builds go first: setuptools puts what it finds in build/ into the wheel. The wheel is built from the sdist.
dist: $(READY) ## build the sdist and the wheel into dist
	rm -rf build dist
	$(PY) -m build --no-isolation

clean: ## remove the environment and everything that was made
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(f"Python >= 3.10 is needed, {sys.executable} is {sys.version.split()[0]}; say which to use with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(READY): pyproject.toml | $(PY)
	$(if $(TORCH),$(PIP) $(foreach word,$(TORCH),'$(word)'))
	$(if $(TRITON),$(PIP) $(foreach word,$(TRITON),'$(word)'))
	$(if $(TORCHVISION),$(PIP) --no-deps $(foreach word,$(TORCHVISION),'$(word)'))
	$(if $(TRANSFORMERS),$(PIP) $(foreach word,$(TRANSFORMERS),'$(word)'))
	$(PIP) -e '.[test,examples]'
	@rm -f $(VENV)/.ready-* && touch $@

$(PERF_READY): pyproject.toml $(READY)
	$(PIP) -e '.[perf]'
	@touch $@

$(DOCS_READY): pyproject.toml $(READY)
	$(PIP) -e '.[docs]'
	@touch $@
