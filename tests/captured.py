"""A CUDA graph in software: what a model does to its tensors, recorded once and played again without its Python code.

As with `torch.cuda.graph`, a replay runs the same operations on the same tensors: numbers that Python read or computed
are frozen. Reading a tensor on the host is refused, because a graph that is being captured cannot wait. Unlike there,
the operations run while they are captured, which is the first replay.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that wait for values, or whose results have sizes that depend on values.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        assert name not in WAITING, f"{name}: a graph that is being captured cannot wait for values"
        results = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, results))
        return results

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():  # a graph knows nothing of views and versions
            for func, args, kwargs, results in self.calls:
                again = func(*args, **kwargs)
                for result, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(result, torch.Tensor) and result.data_ptr() != new.data_ptr():
                        result.copy_(new)


@contextmanager
def captured():
    """Records into the graph that it yields."""

    def refuse(tensor, *args, **kwargs):
        raise AssertionError("a graph that is being captured cannot wait for values")

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "__array__"):  # which reach the CPU's memory past every operation
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse))
        yield stack.enter_context(Graph())
