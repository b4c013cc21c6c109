"""What a call leaves on the nodes of its graph, for layers that are checkpointed: these run once more in the backward,
in a thread of autograd's perhaps, with nothing to tell by which call they were run first. But the node that has a layer
recomputed is one of the call's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def mark_graph(output: Any, key: str, value: object) -> None:
    """Has every node between a call's output and the nodes that are marked already carry a value."""
    nodes: list[Any] = [tensor.grad_fn for tensor in _tensors(output)]
    while nodes:
        node = nodes.pop()
        if node is not None and key not in node.metadata:
            node.metadata[key] = value
            nodes += [parent for parent, _ in node.next_functions]


def mark_of_recomputation(key: str) -> Any:
    """The value that the node carries whose layer a backward is recomputing; None if there is none."""
    if backward_task() == -1:
        return None
    node: Any = torch._C._current_autograd_node()  # torch's types take its `metadata` for a method
    return None if node is None else node.metadata.get(key)


def backward_task() -> int:
    """The number of the backward that is under way in this thread; -1 for none."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def will_be_recomputed() -> bool:
    """Whether what runs now, of a call that gradients are wanted of, will run again in the backward."""
    # Reentrant checkpointing turns gradients off in the forward, and the other kind has hooks for saved tensors.
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or not torch.is_grad_enabled()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for part in fields(value):
            yield from _tensors(getattr(value, part.name))
