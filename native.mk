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
	for name in instance_norm_cpu crop_flip_cpu instance_norm_portable tests/instance_norm_test; do build $$name; done; \
	if [ "$$(uname -m)" = x86_64 ]; then \
		build instance_norm_avx2 "$(AVX2)"; \
		build instance_norm_avx512 "$(AVX512)"; \
		build instance_norm_avx512_bf16 "$(AVX512) -mavx512bf16"; \
	fi
	$(CXX) $(SANITIZE) $(SANITIZED)/*.o -o $(SANITIZED)/test
	$(SANITIZED)/test
