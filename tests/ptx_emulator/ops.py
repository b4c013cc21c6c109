"""The library's CUDA ops on CPU tensors: `with emulated():` sends calls of peft_kernels' ops to them."""

import ctypes
import functools
import os
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peft_kernels._extension import refusing

from .build import build, native
from .device import Registration

NAMESPACE = "peft_kernels_emulated"


@functools.cache
def load() -> None:
    """Builds the second copy of the ops and registers them."""
    native()
    # Its own runtime before the one that a torch for CUDA has loaded for all.
    ctypes.CDLL(str(build("emulated_ops") / "libemulated_ops.so"), os.RTLD_NOW | os.RTLD_DEEPBIND)


class _Allocations(TorchDispatchMode):
    """Tells the emulator of tensors that a binding makes for its kernels; empty ones are memory that nobody wrote."""

    def __init__(self, registration: Registration):
        super().__init__()
        self.registration = registration

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [result.alias_info for result in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view: its memory is known
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                name, fresh = f"a result of {func.__name__}", "empty" in func.__name__
                self.registration.register(storage.data_ptr(), storage.nbytes(), name, fresh)
        return out


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether it is more than the shape of a tensor: not on meta, not one of those that torch traces with."""
    return tensor.device.type == "cpu" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


class _EmulatedOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation = func.__name__.split(".")[0]
        has_kernel = func.namespace == "peft_kernels" and hasattr(getattr(torch.ops, NAMESPACE), operation)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        if not has_kernel or not all(map(_has_memory, tensors)):
            return func(*args, **kwargs)
        emulated_op = getattr(getattr(torch.ops, NAMESPACE), operation).default
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        with Registration() as registration:
            for name, value in given.items():
                leaves = tree_leaves(value)
                # A 4-bit weight is a list of codes, absmax and nested statistics, which are told apart.
                is_4bit = name == "weight" and len(leaves) > 1
                names = ["codes", "absmax", *["nested"] * len(leaves)] if is_4bit else [name] * len(leaves)
                for part, tensor in zip(names, leaves, strict=False):
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        registration.add(tensor, part)
            registration.apply()
            # Straight to the kernel: a plain call would hand the op itself to the mode, and leave the mode for it.
            with _Allocations(registration):
                redispatch = refusing(emulated_op.redispatch)
                return redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


@contextmanager
def emulated():
    """Runs the CUDA implementation of every op that has one. Yields a function that takes the launches so far."""
    load()
    native().take_records()
    # The tensors are where the CPU's kernels would take experts, and dense products that a GPU's leave to its library.
    with (
        _EmulatedOps(),
        mock.patch("peft_kernels.ops._grouped_on_gpu.is_on_gpu", _has_memory),
        mock.patch("peft_kernels.cpu.outruns_torch", lambda: False),
        mock.patch("peft_kernels.cpu.FEW_ROWS", -1),
    ):
        yield native().take_records
