"""What transformers knows of a checkpoint's model: which weights bitsandbytes quantises, and how they are stored.

The model is made without memory for its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops._arguments import refuse


@dataclass(frozen=True)
class Structure:
    """A model's modules, by their names in it.

    Attributes:
        linear: nn.Linear, and transformers' Conv1D.
        conv1d: those of them that store a dense weight as [in, out].
        transposed: the mixtures of experts whose stacks are [experts, in, out].
        kept: what stays dense when the model is quantised, unless it is told otherwise: the output layer, what is tied
            to it, and the last layer.
        kept_patterns: what stays in fp32 whenever the model is loaded.
        renamings: transformers' own, from the names in files to those in models; since transformers 5.
    """

    linear: frozenset[str]
    conv1d: frozenset[str]
    transposed: frozenset[str]
    kept: frozenset[str]
    kept_patterns: tuple[str, ...]
    renamings: tuple[Any, ...] = ()

    def renamed(self, names: Iterable[str]) -> dict[str, str]:
        """The names of a checkpoint's tensors by those that the model has for them."""
        if not self.renamings:
            return {}
        from transformers.core_model_loading import apply_renamings

        return {apply_renamings(name, list(self.renamings)): name for name in names}


def read_structure(folder: Path) -> Structure:
    """The structure of a folder's model.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: it has no such model.
    """
    try:
        import transformers
        from transformers.pytorch_utils import Conv1D
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ModuleNotFoundError(
            "needs transformers, which knows the layers of a model: pip install transformers", name="transformers"
        ) from None
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever it raises for what a file says
        raise ValueError(f"base: got {folder}, whose configuration transformers refuses: {error}") from error
    names = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        refuse("base", f"{folder}, a model of the class {names[0]!r}", "one of transformers' own classes")
    try:
        with torch.device("meta"):
            model: Any = kind(config)
    except Exception as error:
        raise ValueError(f"base: got {folder}, of which transformers makes no model: {error}") from error
    modules: dict[str, nn.Module] = dict(model.named_modules())
    output = model.get_output_embeddings()
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # a mapping since transformers 5
    last = [name for name, _ in model.named_parameters()][-1:]
    kept = {name.removesuffix(".weight") for name in (*tied, *tied.values(), *last)}
    kept |= {name for name, module in modules.items() if module is output}
    patterns = [*(model._keep_in_fp32_modules or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    conv1d = {name for name, module in modules.items() if isinstance(module, Conv1D)}
    return Structure(
        linear=frozenset(conv1d | {name for name, module in modules.items() if type(module) is nn.Linear}),
        conv1d=frozenset(conv1d),
        transposed=frozenset(name for name, module in modules.items() if getattr(module, "is_transposed", False)),
        kept=frozenset(kept & modules.keys()),
        kept_patterns=tuple(patterns),
        renamings=_renamings(model),
    )


def _renamings(model: Any) -> tuple[Any, ...]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:
        return ()
    return tuple(one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming))


def is_kept(module: str, patterns: Iterable[str]) -> bool:
    """Whether transformers keeps a module dense that patterns of `llm_int8_skip_modules` name.

    They name a module or one around it, or are the end of its name.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{key}){boundary}", module) or module.endswith(key) for key in patterns)
