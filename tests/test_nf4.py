"""The nf4 family against the installed bitsandbytes, bit for bit, and against the plain PyTorch oracle."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optional import if_installed

from peft_kernels.ops import NF4Weight, dequantize_4bit, dequantize_4bit_rows, quantize_4bit
from peft_kernels.testing.reference import nf4 as reference

bnb = if_installed("bitsandbytes")

pytestmark = pytest.mark.kernels

BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANT_TYPES = ["nf4", "fp4"]

ops = torch.ops.peft_kernels


def name(value):
    return str(value).removeprefix("torch.")


def same_bits(actual, expected):
    """Equal bit for bit, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
        actual = torch.where(actual.isnan(), 0, actual).view(integer)
        expected = torch.where(expected.isnan(), 0, expected).view(integer)
    assert torch.equal(actual, expected)


def bnb_dequantize(codes, state):
    """bitsandbytes' portable implementation, without torch.compile around it.

    Not bitsandbytes.functional.dequantize_4bit: its AVX-512 kernel mistakes the block of an element when 16 divides
    the row length and the blocksize does not, flushes bf16 subnormals, and gives FP4's code 8 the sign of a minus.
    """
    absmax = state.absmax
    if state.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    code = bnb.functional.get_4bit_type(state.quant_type, device="cpu")
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    compute = _dequantize_4bit_compute.__wrapped__
    return compute(codes.view(-1), absmax, code, state.blocksize, state.shape, state.dtype)


def fields(weight):
    """The arguments of the oracle."""
    values = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    del values["bf16_statistics"]
    return values


def quantize_on(device, tensor, *arguments):
    """Quantised on a device, and brought back."""
    weight = quantize_4bit(tensor.to(device), *arguments)
    codes, absmax, *nested = (field.cpu() for field in (weight.codes, weight.absmax, *weight.nested))
    return dataclasses.replace(weight, codes=codes, absmax=absmax, nested=tuple(nested))


def statistics(device):
    """Values of double_quant that a device computes as bitsandbytes' CPU backend does: a GPU sums absmax in another
    order."""
    return (False,) if device == "cuda" else (False, True)


def assert_same_weight(weight, codes, state):
    same_bits(weight.codes, codes.view(-1))
    same_bits(weight.absmax, state.absmax)
    assert (weight.shape, weight.dtype) == (tuple(state.shape), state.dtype)
    assert (weight.blocksize, weight.quant_type) == (state.blocksize, state.quant_type)
    assert bool(weight.nested) == state.nested
    if state.nested:
        for ours, theirs in zip(weight.nested, (state.state2.code, state.state2.absmax, state.offset), strict=True):
            same_bits(ours, theirs)
        assert weight.nested_blocksize == state.state2.blocksize


@st.composite
def tensors(draw):
    """Tensors whose blocks differ in scale by much: zeros, subnormals, ordinary and huge values."""
    long = st.lists(st.integers(1, 5000), min_size=1, max_size=1)
    shape = draw(st.one_of(st.lists(st.integers(1, 40), min_size=1, max_size=3), long))
    dtype = draw(st.sampled_from(DTYPES))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1))))
    scale = st.sampled_from([0.0, 1e-44, 1e-39, 1e-7, 0.02, 1.0, 3e4, 1e37])
    scales = torch.tensor(draw(st.lists(scale, min_size=1, max_size=4)))
    run = draw(st.sampled_from([1, 7, 32, 64, 1000]))  # neighbours that share a scale
    runs = torch.arange(values.numel()).view(shape) // run % len(scales)
    return (values * scales[runs]).to(dtype)


# ---- against bitsandbytes ----------------------------------------------------------------------------------------


@given(tensors(), st.sampled_from(BLOCKSIZES), st.sampled_from(QUANT_TYPES), st.booleans())
def test_quantize_equals_bitsandbytes(device, tensor, blocksize, quant_type, double_quant):
    double_quant = double_quant and double_quant in statistics(device)
    codes, state = bnb.functional.quantize_4bit(
        tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
    )
    weight = quantize_on(device, tensor, blocksize, quant_type, double_quant)
    assert_same_weight(weight, codes, state)
    same_bits(weight.dequantize(), bnb_dequantize(codes, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_format(device, blocksize, quant_type, dtype):
    # Two blocks and a part of one, an odd number of elements, more than 256 blocks when they are small.
    tensor = torch.randn(2 * blocksize + 16439).to(dtype)
    for double_quant in statistics(device):
        codes, state = bnb.functional.quantize_4bit(
            tensor, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
        )
        weight = quantize_on(device, tensor, blocksize, quant_type, double_quant)
        assert_same_weight(weight, codes, state)
        same_bits(weight.dequantize(), bnb_dequantize(codes, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_dequantize_equals_bitsandbytes_public_function(cpu_isa, double_quant, dtype):
    # Where its fast kernel is right: normal values, and rows that hold whole blocks.
    tensor = torch.randn(33, 576).to(dtype)
    codes, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double_quant)
    weight = NF4Weight.from_quant_state(codes, state)
    same_bits(dequantize_4bit(weight), bnb.functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "unaligned"])
def test_dequantize_equals_bitsandbytes(device, start, double_quant, dtype):
    # More than one tile of the CUDA kernel, and elements after the last whole vector.
    tensor = torch.randn(3, 4099).to(dtype)
    codes, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double_quant)
    expected = bnb_dequantize(codes, state)
    weight = NF4Weight.from_quant_state(codes, state)
    buffer = torch.cat([torch.zeros(start, dtype=torch.uint8), weight.codes]).to(device)
    absmax, *nested = (field.to(device) for field in (weight.absmax, *weight.nested))
    weight = dataclasses.replace(weight, codes=buffer[start:], absmax=absmax, nested=tuple(nested))
    same_bits(weight.dequantize().cpu(), expected)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (1,), (3,), (7, 5), (2, 3, 4), ()], ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_small_shapes(shape, double_quant):
    tensor = torch.randn(shape)
    codes, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double_quant)
    weight = quantize_4bit(tensor, double_quant=double_quant)
    assert_same_weight(weight, codes, state)
    assert weight.dequantize().shape == shape


def test_many_chunks_and_thread_counts(cpu_isa):
    tensor = torch.randn(511, 777)
    codes, state = bnb.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            weight = quantize_4bit(tensor, double_quant=True)
            same_bits(weight.codes, codes.view(-1))
            same_bits(NF4Weight.from_quant_state(codes, state).dequantize(), bnb_dequantize(codes, state))
    finally:
        torch.set_num_threads(threads)


def test_strided_input():
    tensor = torch.randn(40, 50)[:, ::2].T
    same_bits(quantize_4bit(tensor).codes, quantize_4bit(tensor.contiguous()).codes)


@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [5, 70], ids=["full-block", "tail"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_nan_and_infinity(device, special, position, quant_type, double_quant):
    if double_quant not in statistics(device):
        pytest.skip("a GPU sums absmax in another order")
    tensor = torch.randn(100)
    tensor[position] = special
    codes, state = bnb.functional.quantize_4bit(tensor, quant_type=quant_type, compress_statistics=double_quant)
    weight = quantize_on(device, tensor, 64, quant_type, double_quant)
    assert_same_weight(weight, codes, state)
    values = weight.dequantize()
    same_bits(values, bnb_dequantize(codes, state))
    if double_quant:
        assert not values.isfinite().any()
        return
    inside = torch.arange(100) // 64 == position // 64
    assert values[~inside].isfinite().all()
    if special != special:
        assert values[inside].isnan().all()
    else:
        assert weight.absmax[position // 64] == float("inf") and not values[inside].isfinite().any()


# ---- against the oracle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_output_dtype_rounds_twice(device, quant_type, weight_dtype, out_dtype):
    # Over all binades, so that every kind of rounding happens: to subnormals, to infinity.
    absmax = torch.ldexp(1 + torch.rand(277, device=device), torch.arange(-149, 128, device=device))
    codes = torch.randint(256, (277 * 16 - 1,), dtype=torch.uint8, device=device)
    weight = NF4Weight(codes, absmax, (277 * 32 - 3,), weight_dtype, 32, quant_type)
    expected = reference.dequantize_4bit(**fields(weight)).to(out_dtype)
    same_bits(weight.dequantize(out_dtype), expected)


def test_nested_statistics_round_twice(device):
    blocks = 1000
    nested = (torch.rand(256) * 2 - 1, torch.rand(-(-blocks // 256)), torch.tensor(0.37))
    nested = tuple(tensor.to(device) for tensor in nested)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
    codes = torch.randint(256, (blocks * 16,), dtype=torch.uint8, device=device)
    weight = NF4Weight(codes, absmax, (blocks, 32), torch.float32, 32, "nf4", nested)
    same_bits(weight.dequantize(), reference.dequantize_4bit(**fields(weight)))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_equals_oracle(device, quant_type):
    # Includes both zeros, every bound between codes, and their neighbours.
    values = reference.CODEBOOKS[quant_type].sort().values
    bounds = (values[:-1] + values[1:]) / 2
    neighbours = [torch.nextafter(bounds, torch.full_like(bounds, end)) for end in (-1.0, 1.0)]
    tail = torch.cat([values, bounds, *neighbours, torch.tensor([-0.0, 1.0, -1.0])])
    full = torch.nn.functional.pad(tail, (0, 128 - tail.numel()))
    for tensor in (tail, full):
        codes, absmax = reference.quantize_4bit(tensor, 128, quant_type)
        weight = quantize_on(device, tensor, 128, quant_type)
        same_bits(weight.codes, codes)
        same_bits(weight.absmax, absmax)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(("n", "k"), [(40, 517), (300, 72)], ids=str)
def test_rows(device, n, k, double_quant, out_dtype):
    # Panels that begin within a block, that have elements after the last whole vector, that are longer than a tile.
    weight = quantize_4bit(torch.randn(n, k), 128, double_quant=double_quant)
    absmax, *nested = (field.to(device) for field in (weight.absmax, *weight.nested))
    weight = dataclasses.replace(weight, codes=weight.codes.to(device), absmax=absmax, nested=tuple(nested))
    expected = weight.dequantize(out_dtype)
    for first, last in ((0, n), (0, 3), (8, 11), (n // 8 * 8 - 16, n), (8, 8)):
        if 0 <= first <= last <= n:
            out = torch.empty(last - first, k, dtype=out_dtype, device=device)
            assert dequantize_4bit_rows(weight, first, out) is out
            same_bits(out.cpu(), expected[first:last].cpu())


# ---- the view ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", [torch.uint8, *DTYPES], ids=name)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_view_copies_nothing(storage, double_quant):
    tensor = torch.randn(64, 96)
    packed = bnb.nn.Params4bit(
        tensor, requires_grad=False, quant_type="nf4", quant_storage=storage, compress_statistics=double_quant
    ).to("cpu")
    weight = NF4Weight.from_params4bit(packed)
    state = packed.quant_state
    assert packed.dtype == storage
    assert type(weight.codes) is torch.Tensor and weight.codes.data_ptr() == packed.data_ptr()
    assert weight.absmax is state.absmax
    if double_quant:
        assert weight.nested[0] is state.state2.code and weight.nested[1] is state.state2.absmax
        assert weight.nested[2] is state.offset
    assert not weight.bf16_statistics
    same_bits(weight.dequantize(), quantize_4bit(tensor, double_quant=double_quant).dequantize())


def test_sixteen_bit_statistics_are_converted():
    codes, state = bnb.functional.quantize_4bit(torch.randn(64, 96), quant_type="nf4", compress_statistics=True)
    state.offset = state.offset.bfloat16()
    state.state2.absmax = state.state2.absmax.half()
    weight = NF4Weight.from_quant_state(codes, state)
    state.offset = state.offset.float()
    state.state2.absmax = state.state2.absmax.float()
    same_bits(weight.dequantize(), bnb_dequantize(codes, state))

    codes, state = bnb.functional.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    state.absmax = state.absmax.bfloat16()
    weight = NF4Weight.from_quant_state(codes, state)
    state.absmax = state.absmax.float()
    same_bits(weight.dequantize(), bnb_dequantize(codes, state))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=name)
def test_repacked_weight_is_converted_back(double_quant, storage):
    tensor = torch.randn(96, 128).half()
    codes, state = bnb.functional.quantize_4bit(
        tensor, quant_type="nf4", compress_statistics=double_quant, quant_storage=storage
    )
    original = NF4Weight.from_quant_state(codes.clone(), state)
    packed, state = bnb.functional._convert_weight_packed_for_cpu(codes, state)
    weight = NF4Weight.from_quant_state(packed, state)
    assert weight.bf16_statistics and not weight.nested
    same_bits(weight.codes, original.codes)
    absmax = reference.block_absmax(original.absmax, original.nested)
    same_bits(weight.absmax, absmax.bfloat16().float())
    assert (weight.shape, weight.dtype) == ((96, 128), torch.float16)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_bitsandbytes_reads_what_we_write(double_quant, quant_type):
    weight = quantize_4bit(torch.randn(48, 128).bfloat16(), 64, quant_type, double_quant)
    state = bnb.functional.QuantState.from_dict(weight.as_dict(), torch.device("cpu"))
    same_bits(bnb_dequantize(weight.codes, state), weight.dequantize())
    packed = bnb.functional.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
    same_bits(NF4Weight.from_quant_state(weight.codes, packed).dequantize(), weight.dequantize())
    params = bnb.nn.Params4bit.from_prequantized(
        weight.codes.view(-1, 1), state.as_dict(packed=True), requires_grad=False, device="cpu"
    )
    same_bits(NF4Weight.from_params4bit(params).dequantize(), weight.dequantize())


def test_gradient_stays_outside():
    weight = quantize_4bit(torch.randn(8, 32, requires_grad=True))
    assert not weight.dequantize().requires_grad


# ---- torch's own tools -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_opcheck(double_quant):
    tensor = torch.randn(9, 33)
    weight = quantize_4bit(tensor, double_quant=double_quant)
    torch.library.opcheck(ops.nf4_quantize.default, (tensor, 64, "nf4"))
    torch.library.opcheck(ops.nf4_dequantize.default, (*weight.arguments, torch.bfloat16))
    torch.library.opcheck(ops.nf4_dequantize_rows.default, (*weight.arguments, 8, torch.empty(1, 33)))


def test_compile():
    packed = bnb.nn.Params4bit(torch.randn(64, 96), requires_grad=False, quant_type="nf4").to("cpu")

    def function(x):
        weight = quantize_4bit(x, double_quant=True)
        return weight.dequantize(torch.bfloat16), x @ NF4Weight.from_params4bit(packed).dequantize().T

    x = torch.randn(5, 96)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), function(x), strict=True):
        same_bits(actual, expected)


def test_imports_without_bitsandbytes():
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch; from peft_kernels.ops import quantize_4bit\n"
        "print(quantize_4bit(torch.ones(3, 3), double_quant=True).dequantize().sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "9.0"


# ---- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, dtype=torch.int64),), "tensor: got int64, wanted float32, bfloat16 or float16"),
        ((torch.ones(4, dtype=torch.float64),), "tensor: got float64"),
        ((torch.ones(4), 48), "blocksize: got 48, wanted a power of two from 32 to 4096"),
        ((torch.ones(4), 8192), "blocksize: got 8192"),
        ((torch.ones(4), -64), "blocksize: got -64"),
        ((torch.ones(4), 64, "int4"), "quant_type: got 'int4', wanted 'nf4' or 'fp4'"),
        (([1.0],), r"tensor: got \[1.0\], a list, wanted a tensor"),
        ((torch.ones(4), 64.0), "blocksize: got 64.0, a float, wanted a power of two from 32 to 4096"),
        ((torch.ones(4), 64, None), "quant_type: got None, a NoneType, wanted 'nf4' or 'fp4'"),
    ],
    ids=["int64", "float64", "blocksize-48", "blocksize-8192", "blocksize-negative", "int4", "list", "float", "none"],
)
def test_quantize_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_4bit(*arguments)


def broken(**changes):
    return lambda weight: dataclasses.replace(weight, **changes)


def broken_nested(index, tensor):
    def change(weight):
        nested = list(weight.nested)
        nested[index] = tensor
        return dataclasses.replace(weight, nested=tuple(nested))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken(shape=(64, 98)), r"codes: got uint8 \[3072\], wanted uint8 with 3136 elements"),
        (broken(shape=(-64, -96)), r"shape: got \[-64, -96\]"),
        (broken(shape=(2**40, 2**40)), r"shape: got .*2\*\*63"),
        (broken(codes=torch.zeros(3072)), r"codes: got float32 \[3072\]"),
        (broken(codes=torch.zeros(6144, dtype=torch.uint8)[::2]), r"codes: got strides \[2\], wanted a dense tensor"),
        (broken(absmax=torch.zeros(96)), r"absmax: got float32 \[96\], wanted uint8 with 96 elements"),
        (broken(absmax=torch.zeros(95, dtype=torch.uint8)), r"absmax: got uint8 \[95\]"),
        (broken(nested=()), r"absmax: got uint8 \[96\], wanted float32 with 96 elements"),
        (broken(nested=(torch.zeros(256),)), "nested: got 1 tensors, wanted none, or"),
        (broken_nested(0, torch.zeros(255)), r"nested code: got float32 \[255\]"),
        (broken_nested(1, torch.zeros(2)), r"nested absmax: got float32 \[2\], wanted float32 with 1 elements"),
        (broken_nested(2, torch.zeros((), dtype=torch.bfloat16)), r"nested offset: got bfloat16 \[\], wanted float32"),
        (broken(blocksize=100), "blocksize: got 100"),
        (broken(blocksize=0), "blocksize: got 0"),
        (broken(nested_blocksize=0), "nested_blocksize: got 0"),
        (broken(quant_type="nf5"), "quant_type: got 'nf5'"),
        (broken(dtype=torch.int8), "weight dtype: got int8, wanted float32, bfloat16 or float16"),
    ],
)
def test_dequantize_bad_input(change, message):
    weight = quantize_4bit(torch.randn(64, 96), double_quant=True)
    with pytest.raises(ValueError, match=message):
        change(weight).dequantize()


@pytest.mark.parametrize("function", [dequantize_4bit, lambda w: dequantize_4bit_rows(w, 0, torch.empty(4, 4))])
def test_dequantize_no_weight(function):
    with pytest.raises(ValueError, match="weight: got a Tensor, wanted an NF4Weight"):
        function(torch.ones(4, 4))


def test_dequantize_bad_dtype():
    with pytest.raises(ValueError, match="dtype: got float64, wanted float32, bfloat16 or float16"):
        quantize_4bit(torch.randn(64)).dequantize(torch.float64)


@pytest.mark.parametrize(
    ("first_row", "out", "message"),
    [
        (0, torch.empty(3, 98), r"out: got float32 \[3, 98\], wanted some of the rows of a weight \[64, 97\]"),
        (0, torch.empty(65, 97), r"out: got float32 \[65, 97\]"),
        (0, torch.empty(97), r"out: got float32 \[97\]"),
        (0, torch.empty(3, 97, dtype=torch.float64), "out: got float64"),
        (0, torch.empty(3, 194)[:, ::2], r"out: got strides \[194, 2\], wanted a dense tensor"),
        (
            0,
            torch.empty(3 * 97 + 1)[1:].view(3, 97),
            "out: got memory at a multiple of 4 bytes, wanted a multiple of 16",
        ),
        (-8, torch.empty(3, 97), "first_row: got -8, wanted 0 to 61, for 3 rows of 64"),
        (62, torch.empty(3, 97), "first_row: got 62"),
        (3, torch.empty(3, 97), "first_row: got 3, wanted a row that begins at a multiple of 8 elements"),
    ],
)
def test_rows_bad_input(first_row, out, message):
    with pytest.raises(ValueError, match=message):
        dequantize_4bit_rows(quantize_4bit(torch.randn(64, 97)), first_row, out)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shape", torch.Size((64, 97)), r"weight: got uint8 \[3072, 1\], which is 3072 bytes, wanted 3104"),
        ("shape", None, "quant_state.shape: got None"),
        ("shape", (-1, 6144), r"quant_state.shape: got \[-1, 6144\]"),
        ("shape", (2**32, 2**32), r"quant_state.shape: got .*2\*\*63"),
        ("dtype", torch.float64, "quant_state.dtype: got torch.float64"),
        ("blocksize", 96, "quant_state.blocksize: got 96"),
        ("blocksize", 128, r"quant_state.absmax: got uint8 \[96\], wanted uint8 with 48 elements"),
        ("quant_type", "af4", "quant_state.quant_type: got 'af4'"),
        ("absmax", torch.zeros(96), "quant_state.absmax: got float32"),
        ("absmax", torch.zeros(96, dtype=torch.uint8, device="meta"), "quant_state.absmax: got a tensor on meta"),
        ("offset", None, "quant_state.offset: got None"),
        ("offset", torch.zeros(2), r"quant_state.offset: got float32 \[2\]"),
        ("state2.blocksize", 100, "quant_state.state2.blocksize: got 100"),
        ("state2.dtype", torch.bfloat16, "quant_state.state2.dtype: got torch.bfloat16"),
        ("state2.code", torch.zeros(16), r"quant_state.state2.code: got float32 \[16\]"),
        ("state2.absmax", torch.zeros(3), r"quant_state.state2.absmax: got float32 \[3\]"),
    ],
)
def test_quant_state_that_does_not_fit(field, value, message):
    codes, state = bnb.functional.quantize_4bit(torch.randn(64, 96), quant_type="nf4", compress_statistics=True)
    target = state
    *path, last = field.split(".")
    for part in path:
        target = getattr(target, part)
    setattr(target, last, value)
    with pytest.raises(ValueError, match=message):
        NF4Weight.from_quant_state(codes, state)


def test_weight_that_does_not_fit():
    codes, state = bnb.functional.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    with pytest.raises(ValueError, match="weight: got int32"):
        NF4Weight.from_quant_state(codes.int(), state)
    with pytest.raises(ValueError, match="weight: got strides"):
        NF4Weight.from_quant_state(codes[::2], state)
    with pytest.raises(ValueError, match="without a quant_state"):
        NF4Weight.from_params4bit(torch.nn.Parameter(torch.randn(4, 4)))
    with pytest.raises(ValueError, match="without a quant_state"):
        NF4Weight.from_params4bit(bnb.nn.Params4bit(torch.randn(4, 4), requires_grad=False))
