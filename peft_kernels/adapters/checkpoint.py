"""Adapters and fusions on disk: AdapterHub's files, so that either library reads what the other wrote. No pickle.

A folder holds `adapter_config.json` and `adapter.safetensors`, for a fusion `adapter_fusion_config.json` and
`model_adapter_fusion.safetensors`. Where AdapterHub's configuration can't describe an adapter, the file has this
library's instead, under "peft_kernels", and AdapterHub refuses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..integrations.registry import check_module
from ..nn import AdapterFusion, BottleneckAdapter
from ..ops._arguments import FLOAT_DTYPES, path_of
from .config import AdapterConfig, FusionConfig
from .hook_points import HookPoint
from .hub import adapter_from_hub, adapter_to_hub, fusion_from_hub, fusion_to_hub
from .insertion import (
    check_known,
    check_new_name,
    find_state,
    fusion_hooks,
    hooks,
    insert,
    insert_fusion,
    make_layers,
    require_state,
)

Config = TypeVar("Config", AdapterConfig, FusionConfig)

OWN = "peft_kernels"  # the entry of this library, and its name in the version
LISTED = 5  # lines of each kind in an error's text


class Files(NamedTuple):
    """The names of a folder's files; `pickled` is AdapterHub's other form of the weights, which is not read."""

    config: str
    weights: str
    pickled: str


ADAPTER = Files("adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin")
FUSION = Files("adapter_fusion_config.json", "model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Writes the weights and the configuration of an adapter, or of a fusion without its adapters.

    Args:
        folder: is made if need be.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is no such adapter or fusion; `folder` is no path.
    """
    state = require_state(model)
    check_known(state, name)
    folder = path_of("folder", folder)
    described: dict[str, Any] = {
        "name": name,
        "model_class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", ""),
        "version": f"{OWN}.{_version()}",
    }
    if name in state.fusions:
        fusion = state.fusions[name]
        fusions = [(hook.point, hook.fusions[name]) for _, hook in hooks(model) if name in hook.fusions]
        fusion = replace(fusion, temperature=fusions[0][1].temperature)
        described["adapter_names"] = list(fusion.names)
        described["config"] = fusion_to_hub(fusion)
        series = all(state.adapters[one].kind != "parallel" for one in fusion.names)
        if not (series and _says(described, fusion, partial(fusion_from_hub, attention_dropout=0.0))):
            described[OWN] = asdict(fusion)
            del described["config"]
        _write(folder, FUSION, _fusion_tensors(fusions, name), described)
    else:
        config = state.adapters[name]
        layers = [(hook.point, hook.adapters[name]) for _, hook in hooks(model) if name in hook.adapters]
        described["hidden_size"] = layers[0][1].d
        described["config"] = adapter_to_hub(config, layers[0][1].d)
        if not _says(described, config, adapter_from_hub):
            described[OWN] = asdict(config)
            del described["config"]
        _write(folder, ADAPTER, _adapter_tensors(layers, name), described)


def _says(described: dict[str, Any], config: Config, read: Callable[[dict[str, Any]], Config]) -> bool:
    """Whether AdapterHub's configuration can express this library's."""
    try:
        return read(described) == config
    except ValueError:
        return False


def load_adapter(model: nn.Module, folder: str | Path, name: str | None = None) -> str:
    """Puts a saved adapter into a model, or a fusion over adapters that it has, and makes it what runs.

    The files may be this library's, or AdapterHub's of a bottleneck adapter or AdapterFusion. The rest is as with
    `insert_adapters` and `fuse_adapters`, but that a fusion's adapters are not frozen.

    Args:
        folder: with a configuration, and the weights as safetensors.
        name: what to call the adapter; by default as it was called. A fusion is always called by its adapters.

    Returns:
        The name.

    Raises:
        TypeError: `model` is not a module.
        FileNotFoundError: the files are not there, or the weights only as a pickle.
        ValueError: `folder` is no path; a name that is taken; a configuration of something else; weights whose names or
            shapes are not those of this model's layers, or that are no finite numbers in float32, bfloat16 or float16,
            with a list of the differences. The model is then unchanged.
    """
    check_module(model)
    folder = path_of("folder", folder)
    fusion = (folder / FUSION.config).is_file() and not (folder / ADAPTER.config).is_file()
    return _load_fusion(model, folder, name) if fusion else _load_adapter(model, folder, name)


def _load_adapter(model: nn.Module, folder: Path, name: str | None) -> str:
    described, stored = _read(folder, ADAPTER)
    saved_as: str = described["name"]
    name = saved_as if name is None else name
    check_new_name(find_state(model), name)
    try:
        config = _own(described, AdapterConfig) or adapter_from_hub(described)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / ADAPTER.config}: {error}") from None
    wanted = _adapter_tensors(make_layers(model, config, device="meta"), saved_as)
    if config.norm_before:  # which AdapterHub has under two names
        stored = {key.replace(".adapter_down.0.", ".adapter_norm_before."): t for key, t in stored.items()}
    stored = _fitting(folder / ADAPTER.weights, stored, wanted, model)
    insert(model, name, config, _dtype(stored))
    layers = [(hook.point, hook.adapters[name]) for _, hook in hooks(model) if name in hook.adapters]
    _copy(stored, _adapter_tensors(layers, saved_as))
    return name


def _load_fusion(model: nn.Module, folder: Path, name: str | None) -> str:
    described, stored = _read(folder, FUSION)
    state = require_state(model)
    try:
        dropout = getattr(getattr(model, "config", None), "attention_probs_dropout_prob", 0.0)
        config = _own(described, FusionConfig) or fusion_from_hub(described, dropout)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / FUSION.config}: {error}") from None
    if name not in (None, config.name):
        raise ValueError(f"name: got {name!r}, wanted {config.name!r}: a fusion is called by its adapters")
    chosen = fusion_hooks(model, state, config)
    parallel = [one for one in config.names if state.adapters[one].kind == "parallel"]
    if parallel and OWN not in described:
        # AdapterHub's fusion of parallel adapters adds their input to the result once more.
        raise ValueError(
            f"{folder}: got AdapterHub's fusion of the parallel adapter {parallel[0]!r}, wanted series ones"
        )
    saved_as: str = described["name"]
    meta = [(hook.point, AdapterFusion(hook.features, **config.options, device="meta")) for hook in chosen]
    stored = _fitting(folder / FUSION.weights, stored, _fusion_tensors(meta, saved_as), model)
    insert_fusion(model, state, config, _dtype(stored))
    state.active = config.name
    _copy(stored, _fusion_tensors([(hook.point, hook.fusions[config.name]) for hook in chosen], saved_as))
    return config.name


# ---- Names ----------------------------------------------------------------------------------------------------------


def _adapter_tensors(layers: Iterable[tuple[HookPoint, BottleneckAdapter]], name: str) -> dict[str, Tensor]:
    """The layers' own tensors under AdapterHub's names."""
    tensors = {}
    for point, layer in layers:
        # There `down` follows the LayerNorm in a Sequential.
        down = "adapter_down.0." if layer.norm_before is None else "adapter_down.1."
        parts = {"down.": down, "up.": "adapter_up.", "scale": "scaling", "norm_": "adapter_norm_"}
        for key, tensor in layer.state_dict().items():
            part = next((part for part in parts if key.startswith(part)), "")
            tensors[f"{point.hub_path}.adapters.{name}.{parts.get(part, '')}{key.removeprefix(part)}"] = tensor
    return tensors


def _fusion_tensors(layers: Iterable[tuple[HookPoint, nn.Module]], name: str) -> dict[str, Tensor]:
    """The layers' own tensors under AdapterHub's names."""
    return {
        f"{point.hub_path}.adapter_fusion_layer.{name}.{key}": tensor
        for point, layer in layers
        for key, tensor in layer.state_dict().items()
    }


def _fitting(
    path: Path, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """A file's tensors under the wanted names, if names and shapes match and all numbers are finite.

    The names may begin with that of the base model in a model with a head, or not, whichever either has.

    Raises:
        ValueError: they are not; with a list of the differences.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    by_name = {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
    names = {key.removeprefix(prefix): key for key in wanted}
    both = [key for key in names if key in by_name]
    different = {
        "missing": [names[key] for key in names if key not in by_name],
        "not the model's": [key for key in by_name if key not in names],
        "of another shape": [
            f"{names[key]}: got {list(by_name[key].shape)}, wanted {list(wanted[names[key]].shape)}"
            for key in both
            if by_name[key].shape != wanted[names[key]].shape
        ],
        "of another dtype": [
            f"{names[key]}: got {by_name[key].dtype}, wanted one of {', '.join(map(str, FLOAT_DTYPES))}"
            for key in both
            if by_name[key].dtype not in FLOAT_DTYPES
        ],
        "with numbers that are not finite": [
            names[key] for key in both if by_name[key].dtype in FLOAT_DTYPES and not by_name[key].isfinite().all()
        ],
    }
    lines = []
    for what, keys in different.items():
        if keys:
            lines.append(f"  {len(keys)} {what}:")
            lines += [f"    {key}" for key in keys[:LISTED]]
            lines += ["    …"] * (len(keys) > LISTED)
    if lines:
        raise ValueError("\n".join([f"{path} does not fit a {type(model).__name__}, so nothing was loaded:", *lines]))
    return {names[key]: tensor for key, tensor in by_name.items()}


def _copy(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key, tensor in own.items():
        tensor.copy_(stored[key])  # what state_dict returns is detached


def _dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that can hold the numbers of all tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))


# ---- Files ----------------------------------------------------------------------------------------------------------


def _write(folder: Path, files: Files, tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{name}.part" for name in (files.weights, files.config)]
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, parts[0])
    parts[1].write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
    for part in parts:  # what was there before stays whole until now
        part.rename(part.with_suffix(""))


def _read(folder: Path, files: Files) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, weights = folder / files.config, folder / files.weights
    if not config.is_file():
        raise FileNotFoundError(f"folder: got {folder}, wanted one with {ADAPTER.config} or {FUSION.config}")
    if not weights.is_file():
        pickled = f", but {files.pickled}, a pickle, which is not read" if (folder / files.pickled).is_file() else ""
        raise FileNotFoundError(f"folder: got {folder}, which has no {files.weights}{pickled}")
    try:
        described = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{config}: got no JSON: {error}") from None
    if not isinstance(described, dict) or not isinstance(described.get("name"), str):
        raise ValueError(f"{config}: got an adapter without a name, wanted AdapterHub's configuration")
    try:
        return described, load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights}: got no safetensors: {error}") from None


def _own(described: Mapping[str, Any], cls: type[Config]) -> Config | None:
    """The configuration that `_write` added."""
    entries = described.get(OWN)
    if entries is None:
        return None
    if not isinstance(entries, Mapping):
        raise ValueError(f"{OWN}: got {entries!r}, wanted the configuration's entries")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()
    }
    return cls(**values)


def _version() -> str:
    from .. import __version__

    return __version__
