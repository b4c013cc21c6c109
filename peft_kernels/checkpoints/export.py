"""A checkpoint with its adapters merged, quantised or dequantised, written a file at a time."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..ops._arguments import FLOAT_DTYPES, check_flag, check_size, dtype_name, is_number, refuse
from ..ops._svd import low_rank_factors
from ..ops.nf4 import quantize_4bit
from .adapters import changes_of, digest, read_adapters
from .base import CONFIG, INDEX, SINGLE, BaseCheckpoint, Stored, read_base
from .changes import Change, changed
from .four_bits import MergedWeight, factors_of, measured, values_of
from .staging import Staging, check_destination
from .structure import Structure, is_kept

# What is not copied: weights in other formats, whose values are not those of the export.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|npz|tflite|ot)(\.index\.json)?|adapter_config\.json|\..*"
)
_TEMPLATES = "additional_chat_templates"
_STATE_BYTES = 256  # about what the text of a 4-bit weight's state and its codebook take
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


@dataclass(frozen=True)
class _Settings:
    quantize: str | None
    dtype: str | None
    blocksize: int
    double_quant: bool
    max_shard_size: int
    skip_modules: tuple[str, ...]
    correction: int
    dense_above: float | None


@dataclass(frozen=True)
class _Item:
    """A tensor that is written, with its companions."""

    name: str
    source: Stored
    change: Change | None
    dtype: torch.dtype  # of the values
    module: str | None  # that is quantised
    is_conv1d: bool

    @property
    def quantizes(self) -> bool:
        return self.module is not None

    def nbytes(self, settings: _Settings) -> int:
        """About."""
        count = math.prod(self.source.shape)
        if not self.quantizes:
            return count * self.dtype.itemsize
        blocks = -(-count // settings.blocksize)
        statistics = blocks + 4 * (blocks // 256 + 257) if settings.double_quant else 4 * blocks
        corrects = settings.correction if self.change is not None else 0
        return count // 2 + statistics + _STATE_BYTES + corrects * sum(self.source.shape) * self.dtype.itemsize


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
    for folder in (base_folder, *folders):
        if folder.resolve().is_relative_to(target.resolve()):
            refuse("destination", f"{target}, which holds {folder}", "another folder than what is read")
    check_destination(target, overwrite, CONFIG)

    checkpoint = read_base(base_folder)
    settings = _as_base(settings, checkpoint) if settings.quantize == "base" else settings
    if settings.quantize is None and (correction or dense_above is not None):
        asked = f"correction={correction}" if correction else f"dense_above={dense_above}"
        refuse("quantize", f"dense weights, with {asked}", "4-bit ones, which these are for")
    read = read_adapters(folders, weights)
    # Dense weights of Conv1D are [in, out], and 4-bit ones [out, in].
    structure = checkpoint.structure if settings.quantize is not None or checkpoint.is_quantized else None
    changes = changes_of(read, checkpoint)
    untied = _untie(checkpoint, changes)
    items, kept = _items(checkpoint, changes, structure, settings, untied)
    shards = _shards(items, settings)
    from .. import __version__

    inputs = {
        "version": __version__,
        "base": checkpoint.stamp,
        "adapters": [[digest(adapter), adapter.weight] for adapter in read],
        "settings": asdict(settings),
        "shards": [[item.name for item in shard] for shard in shards],
    }
    planned = {item.module for item in items if item.module is not None}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    with Staging(target, inputs, overwrite, CONFIG) as staging:
        done = {name for name in names if staging.has(name)}
        left = [(name, shard) for name, shard in zip(names, shards, strict=True) if name not in done]
        _check_space(staging.partial, sum(item.nbytes(settings) for _, shard in left for item in shard))
        shown = progress("exporting", sum(len(shard) for _, shard in left)) if progress else nullcontext(lambda: None)
        merged: list[MergedWeight] = []
        with shown as advance:
            for name, shard in left:
                tensors: dict[str, Tensor] = {}
                for item in shard:
                    tensors |= _written(item, settings, merged)
                    advance()
                staging.save(name, tensors)
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
        resumed=len(done),
        untied=untied,
        merged_weights=tuple(merged),
    )


def _check(
    quantize: Any, dtype: Any, blocksize: Any, double_quant: Any, skip_modules: Any, max_shard_size: Any,
    correction: Any, dense_above: Any,
) -> _Settings:  # fmt: skip
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
    return _Settings(quantize, name, blocksize, double_quant, max_shard_size, skipped, correction, dense_above)


def _as_base(settings: _Settings, checkpoint: BaseCheckpoint) -> _Settings:
    """With the format of the base's 4-bit weights, which have one, or dense where there are none."""
    for tensor in checkpoint.tensors.values():
        if tensor.state is not None:
            kind, blocksize = tensor.state["quant_type"], tensor.state["blocksize"]
            return replace(settings, quantize=kind, blocksize=blocksize, double_quant=tensor.is_nested)
    return replace(settings, quantize=None)


# ---- What is written ------------------------------------------------------------------------------------------------


def _untie(checkpoint: BaseCheckpoint, changes: dict[str, Change]) -> bool:
    """Whether the output layer, which was the embeddings, has become another one; both then have changes."""
    if checkpoint.tied is None:
        return False
    head, embeddings = (changes.get(name) for name in checkpoint.tied)
    if head is None and embeddings is None:
        return False
    if head is not None and embeddings is not None and _same(head, embeddings):
        del changes[checkpoint.tied[0]]
        return False
    changes.setdefault(checkpoint.tied[0], Change())
    return True


def _same(a: Change, b: Change) -> bool:
    def parts(change: Change) -> Iterator[Any]:
        yield change.replaced
        for product in change.products.get(None, []):
            yield from (product.left, product.right, product.magnitude, product.scaling, product.weight)
        yield from change.scales

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return torch.equal(x, y)
        return x is y or (isinstance(x, float) and x == y)

    one, other = list(parts(a)), list(parts(b))
    return len(one) == len(other) and all(map(equal, one, other))


def _items(
    checkpoint: BaseCheckpoint,
    changes: Mapping[str, Change],
    structure: Structure | None,
    settings: _Settings,
    untied: bool,
) -> tuple[list[_Item], list[str]]:
    """The tensors in the order of the base, and the linear layers that stay dense."""
    quantized: dict[str, str] = {}  # the module of each
    kept, conv1d = [], set()
    if structure is not None:
        names = {module: checkpoint.find(f"{module}.weight") for module in sorted(structure.linear)}
        conv1d = {names[module] for module in structure.conv1d}
        skipped = [*settings.skip_modules, *sorted(structure.kept)]
        for module, name in names.items():
            tensor = checkpoint.tensors.get(name) if name else None
            dense_before = checkpoint.is_quantized and tensor is not None and tensor.state is None
            is_float = tensor is not None and tensor.dtype in FLOAT_DTYPES
            if name is None or not is_float or dense_before or is_kept(module, [*skipped, *structure.kept_patterns]):
                kept.append(module)
            else:
                quantized[name] = module
        kept = [*dict.fromkeys([*settings.skip_modules, *kept])]
        if settings.quantize:  # what is kept is kept for all modules that its name matches
            quantized = {name: module for name, module in quantized.items() if not is_kept(module, kept)}
    if settings.quantize is None:
        quantized = {}
    sources = {name: (name, tensor) for name, tensor in checkpoint.tensors.items()}
    if untied and checkpoint.tied is not None:
        head, embeddings = checkpoint.tied
        sources[head] = head, checkpoint.tensors[embeddings]
    wanted = getattr(torch, settings.dtype) if settings.dtype else None
    items = []
    for name, tensor in sources.values():
        change = changes.get(name)
        dtype = wanted if wanted is not None and tensor.dtype in FLOAT_DTYPES else tensor.dtype
        if change is not None and tensor.dtype not in FLOAT_DTYPES:
            refuse(
                f"base: {name}", dtype_name(tensor.dtype), "float32, bfloat16 or float16, which an adapter can change"
            )
        items.append(_Item(name, tensor, change, dtype, quantized.get(name), name in conv1d))
    return items, kept


def _shards(items: Sequence[_Item], settings: _Settings) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.nbytes(settings) > settings.max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes(settings)
    return shards


def _written(item: _Item, settings: _Settings, done: list[MergedWeight]) -> dict[str, Tensor]:
    """The stored tensors of an item; what a changed one came to is added to `done`."""
    source, change = item.source, item.change
    if change is None and _is_kept_as_it_is(item, settings):
        return {name.replace(source.name, item.name, 1): tensor for name, tensor in source.parts().items()}
    before = source.values()
    values = (before if change is None else changed(before, change, item.dtype)).to(item.dtype)
    if not values.sum(dtype=torch.float64).isfinite():  # numbers of 32 bits do not overflow such a sum
        refuse(item.name, "numbers that are not finite", f"those that {dtype_name(item.dtype)} can hold")
    if item.quantizes:
        tensors, merged = _in_4_bits(item, settings, before, values)
        lost = 0.0 if merged is None else merged.lost
        if settings.dense_above is None or lost <= settings.dense_above:
            done += [] if merged is None else [merged]
            return tensors
    if change is not None:
        done.append(measured(item.name, dtype_name(item.dtype), 0, before, change, values))
    turns = item.is_conv1d and source.state is not None
    return {item.name: (values.T if turns else values).contiguous()}


def _in_4_bits(
    item: _Item, settings: _Settings, before: Tensor, values: Tensor
) -> tuple[dict[str, Tensor], MergedWeight | None]:
    """The tensors of a 4-bit weight, and what it lost of a change."""
    assert settings.quantize is not None
    change, turns = item.change, item.is_conv1d and item.source.state is None
    correction, state = None, None
    if change is not None and settings.correction:
        factors = factors_of(change, settings.correction)
        if factors is not None and _is_kept_as_it_is(item, settings):
            state = item.source.quantized()
        else:
            values = changed(before, change, torch.float32)
            factors = factors or low_rank_factors(values - before.float(), settings.correction)
        a, b = (factors[1].T, factors[0].T) if turns else factors
        correction = a.to(item.dtype).contiguous(), b.to(item.dtype).contiguous()
        if state is None:
            rest = (values.T if turns else values) - correction[1].float() @ correction[0].float()
            values = rest.to(item.dtype)
    elif turns:
        values = values.T
    if state is None:
        state = quantize_4bit(values.contiguous(), settings.blocksize, settings.quantize, settings.double_quant)
    rest_of_state, tensors = {}, {item.name: state.codes.view(-1, 1)}
    for name, value in state.as_dict().items():
        if isinstance(value, Tensor):
            tensors[f"{item.name}.{name}"] = value
        else:
            rest_of_state[name] = value
    text = json.dumps(rest_of_state).encode()
    tensors[f"{item.name}.quant_state.bitsandbytes__{settings.quantize}"] = torch.tensor(list(text), dtype=torch.uint8)
    if correction is not None:
        layer = item.name.removesuffix(".weight")
        tensors |= {f"{layer}.correction_{name}": one for name, one in zip("AB", correction, strict=True)}
    if change is None:
        return tensors, None
    stored = values_of(state, correction)
    rank = 0 if correction is None else len(correction[0])
    return tensors, measured(item.name, settings.quantize, rank, before, change, stored.T if turns else stored)


def _is_kept_as_it_is(item: _Item, settings: _Settings) -> bool:
    state = item.source.state
    if state is None:
        return not item.quantizes and item.dtype is item.source.dtype
    same = (state.get("quant_type"), state.get("blocksize")) == (settings.quantize, settings.blocksize)
    same_statistics = item.source.is_nested is settings.double_quant
    return item.quantizes and same and same_statistics and item.dtype is item.source.dtype


# ---- The rest of the folder -----------------------------------------------------------------------------------------


def _config(
    entries: dict[str, Any], settings: _Settings, items: Sequence[_Item], kept: list[str], untied: bool
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
