"""Which instruction set the CPU kernels use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _extension  # noqa: F401


def isa() -> str:
    """The instruction set in use: 'portable', 'avx2', 'avx512', 'avx512_bf16' or 'amx'.

    The fastest one that the processor has, unless the environment variable PEFT_KERNELS_CPU_ISA names another.
    """
    return torch.ops.peft_kernels.cpu_isa()


def isas() -> list[str]:
    """Every instruction set that this processor can run, slowest first."""
    return torch.ops.peft_kernels.cpu_isas()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Runs the CPU kernels with another instruction set; for tests and benchmarks.

    Raises:
        RuntimeError: the name is unknown, or the processor lacks it.
    """
    before = isa()
    torch.ops.peft_kernels.set_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.peft_kernels.set_cpu_isa(before)
