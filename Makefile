# Everything a newcomer needs: `make demo` and `make test` set up what they use.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Which build of torch: cpu, cuda, or auto, which looks for an NVIDIA GPU.
TORCH  ?= auto

.PHONY: setup native demo test demo-page-test check kernels bench soak sanitize format clean

setup: $(VENV)/.ready

# The default Linux build of torch carries gigabytes of CUDA libraries: a machine without a GPU gets the CPU build, from
# where pip is pointed already if that has it, else from the project's own index.
$(VENV)/.ready: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@if $(BIN)/python -c "import torch" 2>/dev/null; then \
		echo "torch is here already"; \
	elif [ "$(TORCH)" = cuda ] || [ "$$(uname -s)" = Darwin ] || \
		{ [ "$(TORCH)" = auto ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then \
		echo "installing the default build of torch"; $(BIN)/pip install --quiet "torch==2.13.0"; \
	else \
		echo "installing the CPU build of torch"; \
		$(BIN)/pip install --quiet "torch==2.13.0+cpu" 2>/dev/null || \
		$(BIN)/pip install --quiet "torch==2.13.0+cpu" --extra-index-url https://download.pytorch.org/whl/cpu; \
	fi
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

# Render flowers, train the quick-start recipe on them, translate its test pictures, measure them, draw the figures.
demo: setup
	$(BIN)/cyclegan-fast train --config configs/quickstart.yaml --resume
	$(BIN)/cyclegan-fast translate runs/quickstart datasets/flowers/testA -o demo/translated --format png --overwrite
	$(BIN)/cyclegan-fast figures cycle runs/quickstart $$(ls datasets/flowers/testA/* | head -n 6) -o demo/cycle.png
	$(BIN)/cyclegan-fast figures curves runs/quickstart -o demo/curves.png
	$(BIN)/cyclegan-fast evaluate runs/quickstart
	$(BIN)/cyclegan-fast report runs/quickstart -o demo/report.html
	@echo "Look at:"
	@echo "  demo/report.html              all of it on one page, with sliders between before and after"
	@echo "  demo/translated/              the test pictures, translated"
	@echo "  demo/cycle.png                input | generated | reconstructed"
	@echo "  demo/curves.png               the losses"
	@echo "  runs/quickstart/samples/      what the fixed samples looked like as training went on"
	@echo "  datasets/flowers/truthB/      what the translations should look like"

test: setup
	$(BIN)/python setup.py --quiet build_ext --inplace  # the native operations, where they can be built
	$(BIN)/python -m pytest -n 2 --dist worksteal tests

# The demo page in a headless Chromium, which must be there, in an environment of its own: Gradio wants an older Pillow.
demo-page-test:
	$(MAKE) setup VENV=.venv-demo
	.venv-demo/bin/pip install --quiet -e ".[dev,demo]" playwright
	.venv-demo/bin/python -m pytest tests/inference/test_demo.py tests/inference/test_demo_page.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The compiled operations, beside the sources; setup.py says what else can be chosen. Fails if they cannot be built.
native: setup
	CYCLEGAN_FAST_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace

# The CPU kernels under the address and undefined-behaviour sanitizers, by a driver without PyTorch.
SANITIZE  := -O1 -g -std=c++17 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all -pthread
AVX2      := -mavx2 -mfma
AVX512    := $(AVX2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-uninitialized
SANITIZED := build/sanitize

sanitize:
	mkdir -p $(SANITIZED)
	@set -e; \
	build() { echo "$$1"; $(CXX) $(SANITIZE) $$2 -c csrc/$$1.cpp -o $(SANITIZED)/$$(basename $$1).o; }; \
	rm -f $(SANITIZED)/*.o; \
	for name in instance_norm_cpu conv_cpu crop_flip_cpu instance_norm_portable conv_portable tests/instance_norm_test \
		tests/conv_test; do build $$name; done; \
	if [ "$$(uname -m)" = x86_64 ]; then \
		build instance_norm_avx2 "$(AVX2)"; \
		build instance_norm_avx512 "$(AVX512)"; \
		build instance_norm_avx512_bf16 "$(AVX512) -mavx512bf16"; \
		build conv_avx2 "$(AVX2)"; \
		build conv_avx512 "$(AVX512)"; \
	fi; \
	kernels=$$(ls $(SANITIZED)/*.o | grep -v _test.o); \
	for test in instance_norm_test conv_test; do \
		$(CXX) $(SANITIZE) $$kernels $(SANITIZED)/$$test.o -o $(SANITIZED)/$$test; \
		$(SANITIZED)/$$test; \
	done

# Every Triton kernel for every architecture, without a GPU; writes the table in docs/kernels.md.
kernels: setup
	$(BIN)/python bench/kernel_gate.py

# The microbenchmarks on this machine, into bench/results/; BENCH='-k instance_norm --budget 600' to choose.
bench: setup
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds $(BENCH)

# 2,000 steps on two processes with kills at random, against the same undisturbed; SOAK='--steps 500 --faults 9' to choose.
soak: setup
	$(BIN)/python bench/soak.py $(SOAK)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info cyclegan_fast/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
