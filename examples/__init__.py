"""What the kernels do for a model from start to end: `python -m benchmarks demo`, `demo_adapters`, …"""
