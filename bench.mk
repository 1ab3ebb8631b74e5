.PHONY: kernels bench

# Every Triton kernel for every architecture, without a GPU; writes the table in docs/kernels.md.
kernels: setup
	$(BIN)/python bench/kernel_gate.py

# The microbenchmarks on this machine, into bench/results/; BENCH='-k instance_norm --budget 600' to choose.
bench: setup
	$(BIN)/python -m pytest bench -q --benchmark-columns=median,iqr,rounds $(BENCH)
