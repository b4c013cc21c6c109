"""Bad arguments of lora_linear: each is a ValueError that names the argument, what it got and what it wanted."""

from dataclasses import replace

import numpy
import pytest
import torch
from lora_linear_cases import make_case
from torch import nn

from peft_kernels.ops import NF4Weight, lora_linear

ops = torch.ops.peft_kernels

# The bindings of both check alike; on a GPU the texts name its device.
pytestmark = [
    pytest.mark.kernels,
    pytest.mark.may_launch_nothing,
    pytest.mark.usefixtures("platform"),
    pytest.mark.parametrize("platform", ["cpu", "emulated"], indirect=True),
]


def call(base="nf4", **changes):
    """A good call of one adapter with dropout, M = 3, N = 24, K = 128, rank 8, except for the changes."""
    case = make_case(3, 24, 128, base=base, dropout=(0.5,))
    arguments = {
        name: getattr(case, name)
        for name in ("x", "weight", "bias", "lora_A", "lora_B", "scaling", "dropout", "seeds")
    }  # fmt: skip
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    return lora_linear(**arguments)


def first(change):
    """Changes the first item of a list."""
    return lambda items: [change(items[0]), *items[1:]]


def to_meta(tensor):
    return tensor.to("meta")


def as_type(dtype):
    return lambda tensor: tensor.to(dtype)


def changed(**fields):
    return lambda weight: replace(
        weight, **{name: value(getattr(weight, name)) if callable(value) else value for name, value in fields.items()}
    )


FLOATS = "float32, bfloat16 or float16"
ANY_BASE = {
    "x-list": ({"x": [[1.0] * 128]}, r"x: got \[\[1.0.*, a list, wanted a float32, bfloat16 or float16 tensor"),
    "x-none": ({"x": None}, "x: got None, a NoneType"),
    "x-scalar": ({"x": torch.tensor(1.0)}, r"x: got float32 \[\], wanted .* tensor \[..., K\]"),
    "x-int": ({"x": as_type(torch.int32)}, rf"x: got int32 \[3, 128\], wanted a {FLOATS} tensor"),
    "x-bool": ({"x": as_type(torch.bool)}, r"x: got bool \[3, 128\]"),
    "x-fp64": ({"x": as_type(torch.float64)}, r"x: got float64 \[3, 128\]"),
    "x-complex": ({"x": as_type(torch.complex64)}, r"x: got complex64 \[3, 128\]"),
    "x-columns": ({"x": lambda x: x[:, 1:]}, r"x: got float32 \[3, 127\], wanted \[..., 128\], .* shape \[24, 128\]"),
    "x-meta": ({"x": to_meta}, "(codes|weight): got a tensor on cpu, wanted one on meta, where x is"),
    "weight-none": ({"weight": None}, "weight: got None, a NoneType, wanted an NF4Weight or a .* tensor"),
    "weight-module": (
        {"weight": lambda _: nn.Linear(128, 24)},
        r"weight: got Linear.*, wanted an NF4Weight",
    ),
    "bias-list": ({"bias": [0.0] * 24}, r"bias: got \[0.0.*, a list, wanted a tensor \[24\]"),
    "bias-long": ({"bias": torch.ones(25)}, r"bias: got .*\[25\], wanted .*\[24\]"),
    "bias-one": ({"bias": torch.ones(1)}, r"bias: got .*\[1\], wanted .*\[24\]"),
    "bias-matrix": ({"bias": torch.ones(1, 24)}, r"bias: got .*\[1, 24\], wanted .*\[24\]"),
    "bias-int": ({"bias": as_type(torch.int64)}, f"bias: got int64.*, wanted .*{FLOATS}"),
    "bias-fp64": ({"bias": as_type(torch.float64)}, f"bias: got float64.*, wanted .*{FLOATS}"),
    "bias-meta": ({"bias": to_meta}, "bias: got a tensor on meta, wanted one on cpu"),
    "A-tensor": ({"lora_A": lambda a: a[0]}, r"lora_A: got float32 \[8, 128\], wanted a list or tuple"),
    "A-none": ({"lora_A": None}, "lora_A: got None, a NoneType, wanted a list or tuple"),
    "A-of-none": ({"lora_A": [None]}, "lora_A: got None, a NoneType, wanted tensors"),
    "A-of-lists": ({"lora_A": [[1.0]]}, r"lora_A: got \[1.0\], a list, wanted tensors"),
    "A-vector": ({"lora_A": first(lambda a: a[0])}, r"lora_A: got float32 \[128\], wanted a matrix \[rank, 128\]"),
    "A-columns": ({"lora_A": first(lambda a: a[:, :100])}, r"lora_A: got shape \[8, 100\], wanted \[8, 128\]"),
    "A-transposed": ({"lora_A": first(lambda a: a.T)}, r"lora_A: got shape \[128, 8\], wanted \[128, 128\]"),
    "A-int": ({"lora_A": first(as_type(torch.int8))}, f"lora_A: got int8, wanted {FLOATS}"),
    "A-fp64": ({"lora_A": first(as_type(torch.float64))}, f"lora_A: got float64, wanted {FLOATS}"),
    "A-meta": ({"lora_A": first(to_meta)}, "lora_A: got a tensor on meta, wanted one on cpu"),
    "rank-0": (
        {"lora_A": [torch.ones(0, 128)], "lora_B": [torch.ones(24, 0)]},
        r"lora_A: got float32 \[0, 128\], wanted a matrix \[rank, 128\] of rank 1 at least",
    ),
    "rank-mismatch": ({"lora_B": [torch.ones(24, 7)]}, r"lora_B: got shape \[24, 7\], wanted \[24, 8\]"),
    "B-tensor": ({"lora_B": lambda b: b[0]}, r"lora_B: got float32 \[24, 8\], wanted a list or tuple"),
    "B-rows": ({"lora_B": [torch.ones(25, 8)]}, r"lora_B: got shape \[25, 8\], wanted \[24, 8\]"),
    "B-fp64": ({"lora_B": first(as_type(torch.float64))}, f"lora_B: got float64, wanted {FLOATS}"),
    "B-meta": ({"lora_B": first(to_meta)}, "lora_B: got a tensor on meta, wanted one on cpu"),
    "B-missing": ({"lora_B": []}, "lora_B: got 0 items, wanted 1 item, one for each lora_A"),
    "B-twice": ({"lora_B": lambda b: b * 2}, "lora_B: got 2 items, wanted 1 item"),
    "A-twice": ({"lora_A": lambda a: a * 2, "seeds": None}, "lora_B: got 1 item, wanted 2 items, one for each lora_A"),
    "A-missing": (
        {"lora_A": [], "scaling": [], "dropout": [], "seeds": None},
        "lora_B: got 1 item.*, wanted .*lora_A",
    ),
    "scaling-number": ({"scaling": 2.0}, "scaling: got 2.0, a float, wanted a list or tuple"),
    "scaling-missing": ({"scaling": []}, "scaling: got 0 items, wanted 1 item, one for each lora_A"),
    "scaling-text": ({"scaling": ["2"]}, "scaling: got '2', a str, wanted numbers"),
    "scaling-nan": ({"scaling": [float("nan")]}, "scaling: got nan, wanted a finite"),
    "scaling-inf": ({"scaling": [float("-inf")]}, "scaling: got -inf, wanted a finite"),
    "scaling-huge": ({"scaling": [1e39]}, "scaling: got 9999.*, wanted a finite float32 number"),
    "dropout-number": ({"dropout": 0.5}, "dropout: got 0.5, a float, wanted a list or tuple"),
    "dropout-array": ({"dropout": numpy.array([0.5])}, "dropout: got array.* wanted a list or tuple"),
    "dropout-twice": ({"dropout": [0.5, 0.5]}, "dropout: got 2 items, wanted 1 item, one for each lora_A"),
    "dropout-zeros": ({"dropout": [0.0, 0.0]}, "dropout: got 2 items, wanted 1 item, one for each lora_A"),
    "dropout-one": ({"dropout": [1.0]}, r"dropout: got 1.0*, wanted a probability in \[0, 1\)"),
    "dropout-negative": ({"dropout": [-0.1]}, r"dropout: got -0.10*, wanted a probability"),
    "dropout-nan": ({"dropout": [float("nan")]}, "dropout: got nan, wanted a probability"),
    "dropout-text": ({"dropout": ["0.5"]}, "dropout: got '0.5', a str, wanted numbers"),
    "seeds-int": ({"seeds": 7}, r"seeds: got 7, a int, wanted an int64 tensor \[1\], a seed for each adapter"),
    "seeds-int32": ({"seeds": as_type(torch.int32)}, r"seeds: got int32 \[1\], wanted an int64 tensor \[1\]"),
    "seeds-float": ({"seeds": as_type(torch.float32)}, r"seeds: got float32 \[1\]"),
    "seeds-two": ({"seeds": torch.ones(2, dtype=torch.int64)}, r"seeds: got int64 \[2\], wanted an int64 tensor \[1\]"),
    "seeds-scalar": ({"seeds": torch.tensor(3)}, r"seeds: got int64 \[\], wanted an int64 tensor \[1\]"),
    "seeds-meta": ({"seeds": to_meta}, "seeds: got a tensor on meta, wanted one on cpu"),
    "compute-dtype": ({"compute_dtype": torch.float64}, f"compute_dtype: got torch.float64, a dtype, wanted {FLOATS}"),
    "compute-dtype-text": ({"compute_dtype": "bf16"}, "compute_dtype: got 'bf16', a str"),
    "out-dtype": ({"out_dtype": torch.int8}, f"out_dtype: got torch.int8, a dtype, wanted {FLOATS}"),
}
NF4 = {
    "shape-1d": ({"weight": changed(shape=(24 * 128,))}, r"weight: got an NF4Weight of shape \[3072\]"),
    "shape-3d": ({"weight": changed(shape=(2, 12, 128))}, r"weight: got an NF4Weight of shape \[2, 12, 128\]"),
    "shape-rows": ({"weight": changed(shape=(25, 128)), "bias": None}, r"codes: got uint8 \[1536\], .* with 1600"),
    "shape-negative": ({"weight": changed(shape=(-24, 128)), "bias": None}, r"shape: got \[-24, 128\], wanted"),
    "shape-huge": ({"weight": changed(shape=(2**60, 128)), "bias": None}, r"shape: got .*, wanted .* below 2\*\*63"),
    "codes-short": ({"weight": changed(codes=lambda t: t[1:])}, r"codes: got uint8 \[1535\], wanted uint8 with 1536"),
    "codes-int32": ({"weight": changed(codes=as_type(torch.int32))}, r"codes: got int32 \[1536\], wanted uint8"),
    "codes-strided": (
        {"weight": changed(codes=lambda t: t.repeat_interleave(2)[::2])},
        r"codes: got strides \[2\], wanted a dense tensor",
    ),
    "codes-meta": ({"weight": changed(codes=to_meta)}, "codes: got a tensor on meta, wanted one on cpu"),
    "absmax-short": ({"weight": changed(absmax=lambda t: t[1:])}, r"absmax: got float32 \[47\], .* with 48"),
    "absmax-bf16": ({"weight": changed(absmax=as_type(torch.bfloat16))}, r"absmax: got bfloat16 \[48\]"),
    "absmax-meta": ({"weight": changed(absmax=to_meta)}, "absmax: got a tensor on meta, wanted one on cpu"),
    "blocksize": ({"weight": changed(blocksize=96)}, "blocksize: got 96, wanted a power of two from 32 to 4096"),
    "blocksize-128": ({"weight": changed(blocksize=128)}, r"absmax: got float32 \[48\], wanted float32 with 24"),
    "quant-type": ({"weight": changed(quant_type="int4")}, "quant_type: got 'int4', wanted 'nf4' or 'fp4'"),
    "dtype": ({"weight": changed(dtype=torch.float64)}, f"weight dtype: got float64, wanted {FLOATS}"),
    "nested": ({"weight": changed(nested=(torch.ones(256),))}, r"nested: got 1 tensors, wanted none, or \(code"),
}  # fmt: skip
DENSE = {
    "packed": ({"weight": torch.ones(1536, 1, dtype=torch.uint8)}, r"weight: got uint8 \[1536, 1\], wanted an NF4"),
    "fp64": ({"weight": as_type(torch.float64)}, r"weight: got float64 \[24, 128\]"),
    "vector": ({"weight": lambda w: w[0]}, r"weight: got float32 \[128\], wanted .* of shape \[N, K\]"),
    "3d": ({"weight": lambda w: w[None]}, r"weight: got float32 \[1, 24, 128\]"),
    "meta": ({"weight": to_meta}, "weight: got a tensor on meta, wanted one on cpu"),
    "B-without-A": ({"lora_A": []}, "(lora_B|seeds): got"),
    "scaling-without-A": (
        {"lora_A": [], "lora_B": [], "dropout": [], "seeds": None},
        "scaling: got 1 items, wanted none, since lora_A has none",
    ),
}  # fmt: skip


def parametrize(cases):
    return pytest.mark.parametrize(("changes", "message"), list(cases.values()), ids=list(cases))


@parametrize(ANY_BASE)
@pytest.mark.parametrize("base", ["nf4", "dense"])
def test_bad_argument(base, changes, message):
    with pytest.raises(ValueError, match=message):
        call(base, **changes)


@parametrize(NF4)
def test_bad_nf4_weight(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@parametrize(DENSE)
def test_bad_dense_weight(changes, message):
    with pytest.raises(ValueError, match=message):
        call("dense", **changes)


@parametrize({name: ANY_BASE[name] for name in ("A-meta", "bias-meta", "seeds-meta", "x-meta")})
def test_bad_device_with_gradients(changes, message):
    # The autograd function is another way to the ops.
    changes = {"lora_B": first(lambda b: b.requires_grad_()), **changes}
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_good_arguments():
    assert call().shape == call("dense").shape == (3, 24)
    assert call(scaling=[2], dropout=(0.5,), lora_A=tuple).isfinite().all()  # numbers and sequences of other types


def test_stays_usable_after_an_error():
    for _ in range(3):
        with pytest.raises(ValueError, match="lora_B"):
            call(lora_B=[torch.ones(24, 7)])
    assert call().isfinite().all()


# ---- the ops themselves, as other libraries call them ------------------------------------------------------------


def forward_arguments(**changes):
    case = make_case(3, 24, 128, dropout=(0.5,))
    weight, format = case.weight.arguments
    arguments = {
        "x": case.x, "weight": weight, "format": format, "compute_dtype": torch.float32, "out_dtype": torch.float32,
        "bias": case.bias, "add": None, "lora_A": case.lora_A, "lora_B": case.lora_B, "scaling": case.scaling,
        "dropout": case.dropout, "seeds": case.seeds,
    }  # fmt: skip
    return arguments | changes


def backward_arguments(**changes):
    arguments = forward_arguments()
    for name in ("out_dtype", "bias"):
        del arguments[name]
    arguments |= {"grad_y": torch.ones(3, 24), "s": torch.ones(3, 8), "x_dtype": torch.float32, "wants_x": True,
                  "wants_A": [True], "wants_B": [True]}  # fmt: skip
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x: got float32 \[\], wanted a tensor of one dimension at least"),
        ({"x": torch.ones(3, 128).double()}, f"x: got float64, wanted {FLOATS}"),
        ({"x": torch.ones(3, 127)}, r"x: got shape \[3, 127\], wanted \[3, 128\]"),
        ({"weight": []}, "codes: got none, wanted those of a 4-bit weight"),
        ({"weight": [torch.ones(1536).byte()]}, "absmax: got none, wanted the statistics of the 4-bit weight"),
        ({"format": (64, 0, 256, 0, -1, 128)}, r"shape: got \[-1, 128\]"),
        ({"format": (64, 0, 256, 0, 2**62, 128)}, r"shape: got .*, wanted .* below 2\*\*63"),
        ({"format": (64, 0, 256, 0, 3072)}, r"shape: got \[3072\], wanted \[N, K\]"),
        ({"format": (64, 0, 256)}, "format: got 3 items, wanted blocksize, quant_type, nested_blocksize, dtype and a"),
        ({"format": (64, 2, 256, 0, 24, 128)}, "quant_type: got 2, wanted 0 for nf4 or 1 for fp4"),
        ({"format": (64, 0, 256, -1, 24, 128)}, "weight dtype: got -1, wanted 0 for float32, 1 for bfloat16 or 2"),
        ({"format": ()}, r"weight: got 2 items without a format, wanted a dense matrix \[N, K\], or none"),
        ({"format": (), "weight": [torch.ones(128)]}, r"weight: got float32 \[128\], wanted a matrix \[N, K\]"),
        ({"compute_dtype": torch.float64}, "compute_dtype: got float64"),
        ({"out_dtype": torch.float64}, "out_dtype: got float64"),
        ({"add": torch.ones(3, 24).half()}, r"add: got float16 \[3, 24\], wanted float32"),
        ({"add": torch.ones(3, 23)}, r"add: got shape \[3, 23\], wanted \[3, 24\]"),
        ({"seeds": None}, "seeds: got none, wanted an int64 tensor, since there is dropout"),
        (
            {"weight": [], "format": (), "lora_A": [], "lora_B": [], "scaling": [], "dropout": []},
            "codes: got none, wanted a weight, or at least one adapter",
        ),
    ],
)
def test_bad_forward_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.lora_linear_forward(**forward_arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad_y": torch.tensor(1.0)}, r"grad_y: got float32 \[\], wanted a tensor of one dimension at least"),
        ({"grad_y": torch.ones(3, 24).double()}, "grad_y: got float64"),
        ({"grad_y": torch.ones(3, 23)}, r"grad_y: got shape \[3, 23\], wanted \[3, 24\]"),
        ({"x": None}, "x: got none, wanted the forward's x, since lora_A's gradient is wanted"),
        ({"x": torch.ones(4, 128)}, r"x: got shape \[4, 128\], wanted \[3, 128\]"),
        ({"s": None}, "s: got none, wanted the forward's s, since lora_B's gradient is wanted"),
        ({"s": torch.ones(3, 9)}, r"s: got shape \[3, 9\], wanted \[3, 8\]"),
        ({"s": torch.ones(3, 8).half()}, r"s: got float16 \[3, 8\], wanted float32"),
        ({"x_dtype": torch.float64}, "x_dtype: got float64"),
        ({"wants_A": []}, "wants_A: got 0 items, wanted 1 item"),
        ({"wants_B": [True, False]}, "wants_B: got 2 items, wanted 1 item"),
        ({"format": (64, 0, 256, 0, 24, -128)}, r"shape: got \[24, -128\]"),
        ({"lora_A": [torch.ones(8, 128, device="meta")]}, "lora_A: got a tensor on meta, wanted one on cpu"),
    ],
)
def test_bad_backward_argument(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.lora_linear_backward(**backward_arguments(**changes))


@pytest.mark.parametrize(("name", "most"), [("lora_linear_forward", 13), ("lora_linear_backward", 17)])
def test_signatures_are_short(name, most):
    arguments = [argument.name for argument in getattr(ops, name).default._schema.arguments]
    assert len(arguments) <= most
    assert {"weight", "format"} <= {*arguments}  # whatever a weight consists of


def test_forward_and_backward_arguments_are_good():
    assert ops.lora_linear_forward(**forward_arguments())[0].shape == (3, 24)
    assert ops.lora_linear_backward(**backward_arguments())[0].shape == (3, 128)


def test_view_of_a_weight_that_does_not_fit():
    weight = make_case(3, 24, 128).weight
    with pytest.raises(ValueError, match=r"x: got float32 \[3, 128\], wanted \[..., 256\]"):
        call(weight=NF4Weight(weight.codes, weight.absmax, (12, 256), weight.dtype, 64, "nf4"))
