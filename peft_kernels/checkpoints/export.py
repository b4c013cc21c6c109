"""A checkpoint with its adapters merged, quantised or dequantised, written a file at a time."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..ops._arguments import FLOAT_DTYPES, check_flag, check_size, dtype_name, is_number, refuse
from .adapters import Adapter, changes_of, digest, read_adapters
from .base import CONFIG, INDEX, SINGLE, BaseCheckpoint, read_base
from .four_bits import MergedWeight
from .items import Item, Settings, items_of, shards_of, untie
from .staging import Staging, check_destination
from .written import written

# What is not copied: weights in other formats, whose values are not those of the export.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|npz|tflite|ot)(\.index\.json)?|adapter_config\.json|\..*"
)
_TEMPLATES = "additional_chat_templates"
_SPARE_BYTES = 1 << 20

Progress = Callable[[str, int], AbstractContextManager[Callable[[], None]]]


@dataclass(frozen=True)
class ExportReport:
    """What `export_checkpoint` has done.

    Attributes:
        destination: the folder.
        files: of weights.
        nbytes: of these.
        tensors: of the base, those that are not stored more than once.
        merged: how many of them an adapter has changed.
        quantized: how many weights the export has in 4 bits.
        dequantized: how many only the base has in 4 bits.
        resumed: files that an earlier call had written, which was stopped.
        untied: the output layer has become another one than the embeddings.
        merged_weights: what these were stored as, those of resumed files left out.
    """

    destination: Path
    files: int
    nbytes: int
    tensors: int
    merged: int
    quantized: int
    dequantized: int
    resumed: int
    untied: bool
    merged_weights: tuple[MergedWeight, ...] = ()


def export_checkpoint(
    base: str | Path,
    destination: str | Path,
    adapters: Sequence[str | Path] = (),
    *,
    weights: Sequence[float] | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    blocksize: int = 64,
    double_quant: bool = True,
    skip_modules: Sequence[str] = (),
    correction: int = 0,
    dense_above: float | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a checkpoint of transformers with adapters of PEFT merged, in 16 or in 4 bits.

    Without adapters it quantises, or dequantises. At no time there is more of the model in memory than one file that is
    written, and the tensor that is worked on. The folder is written beside its destination, and moved there once it is
    whole. A call that was stopped is gone on with by the next one with the same arguments.

    Args:
        base: a folder with `config.json` and safetensors, dense or in bitsandbytes' 4 bits.
        destination: the folder to write. What else the base has, as its tokenizer, is copied to it.
        adapters: folders of PEFT's, all of LoRA (with rsLoRA, DoRA) or all of (IA)³. Each change is that of the base's
            weight: `W + Σᵢ weightᵢ · scalingᵢ Bᵢ Aᵢ`, which is computed in fp64 and rounded once.
        weights: a number for each adapter, by default 1.
        quantize: 'nf4' or 'fp4' for 4-bit weights in bitsandbytes' storage, which `from_pretrained` loads; needs
            transformers. 'base' for what the base has: the same 4 bits, or dense weights. By default weights are dense.
        dtype: of the dense tensors, and of the values that are quantised: fp32, bf16 or fp16. By default the base's.
        blocksize, double_quant: as `ops.quantize_4bit` takes them.
        skip_modules: what stays dense beside the output layer, as `BitsAndBytesConfig.llm_int8_skip_modules` has it.
        correction: the rank of a LoRA branch that a merged 4-bit weight has beside its codes, `NAME.correction_A` and
            `NAME.correction_B`, as `merging.options` describes it and `merging.load_corrections` loads it.
        dense_above: a merged 4-bit weight that loses more than this share of what the adapters change is stored dense.
        max_shard_size: bytes of a file; weights that become dense are not counted in advance.
        overwrite: whether to replace a checkpoint at the destination.
        progress: what shows it: `progress(text, total)` is a context that gives a function, which is called after each
            tensor.

    Returns:
        What was done.

    Raises:
        FileExistsError: there is something at the destination.
        FileNotFoundError: a file of the base or of an adapter is not there.
        ModuleNotFoundError: transformers is needed and not installed.
        OSError: a file can't be written, as on a full disk. The next call goes on there.
        ValueError: an argument, a file or an adapter that does not fit; nothing is written then.
    """
    base_folder, target = Path(base), Path(destination).absolute()
    settings = _check(quantize, dtype, blocksize, double_quant, skip_modules, max_shard_size, correction, dense_above)
    check_flag("overwrite", overwrite)
    folders = [Path(folder) for folder in adapters]
    check_destination(target, overwrite, CONFIG, [base_folder, *folders])

    checkpoint = read_base(base_folder)
    settings = _as_base(settings, checkpoint) if settings.quantize == "base" else settings
    if settings.quantize is None and (correction or dense_above is not None):
        asked = f"correction={correction}" if correction else f"dense_above={dense_above}"
        refuse("quantize", f"dense weights, with {asked}", "4-bit ones, which these are for")
    read = read_adapters(folders, weights)
    # Dense weights of Conv1D are [in, out], and 4-bit ones [out, in].
    structure = checkpoint.structure if settings.quantize is not None or checkpoint.is_quantized else None
    changes = changes_of(read, checkpoint)
    untied = untie(checkpoint, changes)
    items, kept = items_of(checkpoint, changes, structure, settings, untied)
    shards = shards_of(items, settings)
    planned = {item.module for item in items if item.module is not None}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    with Staging(target, _inputs(checkpoint, read, settings, shards), overwrite, CONFIG) as staging:
        left = {name: shard for name, shard in zip(names, shards, strict=True) if not staging.has(name)}
        merged = _write(staging, left, settings, progress)
        owners, nbytes = _owners(staging, names)
        items = [item if f"{item.name}.absmax" in owners else replace(item, module=None) for item in items]
        kept += sorted(planned - {item.module for item in items})  # what became dense
        _finish(staging, checkpoint, _config(checkpoint.config, settings, items, kept, untied), owners, nbytes)
        staging.commit()
    sources = [item for item in items if item.source.state is not None]
    return ExportReport(
        destination=target,
        files=len(names),
        nbytes=nbytes,
        tensors=len(items),
        merged=sum(item.change is not None for item in items),
        quantized=sum(item.quantizes for item in items),
        dequantized=sum(not item.quantizes for item in sources),
        resumed=len(names) - len(left),
        untied=untied,
        merged_weights=tuple(merged),
    )


def _inputs(
    checkpoint: BaseCheckpoint, adapters: Sequence[Adapter], settings: Settings, shards: Sequence[Sequence[Item]]
) -> dict[str, Any]:
    """What decides about an export's bytes: a call that was stopped is gone on with where all of it is the same."""
    from .. import __version__

    return {
        "version": __version__,
        "base": checkpoint.stamp,
        "adapters": [[digest(adapter), adapter.weight] for adapter in adapters],
        "settings": asdict(settings),
        "shards": [[item.name for item in shard] for shard in shards],
    }


def _check(
    quantize: Any, dtype: Any, blocksize: Any, double_quant: Any, skip_modules: Any, max_shard_size: Any,
    correction: Any, dense_above: Any,
) -> Settings:  # fmt: skip
    if quantize not in (None, "nf4", "fp4", "base"):
        refuse("quantize", repr(quantize), "None, 'nf4', 'fp4' or 'base'")
    if correction != 0:
        check_size("correction", correction)
    if dense_above is not None and not (is_number(dense_above) and dense_above >= 0):
        refuse("dense_above", repr(dense_above), "a share of at least 0, or None")
    if dtype is not None and dtype not in FLOAT_DTYPES:
        refuse("dtype", repr(dtype), f"None, {', '.join(map(str, FLOAT_DTYPES))}")
    check_size("blocksize", blocksize)
    if blocksize & (blocksize - 1) or not 32 <= blocksize <= 4096:
        refuse("blocksize", repr(blocksize), "a power of two from 32 to 4096")
    check_flag("double_quant", double_quant)
    check_size("max_shard_size", max_shard_size)
    if isinstance(skip_modules, str) or not all(isinstance(name, str) for name in skip_modules):
        refuse("skip_modules", repr(skip_modules), "a list of names")
    for pattern in skip_modules:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse("skip_modules", f"{pattern!r}: {error}", "names, or regular expressions for them")
    name = None if dtype is None else dtype_name(dtype)
    skipped = tuple(skip_modules)
    return Settings(quantize, name, blocksize, double_quant, max_shard_size, skipped, correction, dense_above)


def _as_base(settings: Settings, checkpoint: BaseCheckpoint) -> Settings:
    """With the format of the base's 4-bit weights, which have one, or dense where there are none."""
    for tensor in checkpoint.tensors.values():
        if tensor.state is not None:
            kind, blocksize = tensor.state["quant_type"], tensor.state["blocksize"]
            return replace(settings, quantize=kind, blocksize=blocksize, double_quant=tensor.is_nested)
    return replace(settings, quantize=None)


# ---- The folder -----------------------------------------------------------------------------------------------------


def _write(
    staging: Staging, shards: Mapping[str, Sequence[Item]], settings: Settings, progress: Progress | None
) -> list[MergedWeight]:
    """Writes files of weights, and says what changed ones were stored as.

    Args:
        shards: what is in each file, by the files' names.
    """
    items = [item for shard in shards.values() for item in shard]
    _check_space(staging.partial, sum(item.nbytes(settings) for item in items))
    merged: list[MergedWeight] = []
    with progress("exporting", len(items)) if progress else nullcontext(lambda: None) as advance:
        for name, shard in shards.items():
            tensors: dict[str, Tensor] = {}
            for item in shard:
                tensors |= written(item, settings, merged)
                advance()
            staging.save(name, tensors)
    return merged


def _config(
    entries: dict[str, Any], settings: Settings, items: Sequence[Item], kept: list[str], untied: bool
) -> dict[str, Any]:
    config = {name: value for name, value in entries.items() if name != "quantization_config"}
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "model_type" in part)]
    for part in parts:
        for name in ("dtype", "torch_dtype"):
            if settings.dtype and (name in part or (part is config and name == "dtype" and "torch_dtype" not in part)):
                part[name] = settings.dtype
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    if settings.quantize:
        dtypes = {item.dtype for item in items if item.quantizes}
        config["quantization_config"] = {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": dtype_name(dtypes.pop()) if len(dtypes) == 1 else "float32",
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": settings.quantize,
            "bnb_4bit_use_double_quant": settings.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": kept,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }
    return config


def _owners(staging: Staging, names: Sequence[str]) -> tuple[dict[str, str], int]:
    """Which file has each tensor, and how many bytes all of them have."""
    owners: dict[str, str] = {}
    size = 0
    for name in names:
        path = staging.folder / name
        with safe_open(path, "pt") as file:
            owners |= dict.fromkeys(file.keys(), name)
        with path.open("rb") as raw:  # 8 bytes, in which is the header's length, the header, and the tensors
            size += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
    return owners, size


def _finish(
    staging: Staging, checkpoint: BaseCheckpoint, config: dict[str, Any], owners: dict[str, str], size: int
) -> None:
    """Writes all that is not weights."""
    if len(set(owners.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(owners.items()))}
        staging.write(INDEX, json.dumps(index, indent=2) + "\n")
    for source in sorted([*checkpoint.folder.iterdir(), *checkpoint.folder.glob(f"{_TEMPLATES}/*")]):
        name = source.relative_to(checkpoint.folder).as_posix()
        if source.is_file() and source.name != CONFIG and not _WEIGHTS.fullmatch(source.name):
            staging.copy(source, name)
    staging.write(CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _check_space(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if wanted + _SPARE_BYTES > free:
        got = f"{os.strerror(errno.ENOSPC)}: got {free:,} bytes, wanted {wanted + _SPARE_BYTES:,}"
        raise OSError(errno.ENOSPC, got, str(folder))
