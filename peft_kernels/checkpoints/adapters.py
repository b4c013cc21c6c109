"""PEFT's adapters as changes of a checkpoint's tensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import FLOAT_DTYPES, dtype_name, is_number, refuse
from .base import BaseCheckpoint
from .changes import Change, Product
from .peft_folder import CONFIG, NEUTRAL, WEIGHTS, LoRAConfig, read_config, read_weights, refuse_listed

PREFIX = "base_model.model."
_PART = re.compile(
    r"(.+?)((?:\.base_layer)*)\."
    r"(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)"
    r"(?:\.weight)?"
)
_MERGED = NEUTRAL | {
    "use_dora", "lora_bias", "bias", "modules_to_save", "target_parameters", "ensure_weight_tying",
}  # fmt: skip
_NO_WEIGHTS = "which adds to what the model reads and changes none of its weights"
_UNMERGEABLE = {
    "PREFIX_TUNING": _NO_WEIGHTS,
    "PROMPT_TUNING": _NO_WEIGHTS,
    "P_TUNING": _NO_WEIGHTS,
    "MULTITASK_PROMPT_TUNING": _NO_WEIGHTS,
    "CPT": _NO_WEIGHTS,
    "CARTRIDGE": _NO_WEIGHTS,
    "ADAPTION_PROMPT": "whose gates change what attention gives, and none of the model's weights",
    "XLORA": "which weighs its adapters anew for each token",
    "POLY": "which weighs its adapters anew for each task",
}
_WANTED = "LoRA (rsLoRA, DoRA) or (IA)³"


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder as it was read.

    Attributes:
        weight: with which its change is multiplied.
        tensors: under their names without PEFT's prefix.
    """

    folder: Path
    weight: float
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])


def read_adapters(folders: Sequence[Path], weights: Sequence[float] | None) -> list[Adapter]:
    """Reads adapters, and refuses what can't be merged whatever the base is.

    Raises:
        FileNotFoundError: a file is not there, or the weights only as a pickle.
        ValueError: a file that is damaged; a method that changes no weights, or that is not supported; numbers that are
            not finite; methods that can't be merged in one go.
    """
    if weights is None:
        weights = [1.0] * len(folders)
    if len(weights) != len(folders) or not all(map(is_number, weights)):
        refuse("weights", repr(list(weights)), f"a number for each of the {len(folders)} adapters")
    adapters = [_read(folder, weight) for folder, weight in zip(folders, weights, strict=True)]
    kinds = {adapter.kind for adapter in adapters}
    if len(kinds) > 1:
        refuse("adapters", " and ".join(sorted(kinds)), "adapters of one method: merge them one after the other")
    for adapter in adapters:
        if adapter.kind == "IA3" and adapter.weight != 1:
            refuse("weights", f"{adapter.weight} for (IA)³, {adapter.folder}", "1: it multiplies, and adds nothing")
    return adapters


def _read(folder: Path, weight: float) -> Adapter:
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind in _UNMERGEABLE:
        refuse(str(folder / CONFIG), f"an adapter of the type {kind}, {_UNMERGEABLE[kind]}", _WANTED)
    if kind not in ("LORA", "IA3"):
        refuse(str(folder / CONFIG), f"an adapter of the type {kind!r}", _WANTED)
    _, stored = read_weights(folder)
    # safetensors gives them in a new order each time, which the seeds of masks and an error's text would depend on.
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in sorted(stored.items())}
    refuse_listed(
        f"{folder / WEIGHTS} can't be merged:",
        {
            "of another dtype": [
                f"{name}: got {dtype_name(tensor.dtype)}, wanted {', '.join(map(dtype_name, FLOAT_DTYPES))}"
                for name, tensor in tensors.items()
                if tensor.dtype not in FLOAT_DTYPES
            ],
            "with numbers that are not finite": [
                name for name, tensor in tensors.items() if not tensor.isfinite().all()
            ],
        },
    )
    if not tensors:
        refuse(str(folder / WEIGHTS), "no tensors", "an adapter's")
    return Adapter(folder, float(weight), config, tensors)


def changes_of(adapters: Sequence[Adapter], base: BaseCheckpoint) -> dict[str, Change]:
    """What adapters change of each tensor of a checkpoint.

    Raises:
        ValueError: a tensor of an adapter that names none of the base, or does not fit it; it lists which.
    """
    changes: dict[str, Change] = {}
    for adapter in adapters:
        _Reader(adapter, base, changes).read()
    return changes


class _Reader:
    """Adds one adapter to the changes."""

    def __init__(self, adapter: Adapter, base: BaseCheckpoint, changes: dict[str, Change]) -> None:
        self.adapter, self.base, self.changes = adapter, base, changes
        self.unknown: list[str] = []
        self.misfits: list[str] = []
        path = adapter.folder / CONFIG
        self.lora = (
            LoRAConfig(path, adapter.config, _MERGED, f"{_WANTED} alone, which merges") if self._is_lora else None
        )

    @property
    def _is_lora(self) -> bool:
        return self.adapter.kind == "LORA"

    def read(self) -> None:
        layers: dict[str, dict[int, dict[str, Tensor]]] = {}  # by module and by the depth of PEFT's wrappers
        for name, tensor in self.adapter.tensors.items():
            match = _PART.fullmatch(name)
            if match:
                depth = match[2].count(".base_layer")
                layers.setdefault(match[1], {}).setdefault(depth, {})[match[3].removesuffix(".weight")] = tensor
            else:
                self._replace(name.replace(".base_layer.", "."), tensor)
        for module, depths in layers.items():
            stacks = self._stacks(module)
            for parts in depths.values():
                if "ia3_l" in parts and not self._is_lora:
                    self._scale(module, parts["ia3_l"])
                elif self._is_lora and "ia3_l" not in parts:
                    self._add(module, parts, stacks, len(depths))
                else:
                    self.misfits.append(
                        f"{module}: got {', '.join(sorted(parts))}, wanted those of {self.adapter.kind}"
                    )
        refuse_listed(
            f"{self.adapter.folder / WEIGHTS} does not fit {self.base.folder}:",
            {"that name no weight of the base": self.unknown, "that do not fit": self.misfits},
        )

    # ---- Names ------------------------------------------------------------------------------------------------------

    def _name(self, parameter: str) -> str | None:
        """The checkpoint's name of a model's parameter, if it has it as one tensor."""
        tied = self.base.tied
        if tied and parameter == tied[0]:
            return parameter
        return None if parameter in self.base.stacks else self.base.find(parameter)

    def _bias(self, weight: str) -> str | None:
        """The bias beside a weight, both by the checkpoint's names."""
        name = f"{weight.removesuffix('weight')}bias"
        return name if name in self.base.tensors else None

    def _shape(self, parameter: str) -> tuple[int, ...] | None:
        """Of a stack, too, whose pieces are all there and fit each other."""
        name, tied = self._name(parameter), self.base.tied
        if name is not None:
            return self.base.tensors[tied[1] if tied and name == tied[0] else name].shape
        pieces = self.base.stacks.get(parameter, [])
        experts = len({piece.expert for piece in pieces})
        rows = {(piece.begin, *self.base.tensors[piece.name].shape) for piece in pieces}
        is_whole = len({shape[2] for shape in rows}) == 1 and len(pieces) == experts * len(rows)
        return (experts, sum(shape[1] for shape in rows), next(iter(rows))[2]) if is_whole else None

    def _targets(self, parameter: str) -> bool:
        """Whether the configuration names the parameter, and not only its module."""
        targets = self.adapter.config.get("target_parameters") or []
        return any(parameter == target or parameter.endswith(f".{target}") for target in targets)

    def _stacks(self, module: str) -> dict[str, tuple[int, int, int]]:
        """The shapes of the parameters of a mixture that the adapter may be for."""
        targets = self.adapter.config.get("target_parameters") or []
        found = {}
        for parameter in sorted({f"{module}.{target.rpartition('.')[2]}" for target in targets}):
            shape = self._shape(parameter) if self._targets(parameter) else None
            if shape is not None and len(shape) == 3:
                found[parameter] = (shape[0], shape[1], shape[2])
        return found

    def _change(self, name: str) -> Change:
        return self.changes.setdefault(name, Change())

    # ---- Changes ----------------------------------------------------------------------------------------------------

    def _replace(self, name: str, tensor: Tensor) -> None:
        found, shape = self._name(name), self._shape(name)
        if found is None or shape is None:
            self.unknown.append(name)
            return
        if tuple(tensor.shape) != shape:
            self.misfits.append(f"{name}: got {list(tensor.shape)}, wanted {list(shape)}")
            return
        if self.adapter.weight != 1:
            self.misfits.append(f"{name}, which replaces the base's: got weight {self.adapter.weight}, wanted 1")
        change = self._change(found)
        if change.replaced is not None and not torch.equal(change.replaced, tensor):
            self.misfits.append(f"{name}, which another adapter replaces, too")
        change.replaced = tensor

    def _scale(self, module: str, scale: Tensor) -> None:
        name, shape = self._name(f"{module}.weight"), self._shape(f"{module}.weight")
        if name is None or shape is None:
            self.unknown.append(module)
            return
        is_input = scale.dim() == 2 and scale.shape[0] == 1 and scale.shape[1] != 1
        out, inner = shape if len(shape) == 2 else (0, 0)
        if transposed := self._stores_transposed(name):
            out, inner = inner, out
        if list(scale.shape) not in ([1, inner], [out, 1]):
            self.misfits.append(f"{module}: got {list(scale.shape)}, wanted [1, {inner}] or [{out}, 1]")
            return
        self._change(name).scales.append(scale.T if transposed else scale)
        bias = self._bias(name)
        if bias is not None and not is_input:
            self._change(bias).scales.append(scale.flatten())

    def _stores_transposed(self, name: str) -> bool:
        """Whether a dense layer's weight is [in, out]; bitsandbytes turns it before it quantises."""
        tensor = self.base.tensors.get(name)
        if tensor is not None and tensor.state is not None:
            return False
        known = self.base.conv1d
        return bool(self.adapter.config.get("fan_in_fan_out")) if known is None else name in known

    def _add(self, module: str, parts: Mapping[str, Tensor], stacks: dict[str, Any], wrappers: int) -> None:
        is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        for part in names:
            if part not in parts:
                self.misfits.append(f"{module}: got no {part}, wanted it beside {', '.join(parts)}")
                return
        a, b = (parts[part] for part in names)
        if stacks:
            self._add_to_stack(module, a, b, stacks)
            return
        name, shape = self._name(f"{module}.weight"), self._shape(f"{module}.weight")
        if name is None or shape is None:
            self.unknown.append(f"{module}.{names[0]}")
            return
        if len(shape) == 3 and a.dim() == 2:
            self._add_to_stack(module, a, b, {f"{module}.weight": shape})
            return
        assert self.lora is not None
        layer = f"{module}.weight" if self._targets(f"{module}.weight") else module  # as PEFT's patterns name it
        transposed = is_embedding or (len(shape) == 2 and self._stores_transposed(name))
        if why := self._why_not(parts, names, self.lora.rank_of(layer), shape, transposed, wrappers):
            self.misfits.append(f"{module}{why}")
            return
        a, b, scaling, weight = a.flatten(1), b.flatten(1), self.lora.scaling(layer), self.adapter.weight
        left, right = (a.T, b.T) if transposed else (b, a)
        product = Product(left, right, scaling, weight, parts.get("lora_magnitude_vector"), by_column=transposed)
        self._change(name).products.setdefault(None, []).append(product)
        if "lora_B.bias" in parts:
            bias = self._bias(name)
            if bias is None:
                self.unknown.append(f"{module}.lora_B.bias")
            else:
                self._change(bias).added.append(parts["lora_B.bias"].double() * (scaling * weight))

    def _why_not(self, parts: Mapping[str, Tensor], names: tuple[str, str], rank: float, shape: tuple[int, ...],
                 transposed: bool, wrappers: int) -> str | None:  # fmt: skip
        """How LoRA's parts do not fit a weight of a shape, as it stands behind the module's name."""
        wanted_A, wanted_B = [rank, *shape[1:]], [shape[0], rank, *[1] * (len(shape) - 2)]
        if transposed:
            wanted_A, wanted_B = [rank, shape[0]], [shape[1], rank]
        of_out = wanted_B[:1]
        shapes = {names[0]: wanted_A, names[1]: wanted_B, "lora_magnitude_vector": of_out, "lora_B.bias": of_out}
        for part, wanted in shapes.items():
            if part in parts and list(parts[part].shape) != wanted:
                return f".{part}: got {list(parts[part].shape)}, wanted {wanted}"
        if wrappers > 1:
            return f": got {wrappers} pairs of matrices, wanted one"
        has_magnitude = "lora_magnitude_vector" in parts
        if has_magnitude != bool(self.adapter.config.get("use_dora")):
            return f": got {'a' if has_magnitude else 'no'} magnitude, wanted the contrary"
        return None

    def _add_to_stack(self, module: str, a: Tensor, b: Tensor, stacks: Mapping[str, tuple[int, ...]]) -> None:
        """LoRA on a stack of experts: A is [E · rank, in], expert by expert, and B [out, rank · E], expert fastest."""
        assert self.lora is not None
        fitting = []
        for parameter, (experts, *sizes) in stacks.items():
            rank = self.lora.rank_of(parameter)
            orders = {
                is_transposed
                for is_transposed, (out, inner) in ((False, sizes), (True, sizes[::-1]))
                if list(a.shape) == [experts * rank, inner] and list(b.shape) == [out, rank * experts]
            }
            if orders:
                fitting.append((parameter, experts, orders))
        if len(fitting) != 1:
            wanted = " or ".join(f"{name} {list(shape)}" for name, shape in stacks.items())
            got = f"{module}: got A {list(a.shape)} and B {list(b.shape)}"
            self.misfits.append(f"{got}, wanted those of {wanted}" if not fitting else f"{got}, which fit {wanted}")
            return
        parameter, experts, orders = fitting[0]
        # The shapes of square matrices do not say which is which.
        is_transposed = module in self.base.structure.transposed if len(orders) == 2 else orders.pop()
        lefts = b.view(b.shape[0], -1, experts).permute(2, 0, 1)  # [E, out, rank]
        rights = a.view(experts, -1, a.shape[1])  # [E, rank, in]
        if is_transposed:
            lefts, rights = rights.mT, lefts.mT
        scaling, weight, name = self.lora.scaling(parameter), self.adapter.weight, self._name(parameter)
        if name is not None:
            products = self._change(name).products
            for expert in range(experts):
                products.setdefault(expert, []).append(Product(lefts[expert], rights[expert], scaling, weight))
            return
        for piece in self.base.stacks[parameter]:
            rows = self.base.tensors[piece.name].shape[0]
            left = lefts[piece.expert][piece.begin : piece.begin + rows]
            product = Product(left, rights[piece.expert], scaling, weight)
            self._change(piece.name).products.setdefault(None, []).append(product)


def digest(adapter: Adapter) -> str:
    """Of an adapter's files."""
    hashed = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        hashed.update((adapter.folder / name).read_bytes())
    return hashed.hexdigest()
