"""4-bit weights in bitsandbytes' storage: NF4 and FP4, with or without double quantisation.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314). Double quantisation stores
the blocks' absmax in the 8-bit dynamic type of Dettmers et al. 2021 (arXiv:2110.02861).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._arguments import FLOAT_DTYPES, bad, check_dtype, describe, dtype_name, refuse
from ._fakes import register_fake

_STORAGE_DTYPES = (torch.uint8, *FLOAT_DTYPES)
_NESTED_BLOCKSIZE = 256
_FORMAT_SIZES = 4  # where the sizes begin in `NF4Weight.arguments`
_CODEBOOKS = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(sign * v / 12 for sign in (1, -1) for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)),
}
_QUANT_TYPES = tuple(_CODEBOOKS)


@dataclass(frozen=True)
class NF4Weight:
    """A view of a 4-bit tensor, usually a weight `W [N, K]`; it copies nothing.

    Element i of the flattened tensor is `codebook[code] * absmax[i // blocksize]` in fp32, rounded once to `dtype`.
    Nested statistics are `absmax[b] = nested_code[absmax_code[b]] * nested_absmax[b // nested_blocksize] + offset`,
    with the product and the sum each rounded to fp32.

    The constructor checks nothing: the ops do. `from_quant_state` checks what it is given.

    Attributes:
        codes: uint8 [ceil(numel / 2)], two codes a byte, the first element in the high nibble.
        absmax: fp32 [blocks], or uint8 [blocks] when the statistics are themselves quantised (`nested`).
        shape: (N, K); any other shape can be dequantised, but is no weight of a linear.
        dtype: what a dequantised element is rounded to.
        blocksize: flattened elements a block: a power of two from 32 to 4096. Blocks may straddle rows.
        quant_type: 'nf4' or 'fp4'.
        nested: empty, or (code fp32 [256], absmax fp32 [ceil(blocks / nested_blocksize)], offset fp32 []).
        nested_blocksize: blocks whose statistics share one second-level absmax.
        bf16_statistics: the tensors were copied out of bitsandbytes' repacked CPU format, which had already rounded
            absmax to bf16 and dropped the nested statistics; the values differ from the checkpoint's for that.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    quant_type: str
    nested: tuple[Tensor, ...] = ()
    nested_blocksize: int = _NESTED_BLOCKSIZE
    bf16_statistics: bool = False

    @classmethod
    def from_params4bit(cls, weight: Tensor) -> NF4Weight:
        """The view of a `bitsandbytes.nn.Params4bit`.

        Raises:
            ValueError: `weight` is not quantised yet, or its quant_state does not fit it.
        """
        quant_state = getattr(weight, "quant_state", None)
        if quant_state is None:
            raise ValueError(
                f"weight: got a {type(weight).__name__} without a quant_state, wanted a quantised Params4bit "
                "(bitsandbytes quantises when the layer is moved to its device)"
            )
        return cls.from_quant_state(weight, quant_state)

    @classmethod
    def from_quant_state(cls, weight: Tensor, quant_state: Any) -> NF4Weight:
        """The view of a packed tensor and its `bitsandbytes.functional.QuantState`.

        Nothing is copied, with three exceptions: statistics that a checkpoint stored in 16 bits are converted to
        fp32; so is a nested offset; and a weight that bitsandbytes has repacked for its CPU inference kernels is
        converted back, see `bf16_statistics`.

        Args:
            weight: the packed codes in any `quant_storage` (uint8, bf16, fp16, fp32) and any shape.
            quant_state: absmax, shape, dtype, blocksize, quant_type and, when nested, offset and state2.

        Raises:
            ValueError: the two do not fit together, or a field has a value that the format lacks; it names the field.
        """
        # Called at every forward, so each microsecond counts: on a Params4bit, any access goes through its Python
        # __torch_function__, on a plain tensor not; and QuantState's __getattr__ makes a missing attribute dear.
        if torch.compiler.is_compiling():  # an exported program would lose what it takes by `data`
            with torch._C.DisableTorchFunctionSubclass():
                weight = weight.detach()
        else:
            weight = weight.data
        if vars(quant_state).get("packing_format_for_cpu", False):
            return cls._from_repacked(weight, quant_state)
        shape, dtype, blocksize = quant_state.shape, quant_state.dtype, quant_state.blocksize
        count, blocks = _check_format(shape, dtype, blocksize, quant_state.quant_type, "quant_state.")
        device = weight.device
        if weight.dtype not in _STORAGE_DTYPES:
            raise ValueError(f"weight: got {describe(weight)}, wanted uint8, bfloat16, float16 or float32 storage")
        if not weight.is_contiguous():
            raise ValueError(f"weight: got strides {weight.stride()}, wanted a dense tensor")
        codes = weight.view(-1)
        if codes.dtype is not torch.uint8:
            codes = codes.view(torch.uint8)
        if codes.numel() != (count + 1) // 2:
            raise ValueError(
                f"weight: got {describe(weight)}, which is {codes.numel()} bytes, wanted {(count + 1) // 2}: half the "
                f"elements of quant_state.shape {list(shape)}"
            )
        absmax, state2 = quant_state.absmax, quant_state.state2
        if state2 is None:
            absmax = _as_float(absmax)
            _check_tensor(absmax, "quant_state.absmax", torch.float32, blocks, device)
            return cls(codes, absmax, tuple(shape), dtype, blocksize, quant_state.quant_type)

        nested_blocksize = state2.blocksize
        if not (isinstance(nested_blocksize, int) and _is_power_of_two(nested_blocksize)):
            raise ValueError(f"quant_state.state2.blocksize: got {nested_blocksize!r}, wanted a power of two")
        if state2.dtype not in (None, torch.float32):
            raise ValueError(f"quant_state.state2.dtype: got {state2.dtype}, wanted torch.float32")
        if not isinstance(quant_state.offset, Tensor):
            raise ValueError(f"quant_state.offset: got {quant_state.offset!r}, wanted a tensor with one element")
        nested = (_as_float(state2.code), _as_float(state2.absmax), _as_float(quant_state.offset))
        _check_tensor(absmax, "quant_state.absmax", torch.uint8, blocks, device)
        _check_tensor(nested[0], "quant_state.state2.code", torch.float32, 256, device)
        _check_tensor(nested[1], "quant_state.state2.absmax", torch.float32, -(-blocks // nested_blocksize), device)
        _check_tensor(nested[2], "quant_state.offset", torch.float32, 1, device)
        return cls(codes, absmax, tuple(shape), dtype, blocksize, quant_state.quant_type, nested, nested_blocksize)

    @classmethod
    def _from_repacked(cls, weight: Tensor, quant_state: Any) -> NF4Weight:
        # bitsandbytes' CPU format: 32 rows at a time are put in the order [K / 2, 32 rows, 2]; each 64 elements of
        # that become 32 bytes, the first 32 elements in the low nibbles. absmax is bf16 [K / blocksize, N].
        rows = 32
        shape, blocksize = tuple(quant_state.shape), quant_state.blocksize
        dtype = getattr(quant_state, "original_dtype", quant_state.dtype)
        count, _ = _check_format(shape, dtype, blocksize, quant_state.quant_type, "quant_state.")
        if len(shape) != 2 or shape[0] % rows or shape[1] % blocksize:
            raise ValueError(
                f"quant_state.shape: got {list(shape)}, wanted [a multiple of {rows}, a multiple of the blocksize "
                f"{blocksize}], as bitsandbytes' repacked CPU format has"
            )
        n, k = shape
        _check_tensor(weight, "weight", torch.uint8, count // 2, weight.device)
        absmax = quant_state.absmax
        if tuple(absmax.shape) != (k // blocksize, n):
            raise ValueError(
                f"quant_state.absmax: got {describe(absmax)}, wanted [{k // blocksize}, {n}], as bitsandbytes' "
                "repacked CPU format has"
            )
        packed = weight.reshape(-1, 32)
        elements = torch.cat([packed & 0xF, packed >> 4], dim=-1)
        elements = elements.view(n // rows, k // 2, rows, 2).transpose(1, 2).reshape(-1, 2)
        codes = elements[:, 0] << 4 | elements[:, 1]
        return cls(
            codes,
            absmax.T.float().reshape(-1),
            shape,
            dtype,
            blocksize,
            quant_state.quant_type,
            bf16_statistics=True,
        )

    def check_types(self) -> None:
        """Refuses what the ops would refuse without a sentence, or take for something else.

        Raises:
            ValueError: a field is of another type than it should be; it names the field.
        """
        if not torch.compiler.is_compiling() and "_arguments" in self.__dict__:
            return  # it has been checked before
        if not (
            isinstance(self.codes, Tensor)
            and isinstance(self.absmax, Tensor)
            and isinstance(self.dtype, torch.dtype)
            and type(self.blocksize) is int
            and type(self.quant_type) is str
            and type(self.nested_blocksize) is int
            and _all_are(int, self.shape)
            and _all_are(Tensor, self.nested)
        ):
            for name, kind, wanted in _FIELDS:
                value = getattr(self, name)
                fits = _all_are(kind, value) if name in ("shape", "nested") else isinstance(value, kind)
                if not fits:
                    bad(name, value, wanted)

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The ops' `weight` and `format`, which csrc/nf4/binding.h describes.

        Raises:
            ValueError: quant_type or dtype is none that the format has.
        """
        if torch.compiler.is_compiling():
            return self._make_arguments()
        kept = self.__dict__.get("_arguments")
        if kept is None:
            kept = self.__dict__["_arguments"] = self._make_arguments()
        return kept

    def _make_arguments(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        self.check_types()
        if self.quant_type not in _CODEBOOKS:
            raise ValueError(f"quant_type: got {self.quant_type!r}, wanted 'nf4' or 'fp4'")
        if self.dtype not in FLOAT_DTYPES:
            refuse("weight dtype", dtype_name(self.dtype), "float32, bfloat16 or float16")
        numbers = _QUANT_TYPES.index(self.quant_type), self.nested_blocksize, FLOAT_DTYPES.index(self.dtype)
        return (self.codes, self.absmax, *self.nested), (self.blocksize, *numbers, *self.shape)

    def as_dict(self) -> dict[str, Any]:
        """The fields under bitsandbytes' names: `QuantState.from_dict(weight.as_dict(), device)` is its QuantState."""
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": torch.tensor(_CODEBOOKS[self.quant_type], device=self.codes.device),
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
        }
        if self.nested:
            code, absmax, offset = self.nested
            state |= {
                "nested_absmax": absmax,
                "nested_blocksize": self.nested_blocksize,
                "nested_quant_map": code.clone(),  # several weights share one; safetensors refuses shared tensors
                "nested_dtype": "float32",
                "nested_offset": offset.item(),
            }
        return state

    def scale_rows(self, scale: Tensor) -> NF4Weight:
        """`scale ⊙ W`, row by row, without quantising again: the codes stay, each block's absmax takes the factor.

        Nested statistics become plain ones, since 8 bits can't hold the factors. An absmax may become negative or
        zero, which decodes as it should, here and in bitsandbytes.

        Args:
            scale: [N].

        Raises:
            ValueError: `scale` is not of that shape; W is no matrix; or blocks straddle its rows.
        """
        if len(self.shape) != 2 or self.shape[1] % self.blocksize:
            raise ValueError(
                f"weight: got shape {list(self.shape)}, wanted rows of a multiple of the blocksize {self.blocksize}: "
                "a block that straddles rows has one absmax for both"
            )
        if scale.shape != self.shape[:1]:
            raise ValueError(f"scale: got {describe(scale)}, wanted [{self.shape[0]}]")
        absmax = self.absmax
        if self.nested:
            code, nested_absmax, offset = self.nested
            steps = nested_absmax.repeat_interleave(self.nested_blocksize)[: absmax.numel()]
            absmax = code[absmax.long()] * steps + offset
        absmax = (absmax.view(self.shape[0], -1).double() * scale[:, None].double()).float().view(-1)
        return replace(self, absmax=absmax, nested=())

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `dequantize_4bit`."""
        return dequantize_4bit(self, dtype)


def _all_are(kind: type, items: Any) -> bool:
    return isinstance(items, (tuple, list)) and all(isinstance(item, kind) for item in items)


_FIELDS = (
    ("codes", Tensor, "a tensor"),
    ("absmax", Tensor, "a tensor"),
    ("shape", int, "a tuple of sizes"),
    ("dtype", torch.dtype, "torch.float32, torch.bfloat16 or torch.float16"),
    ("blocksize", int, "a power of two from 32 to 4096"),
    ("quant_type", str, "'nf4' or 'fp4'"),
    ("nested", Tensor, "a tuple of tensors"),
    ("nested_blocksize", int, "a power of two"),
)


def quantize_4bit(
    tensor: Tensor, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = False
) -> NF4Weight:
    """Quantises a tensor to 4 bits; equal to bitsandbytes' CPU result bit for bit.

    On a CUDA device too, apart from the mean of absmax that `double_quant` subtracts, which torch sums in another order
    there.

    A NaN makes every element of its block NaN. An infinity makes its block's absmax infinite, and all of the block's
    elements NaN or infinite. With `double_quant` one non-finite absmax makes the mean of all of them non-finite, and
    with it the whole tensor: check for finite values first where that matters.

    Args:
        tensor: fp32, bf16 or fp16, of any shape, on the CPU, or on a CUDA device when the library was built for it. Not
            differentiable.
        blocksize: flattened elements that share one absmax: a power of two from 32 to 4096.
        quant_type: 'nf4' or 'fp4'.
        double_quant: store absmax in 8 bits, in blocks of 256, after subtracting its mean.

    Returns:
        An `NF4Weight` of the tensor's shape and dtype.

    Raises:
        ValueError: the dtype, blocksize or quant_type is none of the above; it names the argument.
    """
    for name, value, kind, wanted in (
        ("tensor", tensor, Tensor, "a tensor"),
        ("blocksize", blocksize, int, "a power of two from 32 to 4096"),
        ("quant_type", quant_type, str, "'nf4' or 'fp4'"),
        ("double_quant", double_quant, bool, "True or False"),
    ):
        if not isinstance(value, kind):
            bad(name, value, wanted)
    codes, absmax = torch.ops.peft_kernels.nf4_quantize(tensor.detach(), blocksize, quant_type)
    weight = NF4Weight(codes, absmax, tuple(tensor.shape), tensor.dtype, blocksize, quant_type)
    return _nest(weight) if double_quant else weight


def quantize_4bit_rows(like: NF4Weight, panels: Iterable[Tensor]) -> NF4Weight:
    """`quantize_4bit` of a weight [N, K] that is given a panel of rows at a time; in the format of another one.

    Each panel but the last has a whole number of blocks.
    """
    numel = math.prod(like.shape)
    codes, absmax = torch.empty_like(like.codes), like.codes.new_empty(-(-numel // like.blocksize), dtype=torch.float32)
    done = 0
    for panel in panels:
        found = torch.ops.peft_kernels.nf4_quantize(panel, like.blocksize, like.quant_type)
        for whole, part, elements in zip((codes, absmax), found, (2, like.blocksize), strict=True):
            whole[done // elements : done // elements + part.numel()] = part
        done += panel.numel()
    weight = replace(like, codes=codes, absmax=absmax, nested=(), nested_blocksize=_NESTED_BLOCKSIZE)
    return _nest(weight) if like.nested else weight


def _nest(weight: NF4Weight) -> NF4Weight:
    """The weight with its statistics in 8 bits."""
    offset = weight.absmax.mean()
    code = _DYNAMIC_CODE.to(offset.device)
    absmax, nested_absmax = _quantize_8bit(weight.absmax - offset, code, _NESTED_BLOCKSIZE)
    return replace(weight, absmax=absmax, nested=(code, nested_absmax, offset))


def dequantize_4bit(weight: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a 4-bit tensor.

    Args:
        weight: on the CPU, or on a CUDA device when the library was built for it.
        dtype: fp32, bf16 or fp16. By default the weight's; another is reached by a second rounding.

    Returns:
        A tensor of the weight's shape.

    Raises:
        ValueError: a field of `weight` does not fit the others; it names the field, what it got and what it wanted.
    """
    _check_weight(weight)
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise ValueError(f"dtype: got {dtype!r}, wanted torch.float32, torch.bfloat16 or torch.float16")
    y: Tensor = torch.ops.peft_kernels.nf4_dequantize(*weight.arguments, dtype or weight.dtype)
    return y


def dequantize_4bit_rows(weight: NF4Weight, first_row: int, out: Tensor) -> Tensor:
    """A panel of a weight `[N, K]`, into memory that can be used again for the next one.

    Args:
        weight: on the CPU, or on a CUDA device when the library was built for it.
        first_row: first_row * K must be a multiple of 8.
        out: [rows, K], fp32, bf16 or fp16; rows first_row to first_row + rows - 1, as `dequantize_4bit` makes them.

    Returns:
        out.

    Raises:
        ValueError: a field of `weight`, first_row or out does not fit; it names what.
    """
    _check_weight(weight)
    if not isinstance(first_row, int):
        bad("first_row", first_row, "an integer")
    if not isinstance(out, Tensor):
        bad("out", out, "a tensor [rows, K]")
    if not torch.compiler.is_compiling() and out.is_neg():  # torch would resolve it into a copy
        raise ValueError("out: got a negative view, wanted a tensor [rows, K] with memory of its values")
    torch.ops.peft_kernels.nf4_dequantize_rows(*weight.arguments, first_row, out)
    return out


def _check_weight(weight: Any) -> None:
    if not isinstance(weight, NF4Weight):
        raise ValueError(f"weight: got a {type(weight).__name__}, wanted an NF4Weight")
    weight.check_types()


@register_fake("nf4_dequantize")
def _(weight: Sequence[Tensor], format: Sequence[int], dtype: torch.dtype) -> Tensor:
    return weight[0].new_empty(format[_FORMAT_SIZES:], dtype=dtype)


@register_fake("nf4_dequantize_rows")
def _(weight: Sequence[Tensor], format: Sequence[int], first_row: int, out: Tensor) -> None:
    return None


@register_fake("nf4_quantize")
def _(tensor: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    count = tensor.numel()
    codes = tensor.new_empty(((count + 1) // 2,), dtype=torch.uint8)
    absmax = tensor.new_empty(((count + blocksize - 1) // blocksize,), dtype=torch.float32)
    return codes, absmax


def _dynamic_code() -> Tensor:
    """The 256 values of the signed 8-bit dynamic type, ascending: fp32.

    Zero, one, and ± 10^-e times the midpoints of 2^(6-e) equal parts of [0.1, 1], for e from 6 to 0.
    """
    values = [torch.tensor([0.0, 1.0], device="cpu")]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, device="cpu")
        positive = 10.0 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [positive, -positive]
    return torch.cat(values).sort().values


_DYNAMIC_CODE = _dynamic_code()


def _quantize_8bit(tensor: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Blockwise quantisation to the nearest of 256 values, with the roundings of bitsandbytes' CPU kernel.

    That kernel looks the nearest value up on a grid of 65536 points over [-1, 1], so that an element can miss its
    nearest value by one; a NaN takes no part in its block's absmax and becomes code 0.

    Returns:
        uint8 [numel] codes and fp32 [blocks] absmax.
    """
    count = tensor.numel()
    blocks = torch.nn.functional.pad(tensor, (0, -count % blocksize)).view(-1, blocksize)
    absmax = torch.where(blocks.isnan(), 0, blocks.abs()).amax(dim=1)
    normalized = blocks * absmax.reciprocal()[:, None]
    normalized = torch.where(normalized.isnan(), -1, normalized.clamp(-1, 1))
    grid = ((normalized + 1) * 0.5 * 65535 + 0.5).floor()
    codes = torch.bucketize(grid / 65535 * 2 - 1, (code[:-1] + code[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8).view(-1)[:count], absmax


def _check_format(shape: Any, dtype: Any, blocksize: Any, quant_type: Any, prefix: str) -> tuple[int, int]:
    """Elements and blocks of a tensor."""
    if shape is None:
        raise ValueError(f"{prefix}shape: got None, wanted the sizes of the dequantised tensor")
    count = 1
    for size in shape:
        count *= size
    if count < 0 or count >= 2**63:
        raise ValueError(f"{prefix}shape: got {list(shape)}, wanted sizes whose product is from 0 to 2**63 - 1")
    check_dtype(f"{prefix}dtype", dtype)
    if not (isinstance(blocksize, int) and 32 <= blocksize <= 4096 and _is_power_of_two(blocksize)):
        raise ValueError(f"{prefix}blocksize: got {blocksize!r}, wanted a power of two from 32 to 4096")
    if quant_type not in _CODEBOOKS:
        raise ValueError(f"{prefix}quant_type: got {quant_type!r}, wanted 'nf4' or 'fp4'")
    return count, -(-count // blocksize)


def _check_tensor(tensor: Tensor, name: str, dtype: torch.dtype, count: int, device: torch.device) -> None:
    if tensor.dtype is not dtype or tensor.numel() != count:
        raise ValueError(f"{name}: got {describe(tensor)}, wanted {dtype_name(dtype)} with {count} elements")
    if tensor.device != device:
        raise ValueError(f"{name}: got a tensor on {tensor.device}, wanted one on {device}, where the weight is")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, wanted a dense tensor")


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
