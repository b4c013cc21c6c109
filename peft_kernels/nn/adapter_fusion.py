"""AdapterFusion: attention over the outputs of several adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._arguments import check_flag, check_parameter_dtype, check_probability, check_size, is_number, refuse
from ..ops.adapter_fusion import fusion, fusion_of_bottlenecks


class AdapterFusion(nn.Module):
    """`z = residual + Σᵢ softmaxᵢ(dropout(q·kᵢ) / T) vᵢ`: q of a hidden state, kᵢ and vᵢ of adapter i's output.

    Pfeiffer et al. 2021 (arXiv:2005.00247). The value matrix starts as (about) the identity, so that the layer starts
    as a weighted mean of the adapters.

    Args:
        d: features.
        value: whether there is a value matrix.
        value_bias: whether it has a bias.
        temperature: T of a new layer's scores.
        temperature_decay: what T loses at each forward in training, down to 1.
        dropout: a probability in [0, 1), applied in training to the scores.
        device, dtype: of the parameters.

    Attributes:
        query, key, value: nn.Linear(d, d); value may be None.

    Raises:
        ValueError: an argument that does not fit; it names it, what it got and what it wanted.
    """

    _last_temperature: float | None = None  # of the last forward

    def __init__(
        self,
        d: int,
        *,
        value: bool = True,
        value_bias: bool = False,
        temperature: float = 1.0,
        temperature_decay: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("d", d)
        check_flag("value", value)
        check_flag("value_bias", value_bias)
        check_probability("dropout", dropout)
        check_parameter_dtype(dtype)
        if not (is_number(temperature) and temperature > 0):
            refuse("temperature", repr(temperature), "a positive number")
        if not (is_number(temperature_decay) and temperature_decay >= 0):
            refuse("temperature_decay", repr(temperature_decay), "a number of at least 0")
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d, self.dropout = d, dropout
        self.temperature, self.temperature_decay = temperature, temperature_decay
        self.query = nn.Linear(d, d, **made)
        self.key = nn.Linear(d, d, **made)
        self.value = nn.Linear(d, d, bias=value_bias, **made) if value else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew: query and key normal with deviation 0.02, value 1 on its diagonal and 1e-6 elsewhere."""
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.value is not None:
            nn.init.constant_(self.value.weight, 1e-6)
            with torch.no_grad():
                self.value.weight.fill_diagonal_(1.0)
            if self.value.bias is not None:
                nn.init.zeros_(self.value.bias)

    def forward(
        self,
        query_input: Tensor,
        adapter_outputs: Sequence[Tensor],
        residual: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """z for the hidden state [..., d] and the outputs of N adapters [..., d] each.

        A `temperature` that is given takes the place of the layer's own, which then does not decay.
        """
        options = self._options(temperature)
        return fusion(query_input, adapter_outputs, *self._matrices(), residual=residual, **options)

    def of_bottlenecks(
        self,
        query_input: Tensor,
        bottlenecks: Sequence[Tensor],
        up_weights: Sequence[Tensor],
        up_biases: Sequence[Tensor | None],
        scales: Sequence[float | Tensor],
        residual: Tensor | None = None,
        temperature: float | None = None,
    ) -> Tensor:
        """z for adapters' bottlenecks and what follows them, see `peft_kernels.ops.fusion_of_bottlenecks`."""
        return fusion_of_bottlenecks(
            query_input, bottlenecks, up_weights, up_biases, scales, *self._matrices(), residual=residual,
            **self._options(temperature),
        )  # fmt: skip

    def _matrices(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        value = (None, None) if self.value is None else (self.value.weight, self.value.bias)
        return self.query.weight, self.query.bias, self.key.weight, self.key.bias, *value

    def next_temperature(self) -> float:
        """The temperature of a forward; in training the layer's own decays with it.

        A forward in a backward is a checkpointed one that is run again: it has the last one's.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return self.temperature if self._last_temperature is None else self._last_temperature
        temperature = self._last_temperature = self.temperature
        if self.training:
            self.temperature = max(temperature - self.temperature_decay, min(temperature, 1.0))
        return temperature

    def _options(self, temperature: float | None) -> dict[str, Any]:
        temperature = self.next_temperature() if temperature is None else temperature
        return {"temperature": temperature, "dropout": self.dropout if self.training else 0.0}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, dropout={self.dropout}"
