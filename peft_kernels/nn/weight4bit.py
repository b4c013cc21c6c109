"""The holder of a frozen 4-bit weight in this package's layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.nf4 import NF4Weight


class Weight4bit(nn.Module):
    """A 4-bit weight as buffers, which move with the model, but whose dtypes stay through `.to(dtype)`.

    As the submodule `weight` it appears in a state_dict under the names that bitsandbytes uses: the codes as `weight`,
    the rest as `weight.absmax`, `weight.quant_map`, … and `weight.quant_state.bitsandbytes__nf4`.
    """

    codes: Tensor
    _buffers: dict[str, Tensor]  # type: ignore[assignment]  # torch's may be None, but none is registered so here

    def __init__(self, weight: NF4Weight, persistent: bool = True) -> None:
        super().__init__()
        self.persistent = persistent
        self.set(weight)

    def set(self, weight: NF4Weight) -> None:
        self.format = (weight.shape, weight.dtype, weight.blocksize, weight.quant_type)
        self.nested_blocksize = weight.nested_blocksize
        self._buffers.clear()
        names = ("codes", "absmax", "nested_code", "nested_absmax", "nested_offset")
        for name, tensor in zip(names, (weight.codes, weight.absmax, *weight.nested), strict=False):
            self.register_buffer(name, tensor, persistent=False)

    def view(self) -> NF4Weight:
        codes, absmax, *nested = self._buffers.values()
        return NF4Weight(codes, absmax, *self.format, tuple(nested), self.nested_blocksize)

    def extra_repr(self) -> str:
        shape, dtype, blocksize, quant_type = self.format
        nested = len(self._buffers) > 2
        return f"{quant_type}, shape={list(shape)}, dtype={dtype}, blocksize={blocksize}, nested={nested}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's has no types
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.persistent:
            return
        state = self.view().as_dict()
        destination[prefix.removesuffix(".")] = self.codes.view(-1, 1)
        for name, value in state.items():
            if isinstance(value, Tensor):
                destination[prefix + name] = value
        rest = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        packed = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
        destination[f"{prefix}quant_state.bitsandbytes__{state['quant_type']}"] = packed

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing: torch shows a submodule only the keys below its own name, and the codes are stored at the name."""

    def load(
        self, state_dict: dict[str, Tensor], name: str, missing: list[str], unexpected: list[str], errors: list[str]
    ) -> None:
        """Takes the weight out of its layer's state_dict, where it has this name; the lists are load_state_dict's."""
        if name not in state_dict:
            missing.append(name)
            return
        if name in unexpected:
            unexpected.remove(name)
        prefix = name + "."
        state = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            weight = _read(state_dict[name], state)
        except (KeyError, ValueError) as error:
            errors.append(f"{name}: {error}")
            return
        if weight.shape != tuple(self.format[0]):
            errors.append(f"{name}: got a 4-bit weight of shape {list(weight.shape)}, wanted {list(self.format[0])}")
            return
        device = self.codes.device
        self.set(weight)
        self.to(device)


def _read(codes: Tensor, state: dict[str, Tensor]) -> NF4Weight:
    """The 4-bit weight of a checkpoint of bitsandbytes, copied out of it."""
    packed = next((value for name, value in state.items() if name.startswith("quant_state.bitsandbytes__")), None)
    if packed is None:
        raise ValueError("got a checkpoint without quant_state, wanted a 4-bit weight")
    rest = json.loads(bytes(packed.tolist()))
    quant_state = SimpleNamespace(
        absmax=state["absmax"],
        shape=rest["shape"],
        dtype=getattr(torch, rest["dtype"]),
        blocksize=rest["blocksize"],
        quant_type=rest["quant_type"],
        offset=None,
        state2=None,
    )
    if "nested_absmax" in state:
        quant_state.offset = torch.tensor(float(rest["nested_offset"]), device=codes.device)
        quant_state.state2 = SimpleNamespace(
            absmax=state["nested_absmax"],
            code=state["nested_quant_map"],
            blocksize=rest["nested_blocksize"],
            dtype=getattr(torch, rest["nested_dtype"]),
        )
    weight = NF4Weight.from_quant_state(codes, quant_state)
    return replace(
        weight,
        codes=weight.codes.clone(),
        absmax=weight.absmax.clone(),
        nested=tuple(tensor.clone() for tensor in weight.nested),
    )
