# Everything a newcomer needs: `make demo` and `make test` set up what they use.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Which build of torch: cpu, cuda, or auto, which looks for an NVIDIA GPU.
TORCH  ?= auto

.PHONY: setup demo test check format clean

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

# Render flowers, train the quick-start recipe on them, translate its test pictures, draw the figures.
demo: setup
	$(BIN)/cyclegan-fast train --config configs/quickstart.yaml --resume
	$(BIN)/cyclegan-fast translate runs/quickstart datasets/flowers/testA -o demo/translated --format png --overwrite
	$(BIN)/cyclegan-fast figures cycle runs/quickstart $$(ls datasets/flowers/testA/* | head -n 6) -o demo/cycle.png
	$(BIN)/cyclegan-fast figures curves runs/quickstart -o demo/curves.png
	@echo "Look at:"
	@echo "  demo/translated/              the test pictures, translated"
	@echo "  demo/cycle.png                input | generated | reconstructed"
	@echo "  demo/curves.png               the losses"
	@echo "  runs/quickstart/samples/      what the fixed samples looked like as training went on"
	@echo "  datasets/flowers/truthB/      what the translations should look like"

test: setup
	$(BIN)/python -m pytest -n 2 tests

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
