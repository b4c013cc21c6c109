"""What the kernels do for a model from start to end: `python -m benchmarks demo` and `demo_adapters`."""
