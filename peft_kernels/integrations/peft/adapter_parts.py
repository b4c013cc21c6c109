"""What an adapter of PEFT's LoRA layers is made of, as the fused operations take it; or why they can't.

MiCA: arXiv:2604.01694. KaSA: Wang et al. 2024 (arXiv:2412.06071). aLoRA: Greenewald et al. 2025 (arXiv:2504.12397).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import dora, variants
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from ...inference.guards import ONCE, Reading
from ...ops._arguments import FLOAT_DTYPES
from ...ops.dora_linear import dora_norm
from ...ops.nf4 import NF4Weight
from ..base_layer import is_linear, why_not_skip
from ..refusal import Refusal
from ..torch.dropout import Dropout

_DROPOUTS = (nn.Dropout, Dropout)

# Not every version of PEFT has them.
ALoRA = getattr(variants, "ALoraLinearVariant", None)
_KASA = getattr(variants, "KasaLinearVariant", None)
# MiCA computes what plain LoRA does, with a B that is frozen; KaSA's B has a factor for each column.
_KNOWN = (DoraLinearVariant, ALoRA, _KASA, getattr(variants, "MiCALinearVariant", None))


class Parts(NamedTuple):
    """Of one adapter: `scaling · (dropout(x) Aᵀ Bᵀ + bias)`.

    Attributes:
        lora_A, lora_B: [r, K] and [N, r].
        dropout: the probability, 0 in evaluation.
        bias: [N], of B (`lora_bias`).
        magnitude: a DoRA's layer.
    """

    name: str
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: float
    dropout: float
    bias: Tensor | None = None
    magnitude: dora.DoraLinearLayer | None = None


def is_dora(layer: Any, name: str) -> bool:
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def is_alora(layer: Any, name: str) -> bool:
    """Whether an adapter is for the tokens from its invocation on."""
    return ALoRA is not None and type(layer.lora_variant.get(name)) is ALoRA


def parts_of(layer: Any, name: str, read: Reading = ONCE) -> Parts | Refusal | None:
    """What an adapter is made of; or why it can't be fused; or None if the layer lacks it."""
    # It runs at every forward, before the kernel starts: hence the dictionaries of nn.Module, read directly.
    modules = layer._modules
    a = read.module(read.item(modules, "lora_A")._modules, name)
    if a is None:
        return None
    found = read.item(read.attribute(layer, "lora_variant"), name)
    if found is not None and type(found) not in _KNOWN:
        return Refusal(f"adapter {name!r} is a {type(found).__name__}")
    b = read.module(read.item(modules, "lora_B")._modules, name)
    dropout = read.module(read.item(modules, "lora_dropout")._modules, name)
    if not (is_linear(a) and is_linear(b)):
        return Refusal(f"adapter {name!r} is made of {type(a).__name__} and {type(b).__name__}, not of torch.nn.Linear")
    weight_A, weight_B, bias = read.parameter(a, "weight"), read.parameter(b, "weight"), read.parameter(b, "bias")
    if read.parameter(a, "bias") is not None:
        return Refusal(f"adapter {name!r} has a bias on A")
    p = read.attribute(dropout, "p") if type(dropout) in _DROPOUTS else 0.0
    if p >= 1 or not (type(dropout) in _DROPOUTS or type(dropout) is nn.Identity):
        return Refusal(f"adapter {name!r} has the dropout {dropout}")
    if p and not read.attribute(dropout, "training"):
        p = 0.0
    if reason := why_not_skip(a) or why_not_skip(b) or why_not_skip(dropout):
        return Refusal(f"adapter {name!r} has {reason}")
    if weight_A.dtype not in FLOAT_DTYPES or weight_B.dtype not in FLOAT_DTYPES:
        return Refusal(f"adapter {name!r} is {weight_A.dtype} and {weight_B.dtype}")
    scalings = read.attribute(layer, "scaling")
    scaling = scalings[name]
    if isinstance(scaling, Tensor) and torch.compiler.is_compiling():
        # `prepare_model_for_compiled_hotswap` makes it one, which compiled code has to read each time that it runs.
        bias = None if bias is None else bias.float() * scaling
        parts = Parts(name, weight_A, weight_B.float() * scaling, 1.0, p, bias)
    else:
        parts = Parts(name, weight_A, weight_B, read.number(scalings, name), p, bias)
    return parts if found is None else _of_variant(layer, parts, type(found), read)


def _of_variant(layer: Any, parts: Parts, variant: type, read: Reading) -> Parts | Refusal:
    """What a variant has beside A and B."""
    if variant is _KASA:
        if parts.name in layer._lora_kasa_truncation_deferred:
            return Refusal(f"adapter {parts.name!r} has yet to truncate the base weight")
        diagonal = read.parameter(read.item(layer._modules, "lora_diag"), parts.name)
        return parts._replace(lora_B=read.values(parts.lora_B) * read.values(diagonal))
    if variant is DoraLinearVariant:
        if parts.bias is not None:  # PEFT has it in the norm, once for each column of W
            return Refusal(f"adapter {parts.name!r} is a DoRA with lora_bias")
        magnitude = _magnitude(layer, parts.name, read)
        return magnitude if isinstance(magnitude, Refusal) else parts._replace(magnitude=magnitude)
    return parts


def _magnitude(layer: Any, name: str, read: Reading) -> dora.DoraLinearLayer | Refusal:
    magnitude = read.module(read.item(layer._modules, "lora_magnitude_vector")._modules, name)
    if type(magnitude) is not dora.DoraLinearLayer:
        return Refusal(f"adapter {name!r} has a magnitude that is a {type(magnitude).__name__}")
    if reason := why_not_skip(magnitude):
        return Refusal(f"adapter {name!r} has {reason}")
    weight = read.parameter(magnitude, "weight")
    if weight.dtype not in FLOAT_DTYPES:
        return Refusal(f"adapter {name!r} has a magnitude in {weight.dtype}")
    if weight.device != layer.base_layer.weight.device:
        return Refusal(f"adapter {name!r} has its magnitude on {weight.device}")
    return magnitude


def norm_of(parts: Parts, weight: Tensor | NF4Weight, squares: Tensor | None) -> Tensor | None:
    """A DoRA's `‖W + scaling · B A‖` for each row; None for other adapters.

    `squares`: of W's rows, where the base layer keeps them.
    """
    if parts.magnitude is None:
        return None
    # PEFT's own cache, for those who turn it on; from 0.19 on there is one.
    magnitude: Any = parts.magnitude
    cache, key = vars(magnitude).get("_dora_cache", {}), f"weight-norm-{parts.name}"
    caches = getattr(dora, "ENABLE_DORA_CACHING", False) and not magnitude.training
    if cache and not caches:  # an exported program can't change it
        cache.clear()
    norm: Tensor | None = cache.get(key)
    if norm is None:
        norm = dora_norm(weight, parts.lora_A, parts.lora_B, parts.scaling, squares=squares)
        if caches:
            cache[key] = norm
    return norm


def _gain(parts: Parts, norm: Tensor | None) -> Tensor | None:
    return None if parts.magnitude is None or norm is None else parts.magnitude.weight.float() / norm


def _times(parts: Parts, gain: Tensor | None) -> Parts:
    """An adapter whose B and bias take a factor for each row."""
    if gain is None:
        return parts
    bias = None if parts.bias is None else gain * parts.bias
    return parts._replace(lora_B=gain[:, None] * parts.lora_B, bias=bias)


def scaled(adapters: Sequence[Parts], norms: Sequence[Tensor | None]) -> tuple[Tensor, list[Parts]]:
    """For active adapters some of which are DoRAs: the gain [N] of the base product, in fp32, and the adapters to add
    to it. A DoRA multiplies the base product, and the sum of the adapters that come before it."""
    product: Tensor | None = None  # of the gains from an adapter on
    result: list[Parts] = []
    for parts, norm in zip(reversed(adapters), reversed(norms), strict=True):
        gain = _gain(parts, norm)
        product = product if gain is None else gain if product is None else gain * product
        result.insert(0, _times(parts, product))
    assert product is not None
    return product, result


def tables(
    adapters: Sequence[Parts], norms: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, list[Parts]]:
    """For adapters each of which has rows of its own: the gains and the biases of rows without an adapter and of each
    one's, [1 + adapters, N] in fp32, and the adapters to add. None where no adapter has any."""
    gains = [_gain(parts, norm) for parts, norm in zip(adapters, norms, strict=True)]
    biases = [None if parts.bias is None else parts.scaling * parts.bias.float() for parts in adapters]
    result = [_times(parts, gain) for parts, gain in zip(adapters, gains, strict=True)]
    return _table(gains, 1.0), _table(biases, 0.0), result


def _table(rows: Sequence[Tensor | None], otherwise: float) -> Tensor | None:
    first = next((row for row in rows if row is not None), None)
    if first is None:
        return None
    without = torch.full_like(first, otherwise)
    return torch.stack([without, *(without if row is None else row for row in rows)])


def with_biases(bias: Tensor | None, adapters: Sequence[Parts], read: Reading = ONCE) -> Tensor | None:
    """The base layer's bias and those of the adapters, in fp32 if there are any of these."""
    total: Tensor | None = None
    for parts in adapters:
        if parts.bias is not None:
            own = parts.scaling * read.values(parts.bias).float()
            total = own if total is None else total + own
    if total is None or bias is None:
        return bias if total is None else total
    return read.values(bias).float() + total


def watch(adapters: Sequence[Parts], read: Reading) -> None:
    """Notes that copies are made of what adapters consist of, their norms included."""
    for parts in adapters:
        magnitude = None
        if parts.magnitude is not None:
            magnitude = parts.magnitude.weight
            read.item(vars(dora), "ENABLE_DORA_CACHING")
            read.attribute(parts.magnitude, "training")
            read.item(read.attribute(parts.magnitude, "_dora_cache", {}), f"weight-norm-{parts.name}")
        for tensor in (parts.lora_A, parts.lora_B, parts.bias, magnitude):
            if tensor is not None:
                read.values(tensor)


def index_of_tokens(index: Tensor, invoked: Sequence[int], offsets: Sequence[int | None] | None, x: Tensor) -> Tensor:
    """For each token of x [batch, tokens, K], or row of x [batch, K], the position of its adapter, or -1 for none.

    Args:
        index: int64 [batch], of the samples' adapters.
        invoked: the positions of the aLoRAs.
        offsets: for each sample how many of its last tokens have an aLoRA; None where that was not invoked.

    Raises:
        ValueError: there are more samples than offsets, or fewer.
    """
    if offsets is not None and len(offsets) != len(index):
        raise ValueError(f"alora_offsets: got {len(offsets)}, wanted one for each of the {len(index)} samples")
    tokens = x.shape[1] if x.dim() > 2 else 1
    counts = [0] * len(index) if offsets is None else [min(int(count or 0), tokens) for count in offsets]
    last = torch.arange(tokens) >= tokens - torch.tensor(counts)[:, None]
    has_all = ~torch.isin(index, torch.tensor(invoked))
    found = torch.where(last | has_all[:, None], index[:, None], -1)
    return found if x.dim() > 2 else found[:, 0]
