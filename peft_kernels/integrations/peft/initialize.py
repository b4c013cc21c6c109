"""Starting points of LoRA on 4-bit weights, for which the base is quantised anew.

LoftQ: Li et al. 2023 (arXiv:2310.08659). PiSSA: Meng et al. 2024 (arXiv:2404.02948). OLoRA: Büyükakyüz 2024
(arXiv:2406.01775).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners import lora
from safetensors import safe_open
from torch import Tensor, nn

from ...ops._arguments import path_of
from ...ops._svd import truncated_svd
from ...ops.nf4 import NF4Weight, quantize_4bit
from ..bitsandbytes.params4bit import set_weight
from ..registry import check_module

_PREFIX = "base_model.model."  # of the names in a PeftModel


@dataclass(frozen=True)
class Initialized:
    """What became of one layer.

    Attributes:
        name: as the base model has it.
        before: `‖W - Q‖ / ‖W‖` of its 4-bit weight Q as it was.
        after: `‖W - Q - scaling · B A‖ / ‖W‖`.
    """

    name: str
    before: float
    after: float


@torch.no_grad()
def initialize_lora(
    model: nn.Module,
    method: str,
    weights: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    *,
    adapter_name: str = "default",
    iterations: int = 5,
) -> list[Initialized]:
    """Begins a LoRA of PEFT's on 4-bit weights by LoftQ, PiSSA or OLoRA, and quantises these weights for it.

    PEFT has LoftQ for GPUs, with one SVD of a 4-bit weight that stays as it is, and refuses PiSSA on 4 bits. Here A and
    B are set, and Q becomes what `W - scaling · B A` is quantised to, in its own format: for LoftQ in turns, of which
    the best is kept, for PiSSA and OLoRA once.

    Args:
        model: one of PEFT's, accelerated or not, whose adapter is plain LoRA.
        method: 'loftq' (B A is nearest to what quantisation loses), 'pissa' (nearest to W), or 'olora' (the first
            columns and rows of W's QR decomposition).
        weights: W of each layer by its name in the base model, such as `model.layers.0.self_attn.q_proj.weight`; or a
            safetensors file, or a folder of them, that holds it. By default the values of the 4-bit weight, which have
            nothing that LoftQ could regain.
        adapter_name: of the adapter to begin; layers on other weights than 4-bit ones are left as they are.
        iterations: of LoftQ.

    Returns:
        An item for each layer that was begun.

    Raises:
        TypeError: `model` is no module.
        ValueError: a method or a number that there is not; no layer has the adapter on a 4-bit weight; an adapter that
            is merged, or of a variant; a weight that is missing or of another shape. Nothing is changed then.
    """
    check_module(model)
    if not isinstance(method, str) or method not in _METHODS:
        raise ValueError(f"method: got {method!r}, wanted one of {', '.join(map(repr, _METHODS))}")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations: got {iterations!r}, wanted an integer from 1 on")
    if method == "loftq" and weights is None:
        raise ValueError("weights: got None, wanted the weights before quantisation, of which LoftQ regains a part")
    layers = [(name.removeprefix(_PREFIX), layer) for name, layer in model.named_modules() if _has(layer, adapter_name)]
    if not layers:
        raise ValueError(f"adapter_name: got {adapter_name!r}, wanted an adapter on 4-bit weights")
    read = _reader(weights)
    for name, layer in layers:
        _check(name, layer, adapter_name)
        if weights is not None:
            read(f"{name}.weight", tuple(_view(layer).shape), True)
    return [_initialize(name, layer, method, read, adapter_name, iterations) for name, layer in layers]


def _has(layer: nn.Module, adapter_name: str) -> bool:
    linear4bit = getattr(lora, "Linear4bit", None)
    return linear4bit is not None and isinstance(layer, linear4bit) and adapter_name in layer.lora_A


def _check(name: str, layer: Any, adapter_name: str) -> None:
    if layer.merged_adapters:
        raise ValueError(f"model: got merged adapters {layer.merged_adapters} in {name}, wanted them unmerged")
    if adapter_name in layer.lora_variant:
        variant = type(layer.lora_variant[adapter_name]).__name__
        raise ValueError(f"adapter_name: got {adapter_name!r}, a {variant} in {name}, wanted plain LoRA")


def _view(layer: Any) -> NF4Weight:
    return NF4Weight.from_params4bit(layer.get_base_layer().weight)


def _initialize(
    name: str, layer: Any, method: str, read: Callable[..., Tensor | None], adapter_name: str, iterations: int
) -> Initialized:
    base, view = layer.get_base_layer(), _view(layer)
    quantised = view.dequantize().float()
    found = read(f"{name}.weight", tuple(view.shape), False)
    weight = quantised if found is None else found.to(quantised.device, torch.float32)
    lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    scaling, rank = float(layer.scaling[adapter_name]), lora_A.shape[0]
    b, a, new = _METHODS[method](weight, rank, view, iterations)
    root = abs(scaling) ** 0.5
    lora_A.copy_(a / root)
    lora_B.copy_(b / (root if scaling > 0 else -root))
    if new is None:  # of what the adapter's own dtype leaves
        new = _quantised(weight - scaling * lora_B.float() @ lora_A.float(), view)
    set_weight(base, new)
    norm = float(weight.norm()) or 1.0
    left = weight - new.dequantize().float() - scaling * lora_B.float() @ lora_A.float()
    return Initialized(name, float((weight - quantised).norm()) / norm, float(left.norm()) / norm)


_Start = tuple[Tensor, Tensor, NF4Weight | None]  # B and A, whose product the scaling is a part of, and Q


def _loftq(weight: Tensor, rank: int, view: NF4Weight, iterations: int) -> _Start:
    best: tuple[float, Tensor, Tensor, NF4Weight] | None = None
    target, start = weight, None
    for _ in range(iterations):
        new = _quantised(target, view)
        residual = weight - new.dequantize(torch.float32)
        u, s, vh = truncated_svd(residual, rank, start)
        left = float(residual.square().sum(dtype=torch.float64) - s.square().sum(dtype=torch.float64))
        if best is None or left < best[0]:
            best = left, u * s.sqrt(), s.sqrt()[:, None] * vh, new
        target, start = weight - (u * s) @ vh, u
    assert best is not None
    return best[1:]


def _pissa(weight: Tensor, rank: int, view: NF4Weight, iterations: int) -> _Start:
    u, s, vh = truncated_svd(weight, rank)
    return u * s.sqrt(), s.sqrt()[:, None] * vh, None


def _olora(weight: Tensor, rank: int, view: NF4Weight, iterations: int) -> _Start:
    q, _ = torch.linalg.qr(weight[:, :rank])  # whose first columns are those of W's own
    return q, q.T @ weight, None


_METHODS: dict[str, Callable[[Tensor, int, NF4Weight, int], _Start]] = {
    "loftq": _loftq, "pissa": _pissa, "olora": _olora
}  # fmt: skip


def _quantised(weight: Tensor, view: NF4Weight) -> NF4Weight:
    """A weight in the format of another."""
    new = quantize_4bit(weight.contiguous(), view.blocksize, view.quant_type, bool(view.nested))
    return replace(new, dtype=view.dtype)


def _reader(weights: Mapping[str, Tensor] | str | os.PathLike[str] | None) -> Callable[..., Tensor | None]:
    """Reads a weight by its name, or finds only whether it is there, of a shape."""
    files = {} if weights is None or isinstance(weights, Mapping) else dict(_files(path_of("weights", weights)))

    def read(name: str, shape: tuple[int, ...], only_checks: bool) -> Tensor | None:
        if weights is None:
            return None
        if isinstance(weights, Mapping):
            found: Any = weights.get(name)
            given = tuple(found.shape) if isinstance(found, Tensor) else None
        elif name not in files:
            found = given = None
        else:
            with safe_open(files[name], "pt") as file:
                given = tuple(file.get_slice(name).get_shape())
                found = None if only_checks else file.get_tensor(name)
        if given != shape:
            got = "none" if given is None else f"shape {list(given)}"
            raise ValueError(f"weights: got {got} for {name}, wanted {list(shape)}")
        return None if only_checks else found

    return read


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """The names of the tensors in a safetensors file, or in those of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"weights: got {str(path)!r}, wanted a safetensors file or a folder of them")
    for file in files:
        with safe_open(file, "pt") as opened:
            yield from ((name, file) for name in opened.keys())  # noqa: SIM118  # it is no dictionary
