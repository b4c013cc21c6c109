"""A CUDA device in software: runs the PTX that nvcc makes of .cu files, checks it and counts. See README.md."""

from .build import missing, toolkit_include
from .device import EmulatorError, Module, TensorMap, compile_cuda, driver, failing, load_ptx, profile, set_checks

__all__ = [
    "EmulatorError",
    "Module",
    "TensorMap",
    "compile_cuda",
    "driver",
    "failing",
    "load_ptx",
    "missing",
    "profile",
    "set_checks",
    "toolkit_include",
]
