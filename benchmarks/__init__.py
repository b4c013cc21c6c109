"""Measurements: `python -m benchmarks NAME [options]`."""
