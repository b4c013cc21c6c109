"""Plain PyTorch implementations, exact enough (fp64) to judge the kernels by."""
