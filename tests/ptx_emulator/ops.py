"""The library's CUDA ops on CPU tensors: `with emulated():` sends calls of peft_kernels' ops to them."""

import functools
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .build import BUILD, native
from .device import _extent

NAMESPACE = "peft_kernels_emulated"


@functools.cache
def load() -> None:
    """Builds the second copy of the ops and registers them."""
    native()
    torch.ops.load_library(str(BUILD / "libemulated_ops.so"))


class _Allocations(TorchDispatchMode):
    """Tells the emulator of tensors that a binding makes for its kernels: memory that nobody has written."""

    def __init__(self, register):
        super().__init__()
        self.register = register

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        empty = "empty" in func.__name__
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.register(tensor, f"a result of {func.__name__}", empty)
        return out


class _EmulatedOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = f"{NAMESPACE}::{func.__name__.split('.')[0]}"
        has_kernel = func.namespace == "peft_kernels" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        if not has_kernel:
            return func(*args, **kwargs)
        registered = []

        def register(tensor, what, fresh=False):
            address, size = _extent(tensor)
            native().add_memory(address, size, what, fresh)
            registered.append(address)

        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        try:
            for argument, value in given.items():
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and tensor.numel():
                        register(tensor, argument)
            operation = getattr(getattr(torch.ops, NAMESPACE), func.__name__.split(".")[0]).default
            # Straight to the kernel: a plain call would hand the op itself to the mode, and leave the mode for it.
            with _Allocations(register):
                return operation.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        finally:
            for address in registered:
                native().remove_memory(address)


@contextmanager
def emulated():
    """Runs the CUDA implementation of every op that has one. Yields a function that takes the launches so far."""
    load()
    native().take_records()
    with _EmulatedOps():
        yield native().take_records
