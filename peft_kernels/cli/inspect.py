"""What an adapter's folder holds: its method, its layers with the norms of their matrices, and what is wrong there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.peft_folder import CONFIG, PLAIN_BEGINNINGS, LoRAConfig, read_config, read_weights
from ..ops._arguments import dtype_name
from .output import Bytes, progress

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.weight)?")
_OF_METHODS = {
    "IA3": re.compile(r"(?P<layer>.+)\.(?P<part>ia3_l)(\.weight)?"),
    "LORA": _LORA,
    "PREFIX_TUNING": re.compile(r"(?P<layer>)(?P<part>prompt_embeddings)"),
    "PROMPT_TUNING": re.compile(r"(?P<layer>)(?P<part>prompt_embeddings)"),
    "P_TUNING": re.compile(r"(?P<layer>)(?P<part>prompt_embeddings)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help=f"with {CONFIG} and adapter_model.safetensors")


def run(options: argparse.Namespace) -> dict[str, Any]:
    folder: Path = options.folder
    try:
        entries = read_config(folder)
    except FileNotFoundError as error:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))  # where PEFT saves further adapters
        raise FileNotFoundError(f"{error}; {_some(inside)} in it have one" if inside else str(error)) from None
    method = entries.get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{folder / CONFIG}: got peft_type {method!r}, wanted the name of one of PEFT's methods")
    _, stored = read_weights(folder)
    rows, unused = _layers(folder / CONFIG, method, entries, stored)
    targets = entries.get("target_modules")
    return {
        "folder": str(folder),
        "method": _method(method, entries),
        "base_model": entries.get("base_model_name_or_path"),
        "task": entries.get("task_type"),
        "rank": _numbers(rows, "rank") or entries.get("r") or entries.get("num_virtual_tokens"),
        "alpha": entries.get("lora_alpha"),
        "scaling": _numbers(rows, "scaling"),
        "dropout": entries.get("lora_dropout"),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else targets,
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "size": Bytes(sum(tensor.numel() * tensor.element_size() for tensor in stored.values())),
        "dtypes": sorted({dtype_name(tensor.dtype) for tensor in stored.values()}),
        "layers": rows,
        "problems": _problems(folder / CONFIG, method, entries, rows, stored),
        "unused_keys": unused,
    }


def _method(method: str, entries: Mapping[str, Any]) -> str:
    kinds = {
        "use_dora": "DoRA",
        "use_rslora": "rsLoRA",
        "lora_bias": "with biases",
        "target_parameters": "on parameters",
    }
    return ", ".join([method, *(kind for name, kind in kinds.items() if entries.get(name))])


def _numbers(rows: list[dict[str, Any]], column: str) -> list[float]:
    return sorted({row[column] for row in rows if row.get(column) is not None})


def _layers(
    path: Path, method: str, entries: Mapping[str, Any], stored: Mapping[str, Tensor]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row for each layer, and the tensors that the method has no use for."""
    pattern = _OF_METHODS.get(method)
    # PEFT matches modules to save by the ends of their names, and saves embeddings that are targets or were resized.
    extra = [
        "embed_tokens",
        "lm_head",
        *(entries.get("modules_to_save") or ()),
        *(["bias"] if entries.get("bias") not in (None, "none") else ()),
    ]
    extra += ["lora_B.bias"] * bool(entries.get("lora_bias"))
    extra += ["trainable_tokens_delta", "token_adapter"] * bool(entries.get("trainable_token_indices"))
    parts: dict[str, dict[str, Tensor]] = {}
    unused = []
    for key, tensor in stored.items():
        name = key.removeprefix(_PREFIX)
        if pattern is None:
            parts[name] = {"value": tensor}
        elif match := pattern.fullmatch(name):
            parts.setdefault(match["layer"], {})[match["part"].removeprefix("embedding_")] = tensor
        elif any(f"{word}." in f"{name}." for word in extra):
            parts[name] = {"value": tensor}
        else:
            unused.append(key)
    config = None
    if method == "LORA":
        config = LoRAConfig(path, {**entries, "init_lora_weights": True}, set(entries) | {"init_lora_weights"}, "")
    rows = []
    with progress("norms", len(parts)) as advance:
        for layer, tensors in sorted(parts.items(), key=_in_order):
            rows.append({"layer": layer or "(the prompt)", **_row(layer, tensors, config)})
            advance()
    return rows, unused


def _in_order(item: tuple[str, Any]) -> list[tuple[int, str]]:
    """Numbered layers by their numbers, which a file has in any order."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


def _row(layer: str, tensors: Mapping[str, Tensor], config: LoRAConfig | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    a, b = tensors.get("A"), tensors.get("B")
    if config is not None and a is not None and b is not None and a.dim() > 1 and b.dim() > 1:
        rank, scaling = int(config.rank_of(layer)), config.scaling(layer)
        row |= {"rank": rank, "scaling": scaling}
        if a.shape[0] == b.shape[1] and a.shape[0] % rank == 0:
            row["norm_change"] = scaling * product_norm(a, b, rank)
    for part, tensor in sorted(tensors.items()):
        name = {"ia3_l": "l", "magnitude_vector": "magnitude", "prompt_embeddings": "embeddings"}.get(part, part)
        row[name] = "×".join(map(str, tensor.shape))
        row[f"norm_{name}"] = float(tensor.double().norm())
        if part == "ia3_l":
            row["norm_l_less_1"] = float((tensor.double() - 1).norm())
    row["not_finite"] = sum(int((~tensor.double().isfinite()).sum()) for tensor in tensors.values())
    return row


def product_norm(a: Tensor, b: Tensor, rank: int) -> float:
    """‖B A‖, by ‖B A‖² = Σ (BᵀB) ⊙ (A Aᵀ), whose factors are [rank, rank].

    Args:
        a: [E · rank, K, ...]; E is 1, or the number of experts.
        b: [N, E · rank, ...]; its columns go through the experts fastest, as PEFT stores them.
    """
    experts = a.shape[0] // rank
    a = a.double().reshape(experts, rank, -1)
    b = b.double().reshape(b.shape[0], rank, experts, -1).permute(2, 0, 3, 1).reshape(experts, -1, rank)
    squared = (torch.bmm(b.mT, b) * torch.bmm(a, a.mT)).sum()
    return float(squared.clamp_min(0).sqrt()) if squared.isfinite() else float(squared)


def _problems(
    path: Path, method: str, entries: Mapping[str, Any], rows: list[dict[str, Any]], stored: Mapping[str, Tensor]
) -> list[str]:
    """What will give trouble, in sentences."""
    found = []
    bad = [row["layer"] for row in rows if row["not_finite"]]
    if bad:
        found.append(f"{len(bad)} layers have numbers that are not finite: {_some(bad)}")
    if method == "LORA":
        for row in rows:
            has = {"A", "B"} & row.keys()
            if len(has) == 1:
                found.append(f"{row['layer']} has no lora_{({'A', 'B'} - has).pop()}")
            elif has and "norm_change" not in row:
                found.append(
                    f"{row['layer']} has A {row['A']} and B {row['B']}, which do not fit the rank "
                    f"{row.get('rank')} of {path.name}"
                )
            elif has and not entries.get("target_parameters") and row["A"].split("×")[0] != str(row["rank"]):
                found.append(f"{row['layer']} has A {row['A']}, but {path.name} says that its rank is {row['rank']}")
        if (start := entries.get("init_lora_weights")) not in PLAIN_BEGINNINGS:
            found.append(
                f"it began with {start!r}, which changes the base's weights as well: B A is not the whole change"
            )
        if entries.get("use_dora"):
            found.append("DoRA scales the rows of W + B A: the norm of the change is that of B A alone")
    targets = entries.get("target_modules")
    if isinstance(targets, list) and method in ("LORA", "IA3"):
        names = [row["layer"] for row in rows]
        idle = [str(t) for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if idle:
            found.append(f"{len(idle)} target modules have no weights: {_some(idle)}")
    if not stored:
        found.append("the file of weights holds no tensors")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
