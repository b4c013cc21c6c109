"""The trainable embeddings of prompt tuning and P-Tuning."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._arguments import bad, check_parameter_dtype, check_probability, check_size, refuse

Encoder = Literal["mlp", "lstm"]

_METADATA = "peft_kernels.soft_prompt"  # the entry of a file that has the sizes
_OF_PEFT = "prompt_embeddings"  # the tensor that PEFT saves: what its encoder returned


class SoftPrompt(nn.Module):
    """Embeddings before those of the tokens, as if they were further tokens.

    Prompt tuning: Lester et al. 2021 (arXiv:2104.08691), which draws them from [-0.5, 0.5]. P-Tuning: Liu et al. 2021
    (arXiv:2103.10385), with an MLP of three layers or a bidirectional LSTM and an MLP of two, which make them from
    other embeddings. The parameters have the names and the layout of PEFT's `PromptEmbedding` and `PromptEncoder`. The
    encoder runs once for a call, whatever the batch.

    Args:
        length: n, the number of virtual tokens.
        d: the width of the model's input embeddings.
        encoder: "mlp", "lstm", or None for prompt tuning.
        hidden_size: of the encoder, by default d.
        num_layers: of the LSTM.
        dropout: between the LSTM's layers.
        device, dtype: of the parameters.

    Raises:
        ValueError: a number is not positive, `dropout` no probability, `encoder` not known, or `hidden_size` given
            without one; it names it.
    """

    def __init__(
        self,
        length: int,
        d: int,
        encoder: Encoder | None = None,
        hidden_size: int | None = None,
        *,
        num_layers: int = 2,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if encoder is not None and encoder not in get_args(Encoder):
            refuse("encoder", repr(encoder), "'mlp', 'lstm' or None")
        if hidden_size is not None and encoder is None:
            refuse("hidden_size", repr(hidden_size), "None, since there is no encoder")
        width = d if hidden_size is None else hidden_size
        for name, size in {"length": length, "d": d, "hidden_size": width, "num_layers": num_layers}.items():
            check_size(name, size)
        check_probability("dropout", dropout)
        check_parameter_dtype(dtype)
        self.length, self.d, self.encoder = length, d, encoder
        self.hidden_size, self.num_layers, self.dropout = hidden_size, num_layers, dropout
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(length, d, **options)
        if encoder is None:
            nn.init.uniform_(self.embedding.weight, -0.5, 0.5)
        elif encoder == "mlp":
            sizes = (d, width, width, d)
            layers = [nn.Linear(k, n, **options) for k, n in pairwise(sizes)]
            self.mlp_head = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        else:
            self.lstm_head = nn.LSTM(
                d, width, num_layers, dropout=dropout, bidirectional=True, batch_first=True, **options
            )
            self.mlp_head = nn.Sequential(
                nn.Linear(2 * width, 2 * width, **options), nn.ReLU(), nn.Linear(2 * width, d, **options)
            )

    def forward(self) -> Tensor:
        """The embeddings [n, d]."""
        x: Tensor = self.embedding.weight
        if self.encoder is None:
            return x
        if self.encoder == "lstm":
            x = self.lstm_head(x)[0]
        y: Tensor = self.mlp_head(x)
        return y

    @classmethod
    def from_tokens(
        cls, embedding: nn.Module, token_ids: Sequence[int] | Tensor, length: int | None = None
    ) -> SoftPrompt:
        """Prompt tuning that begins with the embeddings of tokens, in fp32.

        Args:
            embedding: the model's, which maps int64 [n] to [n, d].
            token_ids: [n], of any integer dtype.
            length: cuts the tokens, or repeats them, to this number; by default theirs.

        Raises:
            ValueError: there are no tokens, or these are no token ids, or `length` is not positive.
        """
        ids = _checked_ids(token_ids)
        length = len(ids) if length is None else length
        check_size("length", length)
        ids = ids.repeat(math.ceil(length / len(ids)))[:length]
        weight = next(embedding.parameters())
        count = int(getattr(embedding, "num_embeddings", weight.shape[0]))
        if int(ids.min()) < 0 or int(ids.max()) >= count:
            refuse("token_ids", f"ids from {int(ids.min())} to {int(ids.max())}", f"ids from 0 to {count - 1}")
        with torch.no_grad():
            values = embedding(ids.to(weight.device)).float()
        prompt = cls(length, values.shape[-1], device=values.device, dtype=torch.float32)
        prompt.embedding.weight.data.copy_(values)
        return prompt

    def save(self, path: str | Path) -> None:
        """Writes the parameters and the sizes to a file of safetensors."""
        from safetensors.torch import save_file

        names = ("length", "d", "encoder", "hidden_size", "num_layers", "dropout")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, path, {_METADATA: json.dumps({name: getattr(self, name) for name in names})})

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> SoftPrompt:
        """What `save` wrote; or PEFT's `adapter_model.safetensors` of prompt tuning or P-Tuning, without the encoder.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
                described = (file.metadata() or {}).get(_METADATA)
        except SafetensorError as error:
            raise ValueError(f"path: got {path}, which has no safetensors: {error}") from None
        if described is None:
            values = tensors.get(_OF_PEFT)
            if list(tensors) != [_OF_PEFT] or values is None or values.dim() != 2:
                raise ValueError(f"path: got {path} with {', '.join(sorted(tensors))}, wanted a soft prompt")
            sizes, tensors = {"length": values.shape[0], "d": values.shape[1]}, {"embedding.weight": values}
        else:
            sizes = json.loads(described)
        try:
            prompt = cls(**sizes, device=device, dtype=tensors["embedding.weight"].dtype)
            prompt.load_state_dict(tensors)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"path: got {path}, whose tensors are not those of its sizes: {error}") from None
        return prompt

    def extra_repr(self) -> str:
        return f"length={self.length}, d={self.d}, encoder={self.encoder!r}"


def prepend(prompt: Tensor, tokens: Tensor, embedding: nn.Module) -> Tensor:
    """The embeddings of a prompt and of tokens, in the dtype of the tokens'.

    Args:
        prompt: [n, d], or [B, n, d] with one for each sequence.
        tokens: ids [B, S], or their embeddings [B, S, d].
        embedding: the model's, for ids.

    Returns:
        [B, n + S, d]
    """
    n = prompt.shape[-2]
    if not tokens.is_floating_point():
        # The look-up leaves room for the prompt, so that what it found is not copied once more.
        x: Tensor = embedding(F.pad(tokens, (n, 0)))
        if not x.requires_grad:
            x[:, :n] = prompt
            return x
        tokens = x[:, n:]  # a trained embedding, or a leaf for gradient checkpointing: nothing may be written into it
    # Rounded after it is expanded, so that the gradient of a batch is summed in the prompt's dtype.
    prompt = prompt.expand(tokens.shape[0], -1, -1).to(tokens.device, tokens.dtype)
    return torch.cat((prompt, tokens), 1)


def _checked_ids(token_ids: Any) -> Tensor:
    is_tensor = isinstance(token_ids, Tensor)
    if not is_tensor and not (
        isinstance(token_ids, Sequence)
        and all(type(one) is int for one in token_ids)
        and not isinstance(token_ids, str)
    ):
        bad("token_ids", token_ids, "a list of token ids")
    ids = token_ids if is_tensor else torch.tensor(token_ids, dtype=torch.int64)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype is torch.bool or len(ids) == 0:
        bad("token_ids", token_ids, "one token id or more [n]")
    result: Tensor = ids.long()
    return result
