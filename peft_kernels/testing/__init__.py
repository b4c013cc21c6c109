"""What tests and benchmarks need and users may use too: the plain PyTorch oracle of every family."""
