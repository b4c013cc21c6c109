"""How the tests of all families compare a result with its oracle's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def short(dtype: torch.dtype) -> str:
    """A dtype as it stands in test ids: fp32, bf16, fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def mode_id(mode: tuple[torch.dtype, ...]) -> str:
    return "-".join(map(short, mode))


def rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative rms error; zero for empty tensors."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    difference, scale = rms(actual.double() - expected.double()), rms(expected)
    return difference / scale if scale > 0 else difference


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    assert actual.isfinite().all(), f"{what}: not finite"
    measured = error(actual, expected)
    assert measured <= tolerance, f"{what}: relative rms error {measured:.3g}, wanted at most {tolerance:.3g}"


def same_results(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit, under the same names."""
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(actual[name], value), name


def views_of_x(x: Tensor) -> dict[str, Tensor]:
    """The same matrix with rows that lie otherwise in memory; the last ones have three dimensions."""
    m, d = x.shape
    return {
        "row-strided": F.pad(x, (3, 5))[:, 3 : 3 + d],
        "every-second-row": x.repeat_interleave(2, 0)[::2],
        "transposed": x.T.contiguous().T,
        "inner-strided": x.repeat_interleave(2, 1)[:, ::2],
        "3d": x.view(2, m // 2, d),
        "3d-transposed": x.view(2, m // 2, d).transpose(0, 1).contiguous().transpose(0, 1),
    }


def differentiated(
    function: Callable[..., Tensor], arguments: dict[str, Any], grad_y: Tensor, **options
) -> dict[str, Tensor]:
    """y, and the gradient of every argument that is a tensor, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in arguments.items() if isinstance(value, Tensor)}
    y = function(**(arguments | leaves), **options)
    y.backward(grad_y.to(y.dtype))
    return {"y": y.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def saved_for_backward(call: Callable[[], Tensor], known: Iterable[Tensor | None]) -> tuple[Tensor, dict[int, int]]:
    """What a call returns, and the bytes of each storage, by address, that autograd holds for it beyond known ones."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    own = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
    return result, {pointer: size for pointer, size in saved.items() if pointer not in own}


class Made(TorchDispatchMode):
    """Everything that operations return, except views of other memory; and the names of these operations."""

    def __init__(self):
        super().__init__()
        self.tensors = []
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.names.append(func.__name__)
            self.tensors += [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return out
