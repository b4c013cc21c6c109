"""A model's checkpoint in Hugging Face's format, read one tensor at a time: `config.json` and safetensors.

Its weights are dense, or 4-bit ones as bitsandbytes serialises them: `x.weight` holds the codes, and its companions
`x.weight.absmax`, `.quant_map`, `.nested_absmax`, `.nested_quant_map` and `.quant_state.bitsandbytes__nf4` the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ops._arguments import refuse
from ..ops.nf4 import NF4Weight
from .peft_folder import read_json, refuse_listed, stamp_of
from .structure import Structure, read_structure

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
HEAD = "lm_head.weight"
_EMBEDDINGS = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings|embed_in|shared)\.weight")
_WITH_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "BOOL": torch.bool,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_COMPANION = re.compile(
    r"(.+)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4))"
)
# A mixture's experts as most checkpoints have them, each matrix by itself; models have them as stacks.
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_RENAMED = (
    (".mlp.", ".block_sparse_moe."),
    (".experts.gate_up_proj", ".input_linear.weight"),
    (".experts.down_proj", ".output_linear.weight"),
)
_STACKS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1), "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        files: which file has the tensor, and which its companions, by their names.
        shape: of the values; a quantised weight's is [out, in].
        dtype: of the values.
        state: the rest of a quantised weight's state, else None.
    """

    name: str
    files: dict[str, Path]
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: dict[str, Any] | None = None

    @property
    def is_nested(self) -> bool:
        """Whether a quantised weight's absmax are quantised, too."""
        return f"{self.name}.nested_absmax" in self.files

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors, under their names."""
        read = {}
        for name, path in self.files.items():
            # Opened anew each time, as the pages of an open file stay in memory once they have been read.
            with safe_open(path, "pt") as file:
                read[name] = file.get_tensor(name)
        return read

    def quantized(self) -> NF4Weight:
        """A quantised weight.

        Raises:
            ValueError: its parts do not fit each other.
        """
        assert self.state is not None
        parts = {name.removeprefix(f"{self.name}."): tensor for name, tensor in self.parts().items()}
        state = SimpleNamespace(shape=self.shape, dtype=self.dtype, offset=None, state2=None)
        try:
            state.blocksize, state.quant_type = self.state["blocksize"], self.state["quant_type"]
            state.absmax = parts["absmax"]
            if "nested_absmax" in parts:
                state.offset = torch.tensor(float(self.state["nested_offset"]))
                state.state2 = SimpleNamespace(
                    absmax=parts["nested_absmax"],
                    blocksize=self.state["nested_blocksize"],
                    code=parts["nested_quant_map"],
                    dtype=_dtype(self.state["nested_dtype"]),
                )
            weight = NF4Weight.from_quant_state(parts[self.name], state)
            codebook = weight.as_dict()["quant_map"]
            if not torch.equal(parts["quant_map"].float(), codebook):
                refuse("quant_map", "other values", f"those of {state.quant_type}")
        except KeyError as error:
            raise ValueError(f"{self.name}: got a 4-bit weight without {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from None
        return weight

    def values(self) -> Tensor:
        """The values, of the dtype; those of a quantised weight [out, in] whatever the model's layer stores."""
        return self.quantized().dequantize() if self.state is not None else self.parts()[self.name]


@dataclass(frozen=True)
class Piece:
    """A matrix that a checkpoint has of a stack [experts, out, in]: rows of one expert, from `begin` on."""

    name: str
    expert: int
    begin: int


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model's folder.

    Attributes:
        config: of `config.json`.
        tensors: by their names, in the files' order.
        stacks: the pieces of each stack of experts that the model has and the files do not, by the model's names.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]
    paths: tuple[Path, ...]
    stacks: dict[str, list[Piece]] = field(default_factory=dict)

    @cached_property
    def structure(self) -> Structure:
        """What transformers knows of the model.

        Raises:
            ModuleNotFoundError: transformers is not installed.
            ValueError: it has no such model.
        """
        return read_structure(self.folder)

    @cached_property
    def conv1d(self) -> frozenset[str | None] | None:
        """The dense weights that are [in, out]; None where no model of this type has such, or transformers is absent.

        PEFT's configuration has one flag for all layers, which is that of the last one.
        """
        if self.config.get("model_type") not in _WITH_CONV1D:
            return None
        try:
            return frozenset(self.find(f"{module}.weight") for module in self.structure.conv1d)
        except (ModuleNotFoundError, OSError, ValueError):
            return None

    @cached_property
    def _renamed(self) -> dict[str, str]:
        try:
            return self.structure.renamed(self.tensors)
        except (ModuleNotFoundError, OSError, ValueError):
            return {}

    @property
    def is_quantized(self) -> bool:
        return any(tensor.state is not None for tensor in self.tensors.values())

    @property
    def tied(self) -> tuple[str, str] | None:
        """The weight of the output layer that the files lack, as it is the embeddings', and that of these."""
        kind = str((self.config.get("architectures") or [None])[0])
        if HEAD in self.tensors or not re.search("CausalLM|LMHead|ConditionalGeneration", kind):
            return None
        embeddings = [name for name in self.tensors if _EMBEDDINGS.fullmatch(name)]
        return (HEAD, embeddings[0]) if len(embeddings) == 1 else None

    @property
    def stamp(self) -> list[Any]:
        """What changes when the checkpoint does."""
        return [str(self.folder.resolve()), self.config, *([path.name, *stamp_of(path)] for path in self.paths)]

    def find(self, name: str) -> str | None:
        """The checkpoint's name of a parameter that the model calls `name`.

        A checkpoint may lack the name of the base model in front, or have it where the adapter's model did not; it may
        have the names of before transformers 5. transformers, which knows them all, is only asked in the end.
        """
        spellings = [name]
        for new, old in _RENAMED:
            spellings += [spelling.replace(new, old) for spelling in spellings if new in spelling]
        for known in spellings:
            if known in self.tensors:
                return known
            shorter = known.partition(".")[2]
            if shorter in self.tensors:
                return shorter
            longer = [one for one in self.tensors if one.partition(".")[2] == known]
            if len(longer) == 1:
                return longer[0]
        return self._renamed.get(name)


def read_base(folder: Path) -> BaseCheckpoint:
    """What a folder's files say they hold; no values are read.

    Raises:
        FileNotFoundError: there is no `config.json`, or there are no safetensors.
        ValueError: a file is no safetensors, or is cut off; the index names what is not there, or leaves the folder; a
            dtype, or a kind of quantisation, that is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"base: got {folder}, wanted a folder with {CONFIG}")
    config = read_json(folder / CONFIG, "a model's configuration")
    quantization = config.get("quantization_config")
    if quantization and not _is_4bit(quantization):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        refuse("base", f"a checkpoint quantised by {method!r}", "a dense one, or one of bitsandbytes in 4 bits")
    paths, listed = _files(folder)
    found: dict[str, tuple[Path, list[int], str]] = {}  # file, shape, dtype
    states: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, shape, kind, state in _entries(path):
            if name in found:
                raise ValueError(f"base: got {name} in {found[name][0].name} and in {path.name}, wanted it once")
            found[name] = path, shape, kind
            if state is not None:
                states[name.rpartition(".quant_state.")[0]] = state
    missing = [f"{name} in {file}" for name, file in listed.items() if name not in found or found[name][0].name != file]
    refuse_listed(f"{folder / INDEX} does not fit its files:", {"missing": missing})

    tensors: dict[str, Stored] = {}
    companions: dict[str, list[str]] = {name: [] for name in states if name in found}
    for name in found:
        match = _COMPANION.fullmatch(name)
        if match and match[1] in companions:
            companions[match[1]].append(name)
    belonging = {name for names in companions.values() for name in names}
    unsupported = []
    for name, (path, shape, kind) in found.items():
        if name in belonging:
            continue
        if name in companions:
            state, files = states[name], {one: found[one][0] for one in (name, *companions[name])}
            tensors[name] = Stored(name, files, _shape(name, state), _dtype(state.get("dtype")), state)
        elif kind in _DTYPES:
            tensors[name] = Stored(name, {name: path}, tuple(shape), _DTYPES[kind])
        else:
            unsupported.append(f"{name}: got {kind}, wanted one of {', '.join(_DTYPES)}")
    refuse_listed(f"base: got {folder}, which can't be exported:", {"of an unsupported dtype": unsupported})
    return BaseCheckpoint(folder, config, tensors, (folder / CONFIG, *paths), _stacks(tensors))


def _is_4bit(quantization: Any) -> bool:
    if not isinstance(quantization, dict):
        return False
    return quantization.get("quant_method", "bitsandbytes") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files with weights, and which of them the index names for each tensor."""
    if (folder / SINGLE).is_file():  # which transformers looks for first
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX, "an index of weights").get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            refuse(f"{folder / INDEX}: weight_map", "none", "the names of files by those of tensors")
        names = sorted(set(listed.values()))
        for name in names:
            if name != Path(name).name or not name.endswith(".safetensors"):
                refuse(f"{folder / INDEX}", f"the file {name!r}", "names of safetensors in the same folder")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"base: got {folder}, which has no {name}, as {INDEX} says")
        return [folder / name for name in names], listed
    pickled = next((name for name in _PICKLES if (folder / name).is_file()), None)
    others = f", but {pickled}, a pickle, which is not read" if pickled else ""
    raise FileNotFoundError(f"base: got {folder}, which has no {SINGLE} or {INDEX}{others}")


def _entries(path: Path) -> Iterator[tuple[str, list[int], str, dict[str, Any] | None]]:
    """Name, shape and dtype of each tensor of a file, and the state that it is the text of."""
    try:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys(), key=_natural):
                part = file.get_slice(name)
                match = _COMPANION.fullmatch(name)
                is_state = match is not None and match[2].startswith("quant_state.")
                state = json.loads(bytes(file.get_tensor(name).tolist())) if is_state else None
                if is_state and not isinstance(state, dict):
                    refuse(name, f"a {type(state).__name__}", "the state of a 4-bit weight")
                yield name, part.get_shape(), part.get_dtype(), state
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: got no whole safetensors: {error}") from None


def _natural(name: str) -> str:
    """By which layer 10 comes after layer 9."""
    return re.sub(r"\d+", lambda number: number[0].zfill(8), name)


def _shape(name: str, state: dict[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        refuse(f"{name}: quant_state.shape", repr(shape), "a list of sizes")
    return tuple(shape)


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        refuse("quant_state: dtype", repr(name), "the name of a dtype")
    return dtype


def _stacks(tensors: dict[str, Stored]) -> dict[str, list[Piece]]:
    stacks: dict[str, list[Piece]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match and len(tensor.shape) == 2:
            stack, half = _STACKS[match[3]]
            owner = match[1].replace(".block_sparse_moe", ".mlp")
            piece = Piece(name, int(match[2]), half * tensor.shape[0])
            stacks.setdefault(f"{owner}.experts.{stack}", []).append(piece)
    return stacks
