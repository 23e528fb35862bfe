# Each target is one command a person can run. `make demo` and `make test` set everything up by themselves.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
STUDY ?= recipes/study_ablation.yaml
BIN := $(VENV)/bin
ENV := OMP_NUM_THREADS=1 HF_HUB_DISABLE_TELEMETRY=1 PATH="$(abspath $(BIN)):$$PATH"

.PHONY: setup demo study test test-lowest test-processor test-wheel wheel slurm-test slurm-rounds faults elastic sweep hostile \
	slurm-packages lint format clean

setup: $(VENV)/.runtime

# A Debian python without ensurepip makes the environment in two steps, through the system's pip.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || \
		{ rm -rf $(VENV) && $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } || \
		{ rm -rf $(VENV); echo "error: no venv and no pip for $(PYTHON). Install python3-venv, or set PYTHON to one that has pip"; exit 2; }

$(VENV)/.runtime: requirements.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once; minutes, depending on the network)"
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.dev: requirements.txt requirements-dev.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once; minutes, depending on the network)"
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@ $(VENV)/.runtime

demo: $(VENV)/.runtime
	$(ENV) deepspeed --num_gpus 2 trainer/run.py --ds_config ds_configs/cpu_debug.json \
		--recipe recipes/demo_projected.yaml --phase all --out $(RUN)

# A grid of recipe variants over seeds; the same command goes on after a stop. make study STUDY=recipes/study_baselines.yaml
study: $(VENV)/.runtime
	$(ENV) python -m trainer.study $(STUDY) --out runs/$(basename $(notdir $(STUDY)))

# Spread by file over the cores, the folders in their order: what starts ranks or a cluster begins, and many short tests end it.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev
	$(ENV) python -m pytest $(SPREAD) --durations 20 tests

# tests/unit with the lowest versions that requirements.txt allows, in an environment of its own. PyPI's torch is the CUDA
# build: about 5 GB. A line like "timm>=1.0.31,<2" becomes the constraint "timm==1.0.31".
LOWEST ?= build/lowest
test-lowest:
	$(PYTHON) -m venv $(LOWEST)
	sed -nE 's/^([a-z_]+)>=([0-9.]+).*/\1==\2/p' requirements.txt > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install -q -r requirements-dev.txt -c $(LOWEST)/constraints.txt
	OMP_NUM_THREADS=1 HF_HUB_DISABLE_TELEMETRY=1 PATH="$(abspath $(LOWEST)/bin):$$PATH" \
		$(LOWEST)/bin/python -m pytest tests/unit

# What compares figures, as on a processor without AVX-512: CAPABILITY is default (no AVX) or avx2, ISA is SSE41 or AVX2.
CAPABILITY ?= default
ISA ?= SSE41
test-processor: $(VENV)/.dev
	$(ENV) ATEN_CPU_CAPABILITY=$(CAPABILITY) ONEDNN_MAX_CPU_ISA=$(ISA) MKL_ENABLE_INSTRUCTIONS=AVX2 python -m pytest \
		tests/unit tests/integration/test_reuse_launches.py tests/integration/test_expert_parallel.py

# What others install to use a pushed model: dist/m2mkd-*.whl and .tar.gz, of models/ alone.
wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist .

# The long form of tests/package: what the model card says, in environments that pip makes from the registry. PyPI's torch
# is the CUDA build: about 5 GB for each of three.
test-wheel: $(VENV)/.dev
	$(ENV) FRESH_ENVIRONMENTS=1 python -m pytest tests/package

# The long form of tests/slurm, each worker with a real cluster of its own; as root on Debian (docs/slurm.md).
slurm-test: $(VENV)/.dev slurm-packages
	$(ENV) CI=1 python -m pytest $(SPREAD) --durations 20 tests/slurm -m "slow or not slow"

# Chains on four nodes, disturbed at random (preemption, dead nodes, controller, signals, full disk, srun): each has to end
# with the weights of an undisturbed one. CHAINS=30 SEED=0 make slurm-rounds; LIGHT=--light: stages that pretend to train.
CHAINS ?= 30
slurm-rounds: $(VENV)/.dev slurm-packages
	$(ENV) python -m tests.slurm.rounds --chains $(CHAINS) --seed $(SEED) $(LIGHT)

# The long forms of what tests/ proves about resuming. FAULTS=200 SEED=0 make faults
FAULTS ?= 200
SEED ?= 0
faults: $(VENV)/.dev
	$(ENV) python -m tests.faults.rounds --faults $(FAULTS) --seed $(SEED)

elastic: $(VENV)/.dev
	$(ENV) python -m pytest -m slow tests/integration/test_elastic.py

# Every DeepSpeed key at 2 and 4 ranks and every ep size against a plain loop.
sweep: $(VENV)/.dev
	$(ENV) python -m pytest -m "slow or not slow" tests/integration/test_ds_keys.py

hostile: $(VENV)/.dev
	$(ENV) python -m pytest -m "slow or not slow" tests/hostile

slurm-packages:
	@for program in slurmctld slurmd munged ip; do command -v $$program >/dev/null || missing=1; done; \
	test -z "$$missing" || { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
		apt-get install -yq --no-install-recommends slurmctld slurmd slurm-client munge iproute2; }

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache
