# Two commands do everything from a bare clone: `make train` (the main job) and `make test`.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= train,math,code,bench,dev
# TORCH_INDEX=<url> takes torch from another wheel index (a CUDA or ROCm one, say).
TORCH_INDEX ?=
# make train NPROC=2 RUN=runs/two ARGS="--run.seed 1"; ARGS=--resume goes on with a run that was cut off.
RUN ?= runs/sums
NPROC ?= 1
ARGS ?=
LAUNCH := $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))
STAMP := $(VENV)/.installed

.PHONY: setup train compare countdown test nightly hostile test-integrations lint matrix bench bench-report csrc clean

setup: $(STAMP)

# torch first, pinned: with none installed, an open range would pull gigabytes of another build.
$(STAMP): constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

train: setup
	$(LAUNCH) -m flowrl_kernels.trainer configs/sums.toml --run.dir $(RUN) $(ARGS)

# FlowRL, GRPO, PPO and REINFORCE++ one after the other, then one table and one plot.
compare: setup
	$(PY) -m flowrl_kernels.trainer compare configs/sums.toml --out runs/compare $(ARGS)

countdown: setup
	$(LAUNCH) -m flowrl_kernels.trainer configs/countdown.toml --run.dir runs/countdown $(ARGS)

test: setup lint
	$(PY) -m pytest -n 2

# What is too long for every push: the tests marked so.
nightly: setup lint
	$(PY) -m pytest -n 2 -m nightly

# 2,000 programs that mean harm, each with a second to do it. HOSTILE="--seed 3" runs others.
hostile: setup
	$(PY) -m tests.sandbox.run_hostile --programs 2000 --workers 4 --deadline 1 $(HOSTILE)

# pip, in the environment that is being made: patient, and once more after a broken download.
define PIP
for i in 1 2 3; do $(@D)/bin/python -m pip --retries 10 --timeout 180 install -q --disable-pip-version-check $(1) && exit 0; sleep 10; done; exit 1
endef

# The trainers' own environments, for their pins exclude each other: torch first, then what the constraints file lists.
.venv-%/.installed: constraints-%.txt constraints.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call PIP,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt))
	$(call PIP,-r $<)
	$(call PIP,--no-deps -e .)
	touch $@

TRAINERS := trl verl torchtitan

test-integrations: $(TRAINERS:%=.venv-%/.installed)
	for t in $(TRAINERS); do HF_HUB_OFFLINE=1 .venv-$$t/bin/python -m pytest tests/integrations -rs --environment $$t || exit 1; done

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Every peer that PY can import takes part; docs/benchmarks.md says how to make an environment with more of them.
bench: setup
	$(PY) -m benchmarks $(BENCH)
	$(PY) -m benchmarks end-to-end

# docs/benchmarks.md from the committed JSON
bench-report: setup
	$(PY) -m benchmarks report

# every kernel, flag and architecture under the pinned triton and its neighbours; rewrites the committed table
matrix: setup
	$(PY) -m tests.compile_matrix --write
	for v in 3.6.0 3.9.0; do \
	  test -d $(VENV)-triton-$$v || $(PY) -m pip install -q --no-deps --target $(VENV)-triton-$$v triton==$$v || exit 1; \
	  PYTHONPATH=$(VENV)-triton-$$v $(PY) -m tests.compile_matrix --write || exit 1; \
	done

# The CUDA library, in place; needs nvcc, and neither a GPU nor the virtual environment.
csrc:
	$(PYTHON) csrc/build.py

clean:
	rm -rf $(VENV) $(VENV)-triton-* $(TRAINERS:%=.venv-%) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
