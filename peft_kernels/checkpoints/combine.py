"""LoRA adapters on disk, combined into one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops._arguments import check_flag, check_size, dtype_name, is_number, refuse
from ..ops.combine import MAJORITY_SIGNS, METHODS, combine_matrices, decomposed
from .adapters import PREFIX, Adapter, digest, read_adapters
from .export import Progress
from .peft_folder import CONFIG, NEUTRAL, WEIGHTS, LoRAConfig, refuse_listed
from .staging import Staging, check_destination

_CAT, _SVD = "cat", "svd"
COMBINATIONS = (*METHODS, _CAT, _SVD, *(f"{method}_{_SVD}" for method in METHODS if method != "linear"))
_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_PLAIN = "plain LoRA, which is all that can be combined"


@dataclass(frozen=True)
class CombineReport:
    """What `combine_adapters` has done.

    Attributes:
        destination: the folder.
        adapters: how many were combined.
        layers: how many have matrices.
        rank: of the new adapter.
        dtype: of its matrices.
        nbytes: of these.
        lost: of the layer that lost most, ‖Δ − B A‖ / ‖Δ‖ by the cut to the rank; None where nothing is cut.
    """

    destination: Path
    adapters: int
    layers: int
    rank: int
    dtype: str
    nbytes: int
    lost: float | None


@torch.no_grad()
def combine_adapters(
    adapters: Sequence[str | Path],
    destination: str | Path,
    method: str = "ties",
    *,
    weights: Sequence[float] | None = None,
    density: float = 1.0,
    rank: int | None = None,
    majority_sign: str = "total",
    seed: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """Writes one LoRA adapter that is a combination of several, as PEFT's `add_weighted_adapter` makes it of a model.

    "linear", "magnitude_prune", "dare_linear", "ties" and "dare_ties" combine A and B each by itself, see
    `ops.combine`; all adapters then have one rank. "cat" puts them side by side, and is the exact sum. "svd" is that
    sum cut to `rank`, and with `_svd` behind another name it is the combination of the whole changes that is cut.

    Args:
        adapters: folders of PEFT's.
        destination: the folder to write.
        method: one of those.
        weights: a number for each adapter, by default 1.
        density: the share of the elements that pruning keeps.
        rank: of the result with `svd`; by default the largest of the adapters'.
        majority_sign: "total" or "frequency", how the methods with `ties` elect a sign.
        seed: of the masks of DARE; by default they are drawn from torch's generator.
        overwrite: whether to replace an adapter at the destination.
        progress: as `export_checkpoint` takes it.

    Raises:
        FileExistsError: there is something at the destination.
        FileNotFoundError: a file of an adapter is not there.
        OSError: a file can't be written.
        ValueError: an argument or an adapter that does not fit; nothing is written then.
    """
    target, folders = Path(destination).absolute(), [Path(folder) for folder in adapters]
    if not folders:
        refuse("adapters", "none", "at least one folder")
    combination = _check(method, density, rank, majority_sign)
    check_flag("overwrite", overwrite)
    check_destination(target, overwrite, CONFIG, folders)

    read = read_adapters(folders, weights)
    layers, kept = _layers(read, needs_one_rank=not combination.cuts and method != _CAT)
    dtypes = {tensor.dtype for adapter in read for tensor in adapter.tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    new_rank = rank or max(pair.a.shape[0] for pairs in layers.values() for pair in pairs)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    stored = {f"{PREFIX}{name}": tensor for name, tensor in kept.items()}
    ranks: dict[str, int] = {}
    lost: list[float] = []
    with progress("combining", len(layers)) if progress else nullcontext(lambda: None) as advance:
        for name, pairs in layers.items():
            a, b, loss = combination.of(pairs, dtype, new_rank, generator)
            if not (a.sum(dtype=torch.float64) + b.sum(dtype=torch.float64)).isfinite():
                refuse(name, "matrices that are not finite when they are combined", "smaller weights")
            ranks[name] = a.shape[0]
            lost += [] if loss is None else [loss]
            for part, matrix in zip(pairs[0].parts, (a, b), strict=True):
                stored[f"{PREFIX}{name}.{part}"] = matrix.to(dtype).contiguous()
            advance()
    config = _config(read, ranks)
    inputs = [[digest(adapter), adapter.weight] for adapter in read]
    with Staging(target, inputs, overwrite, CONFIG) as staging:
        staging.save(WEIGHTS, stored)
        staging.write(CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        staging.commit()
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    return CombineReport(
        target, len(read), len(layers), max(ranks.values()), dtype_name(dtype), nbytes, max(lost) if lost else None
    )


def _check(method: Any, density: Any, rank: Any, majority_sign: Any) -> _Combination:
    if method not in COMBINATIONS:
        refuse("method", repr(method), f"one of {', '.join(COMBINATIONS)}")
    combination = _Combination(method, density, majority_sign)
    drops = combination.drops
    if not (is_number(density) and 0 <= density <= 1) or (drops and density == 0):
        refuse("density", repr(density), f"a number {'above 0' if drops else 'from 0'} to 1")
    if majority_sign not in MAJORITY_SIGNS:
        refuse("majority_sign", repr(majority_sign), " or ".join(MAJORITY_SIGNS))
    if rank is not None:
        check_size("rank", rank)
        if not combination.cuts:
            refuse("rank", f"{rank} with {method}", f"it with a method that ends in {_SVD}")
    return combination


@dataclass(frozen=True)
class _Pair:
    """An adapter's matrices for one layer, [rank, K] and [N, rank], and their names."""

    parts: tuple[str, str]
    a: Tensor
    b: Tensor
    scaling: float
    weight: float


@dataclass(frozen=True)
class _Combination:
    """How the pairs of a layer become one; the attributes are arguments of `combine_adapters`."""

    method: str
    density: float
    majority_sign: str

    @property
    def cuts(self) -> bool:
        return self.method.endswith(_SVD)

    @property
    def of_matrices(self) -> str:
        """What `ops.combine` calls the method that comes before the cut."""
        return "linear" if self.method in (_CAT, _SVD) else self.method.removesuffix(f"_{_SVD}")

    @property
    def drops(self) -> bool:
        return METHODS[self.of_matrices].drops

    def of(
        self, pairs: Sequence[_Pair], dtype: torch.dtype, rank: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, float | None]:
        """A, B and, of a method that cuts to the rank, the share that is lost, else None."""
        own = [pair.a.to(dtype) for pair in pairs], [pair.b.to(dtype) for pair in pairs]
        factors = [pair.scaling for pair in pairs], [pair.weight for pair in pairs]
        options: dict[str, Any] = {"density": float(self.density), "majority_sign": self.majority_sign}
        if self.drops and self.density < 1 and generator is not None:
            count = len(pairs) * (1 if self.cuts else 2)
            options["seeds"] = torch.randint(torch.iinfo(torch.int64).max, (count,), generator=generator)
        if self.method == _CAT:
            scaled = [a.float() * (scale * weight) for a, scale, weight in zip(own[0], *factors, strict=True)]
            return torch.cat(scaled), torch.cat(own[1], dim=1), None
        if not self.cuts:
            return *combine_matrices(*own, *factors, self.of_matrices, **options), None
        u, s, vh = decomposed(*own, *factors, self.of_matrices, **options)
        whole, lost = (part.double().square().sum().sqrt().item() for part in (s, s[rank:]))
        return vh[:rank], u[:, :rank] * s[:rank], lost / whole if whole else 0.0


def _layers(read: Sequence[Adapter], needs_one_rank: bool) -> tuple[dict[str, list[_Pair]], dict[str, Tensor]]:
    """The pairs of each layer, which fit each other; and the embeddings that PEFT writes beside adapters on them."""
    layers: dict[str, list[_Pair]] = {}
    kept: dict[str, Tensor] = {}
    for adapter in read:
        for layer, pair in _pairs(adapter, kept):
            layers.setdefault(layer, []).append(pair)
    misfits = []
    for layer, pairs in layers.items():
        sizes = {(pair.b.shape[0], pair.a.shape[1]) for pair in pairs}
        ranks = {pair.a.shape[0] for pair in pairs}
        if len(sizes) > 1:
            misfits.append(f"{layer}: got [N, K] of {' and '.join(map(str, sorted(sizes)))}, wanted one")
        elif needs_one_rank and len(ranks) > 1:
            misfits.append(f"{layer}: got ranks {sorted(ranks)}, wanted one; 'cat' and 'svd' take several")
    refuse_listed("adapters do not fit each other:", {"of different shapes": misfits})
    return layers, kept


def _pairs(adapter: Adapter, kept: dict[str, Tensor]) -> list[tuple[str, _Pair]]:
    """An adapter's layers with their pairs. Embeddings are put with those that other adapters have `kept`."""
    path = adapter.folder / CONFIG
    if adapter.kind != "LORA":
        refuse(str(path), f"an adapter of the type {adapter.kind}", _PLAIN)
    allowed = NEUTRAL | ({"bias"} if adapter.config.get("bias") == "none" else set())
    config = LoRAConfig(path, adapter.config, allowed | {"ensure_weight_tying"}, _PLAIN)
    found: list[tuple[str, _Pair]] = []
    left, misfits = dict(adapter.tensors), []
    for name in adapter.tensors:
        if name.endswith(".base_layer.weight"):
            tensor = left.pop(name)
            if not torch.equal(kept.setdefault(name, tensor), tensor):
                misfits.append(f"{name}: got another than the adapter before has, wanted one base")
        for parts in _PAIRS:
            layer = name.removesuffix(f".{parts[0]}")
            if layer == name or f"{layer}.{parts[1]}" not in left:
                continue
            a, b = left.pop(name), left.pop(f"{layer}.{parts[1]}")
            rank = config.rank_of(layer)
            if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == rank:
                misfits.append(f"{layer}: got {list(a.shape)} and {list(b.shape)}, wanted [{rank}, K], [N, {rank}]")
            found.append((layer, _Pair(parts, a, b, config.scaling(layer), adapter.weight)))
    differences = {"that are no pairs of matrices of LoRA": list(left), "of another shape": misfits}
    refuse_listed(f"{adapter.folder / WEIGHTS} can't be combined:", differences)
    return found


def _config(read: Sequence[Adapter], ranks: dict[str, int]) -> dict[str, Any]:
    """The first adapter's, with ranks for scalings of 1."""
    config = dict(read[0].config)
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config |= {"r": most, "lora_alpha": most, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    targeting = [[_unordered(adapter.config.get(name)) for name in _TARGETING] for adapter in read]
    if any(own != targeting[0] for own in targeting):
        config |= dict.fromkeys(_TARGETING) | {"target_modules": sorted(ranks)}
    if len({bool(adapter.config.get("fan_in_fan_out")) for adapter in read}) > 1:
        refuse("adapters", "some with fan_in_fan_out", "it in all of them or in none")
    return config


def _unordered(names: Any) -> Any:
    return sorted(names, key=str) if isinstance(names, list) else names  # PEFT writes sets
