"""The oracle of the nf4 family: the storage format written out in plain PyTorch."""

import torch
from torch import Tensor

CODEBOOKS = {
    "nf4": torch.tensor(
        [
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
        ],
        device="cpu",
    ),
    "fp4": torch.tensor(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3],
        device="cpu",
    )
    / 12,
}


def block_absmax(absmax: Tensor, nested: tuple[Tensor, ...] = (), nested_blocksize: int = 256) -> Tensor:
    """absmax of every block, fp32, whether it is stored in 8 bits or not."""
    if not nested:
        return absmax
    code, nested_absmax, offset = nested
    scale = nested_absmax.repeat_interleave(nested_blocksize)[: absmax.numel()]
    return code[absmax.long()] * scale + offset


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    blocksize: int,
    quant_type: str,
    nested: tuple[Tensor, ...] = (),
    nested_blocksize: int = 256,
) -> Tensor:
    """The arguments are the fields of an `NF4Weight`; dtype may be float64, for values without rounding."""
    count = torch.Size(shape).numel()
    nibbles = torch.stack([codes >> 4, codes & 0xF], dim=-1).view(-1)[:count]
    scale = block_absmax(absmax, nested, nested_blocksize).repeat_interleave(blocksize)[:count]
    working = torch.promote_types(dtype, torch.float32)
    values = CODEBOOKS[quant_type].to(working)[nibbles.long()] * scale.to(working)
    return values.to(dtype).view(shape)


def quantize_4bit(tensor: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    """Codes (uint8, two a byte) and absmax (fp32): each element takes the code whose value is nearest."""
    flat = tensor.detach().float().reshape(-1)
    count = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -count % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scale = absmax.clamp(min=1e-38)
    normalized = blocks * (1 / scale)[:, None]
    if count % blocksize:
        normalized[-1] = blocks[-1] / scale[-1]
        absmax[-1] = scale[-1]
    values, order = CODEBOOKS[quant_type].sort(stable=True)
    ranks = torch.bucketize(normalized, (values[:-1] + values[1:]) / 2)
    nibbles = order[ranks].view(-1)[: count + count % 2].to(torch.uint8)
    return nibbles[::2] << 4 | nibbles[1::2], absmax
