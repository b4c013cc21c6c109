"""Every wrong argument of every function and layer is refused, by a sentence that names it."""

import dataclasses
import inspect
import re

import pytest
import torch
from op_cases import ARGUMENTS, VARIANTS, K, N, R, function_of, make_case, replaced, tensors_in
from torch import Tensor

from peft_kernels import nn, ops
from peft_kernels.ops import NF4Weight

DTYPES = [torch.complex64, torch.float64, torch.bool, torch.int32, torch.float8_e4m3fn]
OTHERS = {"None": None, "text": "?", "object": object(), "complex": 1j, "NaN": float("nan"), "infinity": float("inf")}
# Wrong tensors for `linear` are left to torch's function to refuse, apart from their devices.
TORCHS = {"linear", "linear without bias", "linear of many rows"}
CASES = [*ARGUMENTS, *VARIANTS]
# What is right although it looks wrong here.
RIGHT = {
    ("adapter", "down_bias", "None"), ("adapter", "up_bias", "None"), ("dora_linear", "bias", "None"),
    ("dora_linear of NF4", "bias", "None"), ("fusion", "query_bias", "None"), ("fusion", "key_bias", "None"),
    ("bottleneck", "down_bias", "None"), ("fusion_of_bottlenecks", "query_bias", "None"),
    ("fusion_of_bottlenecks", "key_bias", "None"), ("fusion_of_bottlenecks", "up_biases", "items of None"),
    ("lora_linear_grouped", "bias", "None"), ("lora_linear_grouped of NF4", "bias", "None"),
    ("experts", "index", "torch.int32"), ("experts of NF4", "index", "torch.int32"),
    ("experts with a callable", "index", "torch.int32"), ("grouped_linear", "bias", "None"),
    ("grouped_linear", "offsets", "torch.int32"), ("grouped_linear of NF4", "bias", "None"),
    ("grouped_linear of NF4", "offsets", "torch.int32"),
    ("ia3_attention", "key_padding_mask", "torch.bool"), ("ia3_attention", "attn_mask", "torch.bool"),
    }  # fmt: skip


def wrong_values(value):
    """Pairs of a kind of mistake and a wrong value in place of this one."""
    if isinstance(value, Tensor):
        yield from ((str(dtype), value.to(dtype)) for dtype in DTYPES if dtype is not value.dtype)
    if isinstance(value, list):
        for kind, item in OTHERS.items():
            yield f"items of {kind}", [item] * len(value)
        if isinstance(value[0], Tensor):
            items = [item for item in value if isinstance(item, Tensor)]
            yield from ((f"items of {dtype}", [item.to(dtype) for item in items]) for dtype in DTYPES)
    if isinstance(value, tuple):
        yield "short", value[:-1]
        yield "text within", ("?", *value[1:])
    if isinstance(value, NF4Weight):
        for name in ("codes", "absmax", "shape", "dtype", "blocksize", "quant_type"):
            field = getattr(value, name)
            wrong = [*OTHERS.items(), *wrong_values(field)]
            for kind, item in wrong:
                if kind != "short":  # a shape, which fits other codes
                    yield f"{name} {kind}", dataclasses.replace(value, **{name: item})
    yield from OTHERS.items()


def refusal(call):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    return str(caught.value)


def names(message, *arguments):
    return any(re.search(rf"\b{argument}\b", message) for argument in arguments)


@pytest.mark.parametrize("case", CASES)
def test_wrong_values_are_refused_by_name(case):
    function, arguments = function_of(case), {**ARGUMENTS, **VARIANTS}[case]()
    parameters = inspect.signature(function).parameters
    for argument, value in arguments.items():
        for kind, wrong in wrong_values(value):
            if (wrong is None and parameters[argument].default is None) or (case, argument, kind) in RIGHT:
                continue
            if case in TORCHS and isinstance(wrong, Tensor):
                continue
            try:
                message = refusal(lambda a=argument, w=wrong: function(**(arguments | {a: w})))
            except BaseException as error:
                raise AssertionError(f"{argument}, {kind}") from error
            fields = [kind.split()[0]] if isinstance(value, NF4Weight) else []
            # A field of a weight is known to the ops by its own name.
            assert names(message, argument, *fields), (argument, kind, message)


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_on_another_device_is_refused(case):
    function, arguments = function_of(case), {**ARGUMENTS, **VARIANTS}[case]()
    tensors = list(tensors_in(arguments))
    for path, tensor in tensors if len(tensors) > 1 else ():  # of one, the result is on meta too
        with pytest.raises((ValueError, RuntimeError) if case in TORCHS else ValueError, match="meta"):
            function(**replaced(arguments, path, tensor.to("meta")))


@pytest.mark.parametrize("case", [*ARGUMENTS, *VARIANTS])
def test_negative_views_are_read_as_what_they_are(case):
    if case.startswith("dequantize_4bit_rows"):
        return  # it writes into a tensor, see below
    call = make_case(case)
    wanted = call({})
    for path, tensor in tensors_in(call.arguments):
        if tensor.dtype in (torch.bool, torch.uint8):
            continue
        view = torch._neg_view(-tensor)
        assert view.is_neg()
        for got, want in zip(call({path: view}), wanted, strict=True):
            assert torch.equal(got, want), path


def test_negative_view_to_write_into():
    weight = ops.quantize_4bit(torch.randn(8, 64))
    out = torch._neg_view(torch.zeros(8, 64))
    with pytest.raises(ValueError, match="out: got a negative view, wanted"):
        ops.dequantize_4bit_rows(weight, 0, out)
    assert not out.any()


def test_nothing_is_returned_of_a_weight_in_two_places():
    weight = ops.quantize_4bit(torch.randn(8, 64), double_quant=True)
    out = torch.zeros(8, 64)
    for path, tensor in tensors_in(weight):
        changed = replaced(weight, path, tensor.to("meta"))
        for call in (lambda w=changed: ops.dequantize_4bit(w), lambda w=changed: ops.dequantize_4bit_rows(w, 0, out)):
            with pytest.raises(ValueError, match=r"(codes|absmax|nested): got a tensor on (meta|cpu), wanted one on"):
                call()
    with pytest.raises(ValueError, match="out: got a tensor on meta, wanted one on cpu, where codes is"):
        ops.dequantize_4bit_rows(weight, 0, out.to("meta"))
    assert not out.any()


LAYERS = {
    nn.LoRALinear: {"in_features": K, "out_features": N, "rank": R, "alpha": 8, "dropout": 0.1, "bias": True,
                    "rslora": False, "quantize": "nf4", "double_quant": False, "dtype": torch.float32},
    nn.LoRALinear.from_linear: {"linear": torch.nn.Linear(K, N), "rank": R, "alpha": 8, "dropout": 0.1,
                                "rslora": False, "quantize": "nf4", "double_quant": False},
    nn.BottleneckAdapter: {"d": K, "bottleneck": R, "activation": "gelu", "scale": 1.0, "gated": False,
                           "norm_before": True, "norm_after": True, "dropout": 0.1, "bias": True, "eps": 1e-5,
                           "dtype": torch.float32},
    nn.AdapterFusion: {"d": K, "value": True, "value_bias": False, "temperature": 1.0, "temperature_decay": 0.0,
                       "dropout": 0.1, "dtype": torch.float32},
    nn.PrefixEncoder: {"num_layers": 1, "num_heads": 2, "head_dim": 8, "length": 3, "hidden_size": 8,
                       "dtype": torch.float32},
    nn.SoftPrompt: {"length": 3, "d": 8, "encoder": "lstm", "hidden_size": 8, "num_layers": 1, "dropout": 0.0,
                    "dtype": torch.float32},
}  # fmt: skip
WRONG_FOR_LAYERS = {**OTHERS, "negative": -2, "number": 2.5, "list": [1], "tensor": torch.ones(2), "dtype": torch.int32}
RIGHT_FOR_LAYERS = {
    ("alpha", "number"), ("alpha", "negative"), ("scale", "number"), ("scale", "negative"), ("eps", "number"),
    ("temperature", "number"), ("temperature_decay", "number"), ("dtype", "None"),
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__qualname__)
def test_layers_refuse_wrong_values_by_name(layer):
    arguments = LAYERS[layer]
    assert set(arguments) | {"device"} >= set(inspect.signature(layer).parameters)
    parameters = inspect.signature(layer).parameters
    for argument in arguments:
        for kind, wrong in WRONG_FOR_LAYERS.items():
            if (wrong is None and parameters[argument].default is None) or (argument, kind) in RIGHT_FOR_LAYERS:
                continue
            try:
                message = refusal(lambda a=argument, w=wrong: layer(**(arguments | {a: w})))
            except BaseException as error:
                raise AssertionError(f"{argument}, {kind}") from error
            assert names(message, argument), (argument, kind, message)
