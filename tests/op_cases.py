"""A call of every public function of `peft_kernels.ops` and of every layer of `peft_kernels.nn`, for the tests that
hold for all of them: a function or a layer that is missing here makes them fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from peft_kernels import nn, ops
from peft_kernels.ops import AdapterWeights, ExpertStack, NF4Weight

N, K, R, M = 24, 64, 4, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


def seed() -> Tensor:
    return torch.tensor([7])


def weight4bit() -> NF4Weight:
    return ops.quantize_4bit(randn(N, K))


def _adapter() -> dict[str, Any]:
    return {
        "down_weight": randn(R, K) / 8, "down_bias": randn(R), "up_weight": randn(K, R), "up_bias": randn(K),
        "scale": torch.tensor([1.5]), "layer_norm": (randn(K), randn(K), 1e-5),
    }  # fmt: skip


def _adapter_options() -> dict[str, Any]:
    return {"activation": "gelu", "dropout": 0.5, "seed": seed(), "out_dtype": torch.float32,
            "post_layer_norm": (randn(K), randn(K), 1e-5)}  # fmt: skip


def _fusion() -> dict[str, Any]:
    return {
        "query_input": randn(M, K), "query_weight": randn(K, K) / 8, "query_bias": randn(K),
        "key_weight": randn(K, K) / 8, "key_bias": randn(K), "value_weight": randn(K, K) / 8, "value_bias": randn(K),
        "residual": randn(M, K), "temperature": 8.0, "dropout": 0.5, "seed": seed(), "out_dtype": torch.float32,
    }  # fmt: skip


def _linear(weight: Tensor | NF4Weight) -> dict[str, Any]:
    return {"x": randn(M, K), "weight": weight, "bias": randn(N), "compute_dtype": torch.float32,
            "out_dtype": torch.float32}  # fmt: skip


def _lora(weight: Tensor | NF4Weight) -> dict[str, Any]:
    return _linear(weight) | {"lora_A": [randn(R, K), randn(2, K)], "lora_B": [randn(N, R), randn(N, 2)],
                              "scaling": [0.5, 2.0]}  # fmt: skip


def _experts_lora(weight: Tensor | NF4Weight, transposed: bool = False) -> dict[str, Any]:
    k, n = weight.shape[1:] if transposed else weight.shape[:0:-1]
    return {"weight": weight, "bias": randn(2, n), "lora_A": [randn(2 * R, k), randn(2, k)],
            "lora_B": [randn(n, 2 * R), randn(n, 2)], "scaling": [0.5, 2.0]}  # fmt: skip


def _grouped(weight: Tensor | NF4Weight) -> dict[str, Any]:
    return _experts_lora(weight) | {"x": randn(M + 2, K), "offsets": torch.tensor([3, 4]),
                                    "compute_dtype": torch.float32, "out_dtype": torch.float32}  # fmt: skip


def _experts(weight: Tensor | NF4Weight) -> dict[str, Any]:
    return {
        "x": randn(M, K), "index": torch.tensor([[0, 1], [1, 0], [1, 2]]), "routing_weights": torch.rand(M, 2),
        "gate_up": ExpertStack(**_experts_lora(weight)),
        "down": ExpertStack(**_experts_lora(randn(2, N // 2, K), True), transposed=True),
    }  # fmt: skip


def stack4bit() -> NF4Weight:
    return ops.quantize_4bit(randn(2, N, K))


def _dora(weight: Tensor | NF4Weight) -> dict[str, Any]:
    return {"weight": weight, "lora_A": randn(R, K), "lora_B": randn(N, R), "scaling": 0.5}


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "adapter": lambda: {
        "x": randn(M, K), "residual": randn(M, K), "gate": randn(M, 1),
    } | _adapter() | _adapter_options(),
    "adapter_grouped": lambda: {
        "x": randn(M, 2, K), "residual": randn(M, 2, K), "gate": randn(M, 1, 1), "index": [0, 1, -1],
        "adapters": [AdapterWeights(**_adapter()), AdapterWeights(**_adapter())],
    } | _adapter_options(),
    "bottleneck": lambda: {
        "x": randn(M, K), "down_weight": randn(R, K) / 8, "down_bias": randn(R), "activation": "gelu",
        "layer_norm": (randn(K), randn(K), 1e-5),
    },
    "combine": lambda: {
        "deltas": [randn(N, K), randn(N, K)], "weights": [0.5, 2.0], "method": "dare_ties", "density": 0.5,
        "majority_sign": "total", "seeds": torch.tensor([7, 8]),
    },
    "combine_products": lambda: {
        "lora_A": [randn(R, K), randn(2, K)], "lora_B": [randn(N, R), randn(N, 2)], "scaling": [0.5, 2.0],
        "weights": [0.5, 2.0], "method": "dare_ties", "density": 0.5, "majority_sign": "total",
        "seeds": torch.tensor([7, 8]),
    },
    "cross_entropy": lambda: {"logits": randn(M, N), "targets": torch.tensor([1, 5, -100]), "ignore_index": -100},
    "dequantize_4bit": lambda: {"weight": weight4bit(), "dtype": torch.float32},
    "dequantize_4bit_rows": lambda: {"weight": weight4bit(), "first_row": 0, "out": torch.empty(2, K)},
    "dora_linear": lambda: _linear(randn(N, K)) | _dora(randn(N, K)) | {
        "magnitude": randn(N), "norm": 1 + torch.rand(N), "dropout": 0.5, "seed": seed(),
    },
    "dora_norm": lambda: _dora(randn(N, K)) | {"squares": K + torch.rand(N)},
    "dropout": lambda: {"x": randn(M, K), "p": 0.5, "seed": seed()},
    "experts": lambda: _experts(randn(2, N, K)) | {
        "activation": "silu", "compute_dtype": torch.float32, "out_dtype": torch.float32,
    },
    "fusion": lambda: _fusion() | {"adapter_outputs": [randn(M, K), randn(M, K)]},
    "fusion_of_bottlenecks": lambda: _fusion() | {
        "bottlenecks": [randn(M, R), randn(M, 2)], "up_weights": [randn(K, R), randn(K, 2)],
        "up_biases": [randn(K), None], "scales": [0.5, torch.tensor([2.0])],
    },
    "glu": lambda: {"gate": randn(M, N), "up": randn(M, N), "activation": "silu"},
    "grouped_linear": lambda: _grouped(randn(2, N, K)) | {"rows": torch.tensor([0, 2, 2, 4, 1]), "transposed": False},
    "ia3_attention": lambda: {
        "q": randn(2, 4, M, 8), "k": randn(2, 2, 5, 8), "v": randn(2, 2, 5, 8), "l_q": randn(4, 8), "l_k": randn(16),
        "l_v": randn(16), "scale": 0.5, "causal": True, "window": 4, "attn_mask": randn(M, 5),
        "key_padding_mask": torch.ones(2, 5, dtype=torch.bool), "prefix_k": randn(2, 3, 8), "prefix_v": randn(2, 3, 8),
        "rope": (randn(5, 4), randn(5, 4)), "dropout": 0.5, "seed": seed(),
    },
    "ia3_linear": lambda: _linear(randn(N, K)) | {"l_in": randn(K), "l_out": randn(N)},
    "linear": lambda: {"x": randn(M, K), "weight": randn(N, K), "bias": randn(N)},
    "linear_cross_entropy": lambda: {
        "hidden": randn(M, K), "weight": randn(N, K) / 8, "targets": torch.tensor([1, 5, -100]), "bias": randn(N),
        "lora_A": [randn(R, K) / 8], "lora_B": [randn(N, R)], "scaling": [0.5], "dropout": [0.5],
        "seeds": torch.tensor([7]), "ignore_index": -100, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0,
        "reduction": "mean", "num_items": torch.tensor(2), "compute_dtype": torch.float32,
    },
    "lora_linear": lambda: _lora(randn(N, K)) | {"dropout": [0.5, 0.0], "seeds": torch.tensor([7, 8])},
    "lora_linear_grouped": lambda: _lora(randn(N, K)) | {
        "x": randn(M, 2, K), "index": [[0, 1], [1, -1], [0, 0]], "dropout": [0.5, 0.0], "seeds": torch.tensor([7, 8]),
    },
    "quantize_4bit": lambda: {"tensor": randn(N, K), "blocksize": 64, "quant_type": "nf4", "double_quant": False},
    "rms_norm": lambda: {"x": randn(M, K), "weight": randn(K), "eps": 1e-6, "offset": 1.0, "out_dtype": torch.float32},
    "rotary": lambda: {"q": randn(2, 4, M, 8), "k": randn(2, 2, M, 8), "cos": randn(1, M, 4), "sin": randn(1, M, 4)},
}  # fmt: skip

# Further calls of functions that have several ways through them; the calls above take one of these.
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "combine of the largest": lambda: {
        "deltas": [randn(N, K), randn(N, K)], "weights": [0.5, 2.0], "method": "ties", "density": 0.5,
    },
    "dora_linear of NF4": lambda: _linear(weight4bit()) | _dora(weight4bit()) | {"magnitude": randn(N)},
    "dora_norm of NF4": lambda: _dora(weight4bit()),
    "experts of NF4": lambda: _experts(stack4bit()),
    "experts with a callable": lambda: _experts(randn(2, N // 2, K)) | {"activation": torch.tanh},
    "grouped_linear of NF4": lambda: _grouped(stack4bit()),
    "ia3_linear of NF4": lambda: _linear(weight4bit()) | {"l_in": randn(K), "l_out": randn(N)},
    "linear without bias": lambda: {"x": randn(M, K), "weight": randn(N, K)},
    "linear_cross_entropy of NF4": lambda: {
        "hidden": randn(M, K), "weight": weight4bit(), "targets": torch.tensor([1, 5, -100]),
    },
    "linear of many rows": lambda: {"x": randn(40, K), "weight": randn(N, K)},
    "lora_linear of NF4": lambda: _lora(weight4bit()),
    "lora_linear without adapters": lambda: _linear(randn(N, K)) | {"x": randn(40, K)},
    "lora_linear_grouped of NF4": lambda: _lora(weight4bit()) | {"x": randn(M, 2, K), "index": [0, 1, -1]},
}  # fmt: skip


def bottleneck_adapter(kind: type[nn.BottleneckAdapter]) -> nn.BottleneckAdapter:
    return kind(K, R, scale="learned", gated=True, norm_before=True, norm_after=True)


def lora_adapters() -> torch.nn.Module:
    layer = nn.LoRALinear(K, N, R)
    layer.add_adapter(2)
    return layer


LAYERS: dict[str, Callable[[], tuple[torch.nn.Module, tuple]]] = {
    "AdapterFusion": lambda: (nn.AdapterFusion(K), (randn(M, K), [randn(M, K), randn(M, K)], randn(M, K))),
    "BottleneckAdapter": lambda: (bottleneck_adapter(nn.BottleneckAdapter), (randn(M, K), randn(M, K))),
    "LoRALinear": lambda: (nn.LoRALinear(K, N, R), (randn(M, K),)),
    "LoRALinear of NF4": lambda: (nn.LoRALinear(K, N, R, quantize="nf4"), (randn(M, K),)),
    "LoRALinear with an index": lambda: (lora_adapters(), (randn(M, K), torch.tensor([1, -1, 0]))),
    "ParallelAdapter": lambda: (bottleneck_adapter(nn.ParallelAdapter), (randn(M, K), randn(M, K))),
    "PrefixEncoder": lambda: (nn.PrefixEncoder(1, 2, 8, 3, hidden_size=8), ()),
    "SoftPrompt": lambda: (nn.SoftPrompt(3, 8, "mlp"), ()),
}


def function_of(case: str) -> Callable[..., Any]:
    return getattr(ops, case.split()[0])


def tensors_in(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """The tensors of an argument, with the way to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from tensors_in(item, (*path, key))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), (*path, field.name))


def replaced(value: Any, path: tuple, tensor: Any) -> Any:
    """A copy of an argument with another tensor at the end of a way."""
    if not path:
        return tensor
    key, *rest = path
    if isinstance(value, dict):
        return value | {key: replaced(value[key], tuple(rest), tensor)}
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, tuple(rest), tensor) if i == key else item for i, item in enumerate(value))
    return dataclasses.replace(value, **{key: replaced(getattr(value, key), tuple(rest), tensor)})


@dataclasses.dataclass
class Case:
    """A call as a function of the floating-point tensors that it reads, NF4 weights' apart."""

    arguments: Any
    of: Callable[[Any], Any]

    def floats(self) -> dict[tuple, Tensor]:
        return {
            path: tensor
            for path, tensor in tensors_in(self.arguments)
            if tensor.is_floating_point() and not any(name in path for name in ("codes", "absmax", "nested", "out"))
        }

    def __call__(self, changed: dict[tuple, Tensor]) -> tuple[Tensor, ...]:
        arguments = self.arguments
        for path, tensor in changed.items():
            arguments = replaced(arguments, path, tensor)
        result = self.of(arguments)
        return tuple(tensor for _, tensor in tensors_in(result))


def make_case(name: str) -> Case:
    if name not in LAYERS:
        arguments = {**ARGUMENTS, **VARIANTS}[name]()
        return Case(arguments, lambda arguments: function_of(name)(**arguments))
    layer, inputs = LAYERS[name]()
    parameters = {key: torch.randn_like(value) for key, value in layer.named_parameters()}
    arguments = {"parameters": parameters, "inputs": inputs}
    return Case(arguments, lambda a: torch.func.functional_call(layer, a["parameters"], a["inputs"]))
