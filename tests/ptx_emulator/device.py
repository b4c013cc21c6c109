"""Kernels as Python functions: arrays in place, the launch's counters as the result."""

import functools
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .build import compile_to_ptx, native


class EmulatorError(RuntimeError):
    """An objection of the emulator to a program or a launch."""


def _call(function, *arguments, **keywords):
    try:
        return function(*arguments, **keywords)
    except native().EmulatorError as error:
        raise EmulatorError(str(error)) from None


class Fresh:
    """Marks an array as memory that nobody has written: a kernel's read of it before a write is an error."""

    def __init__(self, array):
        self.array = array


class TensorMap:
    """A CUtensorMap, as an argument: tiles of `box` elements of an array, whose last dimension is dense.

    `swizzle`: 0 to 3, for none and the spans of 32, 64 and 128 bytes.
    """

    def __init__(self, array: torch.Tensor, box, swizzle: int = 0):
        size, self.array = array.element_size(), array
        strides = [stride * size for stride in array.stride()]
        if strides[-1] != size:
            raise ValueError(f"array: got a last dimension of stride {array.stride(-1)}, wanted one of stride 1")
        sizes, box = list(reversed(array.shape)), list(reversed(box))
        arguments = array.data_ptr(), size, sizes, strides[-2::-1], box, swizzle
        self.bytes = _call(native().make_tensor_map, *arguments)


class Module:
    """Loaded PTX. `module.name(grid, block, *arguments, shared=0, memory=())` launches the kernel `name`.

    Arguments are numpy arrays and CPU tensors, which a kernel gets as pointers and which it may touch to their last
    byte but not beyond; numpy scalars; tensor maps; and bytes, for structs. `memory`: arrays that structs point to.
    """

    def __init__(self, ptx: str):
        self.ptx = ptx
        self._module = _call(native().load, ptx)

    def kernels(self) -> list[str]:
        return self._module.kernels()

    def __getattr__(self, name):
        return functools.partial(self.launch, name)

    def launch(self, kernel: str, grid, block, *arguments, shared: int = 0, memory=()) -> dict:
        packed = []
        with Registration() as registration:
            for index, array in enumerate(memory):
                registration.add(array, f"memory {index}")
            for index, argument in enumerate(arguments):
                if isinstance(argument, np.ndarray | torch.Tensor | Fresh):
                    address = registration.add(argument, f"argument {index}")
                    packed.append(address.to_bytes(8, "little"))
                elif isinstance(argument, TensorMap):
                    registration.add(argument.array, f"argument {index}")
                    packed.append(argument.bytes)
                elif isinstance(argument, bytes):
                    packed.append(argument)
                elif isinstance(argument, np.generic):
                    packed.append(argument.tobytes())
                else:
                    raise TypeError(f"argument {index}: got {type(argument)}, wanted an array, a numpy scalar or bytes")
            ranges = registration.apply()
            return self.run(kernel, _sizes(grid), _sizes(block), shared, packed, ranges)

    def run(self, kernel: str, grid: list[int], block: list[int], shared: int, packed: list[bytes], ranges) -> dict:
        """Launches with arguments as bytes, which may touch the ranges of addresses. --hardware replaces it."""
        return _call(self._module.launch, kernel, grid, block, shared, packed, False)

    def run_one_on_another(self, first: str, second: str, array) -> None:
        """Two launches of a warp, of which the second may overlap the first."""
        with Registration() as registration:
            address = registration.add(array, "argument 0").to_bytes(8, "little")
            registration.apply()
            for kernel, overlaps in ((first, False), (second, True)):
                _call(self._module.launch, kernel, [1], [32], 0, [address], overlaps)


class Registration:
    """Host memory that kernels may touch while this lives. Ranges that overlap, as views of one tensor may, are one."""

    def __init__(self):
        self._ranges: list[tuple[int, int, str, bool]] = []
        self._registered: list[int] = []

    def add(self, array, name: str) -> int:
        """Notes an array; the result is its address."""
        fresh = isinstance(array, Fresh)
        low, size = _extent(array.array if fresh else array)
        self._ranges.append((low, low + size, name, fresh))
        return low

    def apply(self) -> list[tuple[int, int]]:
        """Tells the emulator; the result is the ranges, from the first byte to behind the last."""
        merged: list[tuple[int, int, str, bool]] = []
        for low, high, name, fresh in sorted(self._ranges):
            if merged and low < merged[-1][1]:
                first, last, names, all_fresh = merged.pop()
                low, high, name, fresh = first, max(last, high), f"{names}, {name}", all_fresh and fresh
            merged.append((low, high, name, fresh))
        for low, high, name, fresh in merged:
            self.register(low, high - low, name, fresh)
        return [(low, high) for low, high, _, _ in merged]

    def register(self, address: int, size: int, name: str, fresh: bool) -> None:
        native().add_memory(address, size, name, fresh)
        self._registered.append(address)

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *exception) -> None:
        for address in self._registered:
            native().remove_memory(address)


def _sizes(sizes) -> list[int]:
    return [sizes] if isinstance(sizes, int) else list(sizes)


def _extent(array) -> tuple[int, int]:
    """Address and bytes from the first element to the last."""
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high - low
    if array.device.type != "cpu":
        raise TypeError(f"got a tensor on {array.device}, wanted one on the CPU")
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.stride(), strict=True))
    return array.data_ptr(), (last + 1) * array.element_size() if array.numel() else 0


def load_ptx(ptx: str) -> Module:
    return Module(ptx)


_MODULES: dict[str, Module] = {}


def compile_cuda(source: Path, architecture: str = "sm_80", includes: tuple[Path, ...] = (), flags=()) -> Module:
    """The kernels of a .cu file, as nvcc makes them for a virtual architecture."""
    ptx = compile_to_ptx(Path(source), architecture, tuple(includes), tuple(flags))
    if ptx not in _MODULES:
        _MODULES[ptx] = Module(ptx)
    return _MODULES[ptx]


@contextmanager
def set_checks(**checks):
    """initialized, races, random_order, seed, max_instructions; everything is on when the block ends. With none of
    max_instructions, launches are checked and recorded, but no kernel runs."""
    native().set_checks(**checks)
    try:
        yield
    finally:
        native().set_checks()


@contextmanager
def driver(version: int):
    """The driver that the device has, as cudaDriverGetVersion tells it: 12040 is for CUDA 12.4, 0 is none."""
    before = native().driver_version()
    native().set_driver_version(version)
    try:
        yield
    finally:
        native().set_driver_version(before)


@contextmanager
def failing(*functions: str):
    """Functions of the CUDA runtime that fail meanwhile, as "cudaFuncSetAttribute"."""
    before = native().failing()
    native().set_failing(before | set(functions))
    try:
        yield
    finally:
        native().set_failing(before)


@contextmanager
def profile(name: str, multiprocessors: int | None = None):
    """The card that the device plays: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120; with fewer or more multiprocessors
    than it has, for a part of a problem that is cut as the whole is on the card."""
    before, count = native().profile(), native().multiprocessors()
    _call(native().set_profile, name)
    if multiprocessors is not None:
        native().set_multiprocessors(multiprocessors)
    try:
        yield
    finally:
        native().set_profile(before)
        native().set_multiprocessors(count)
