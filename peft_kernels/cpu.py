"""Which instruction set the CPU kernels use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _extension  # noqa: F401

FEW_ROWS: int = torch.ops.peft_kernels.lora_linear_few_rows()  # for which a dense weight is read at the memory's speed
_MKL_IS_NARROW = torch.backends.mkl.is_available() and not torch.ops.peft_kernels.cpu_is_intel()


def isa() -> str:
    """The instruction set in use: 'portable'; on x86-64 'avx2', 'avx512', 'avx512_bf16' or 'amx'; on ARM64 'neon' or
    'neon_bf16'.

    The fastest one that the processor has, unless the environment variable PEFT_KERNELS_CPU_ISA names another.
    """
    result: str = torch.ops.peft_kernels.cpu_isa()
    return result


def has_512_bits() -> bool:
    """Whether the vectors of the instruction set in use have 512 bits."""
    return isa() in ("avx512", "avx512_bf16", "amx")


def isas() -> list[str]:
    """Every instruction set that this processor can run, slowest first."""
    result: list[str] = torch.ops.peft_kernels.cpu_isas()
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's has no types
def outruns_torch() -> bool:
    """Whether the kernels' products of fp32 matrices are faster than torch's.

    Torch's are MKL's, unless they may be of fewer bits. MKL takes vectors of 256 bits on processors that are not
    Intel's, where AVX-512 has 512: `python -m benchmarks architectures` shows what that costs.
    """
    return _MKL_IS_NARROW and torch.get_float32_matmul_precision() == "highest" and has_512_bits()


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
