"""Philox4x32-10, the counter-based generator behind every dropout mask of the library.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds of Philox.

    Args:
        counter: four int64 tensors of one shape, each holding a 32-bit value.
        key: two 32-bit values.

    Returns:
        Four int64 tensors of that shape, each holding 32 random bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # 32 x 32 -> 64 bits would overflow a signed int64, so the product is built from 16-bit halves.
        high0, low0 = _mul_high_low(c0, _MULTIPLIERS[0])
        high1, low1 = _mul_high_low(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def dropout_mask(seed: int, rows: int, columns: int, p: float) -> torch.Tensor:
    """Which elements of a [rows, columns] matrix survive a dropout of probability `p`.

    One Philox call with counter (column // 8, row, row >> 32, 0) and key `seed` gives eight 16-bit numbers, for
    eight neighbouring columns: word j // 2, its lower half first. An element survives when its number is at least
    round(p * 65536).

    Returns:
        A bool tensor [rows, columns].
    """
    groups = -(-columns // 8)
    group = torch.arange(groups).repeat(rows)
    row = torch.arange(rows).repeat_interleave(groups)
    words = philox4x32((group, row & _MASK, row >> 32, torch.zeros_like(row)), (seed & _MASK, (seed >> 32) & _MASK))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return halves.reshape(rows, groups * 8)[:, :columns] >= round(p * 65536)


def _mul_high_low(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    low_product = (a & 0xFFFF) * b
    high_product = (a >> 16) * b
    middle = (low_product >> 16) + (high_product & 0xFFFF)
    return (high_product >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (low_product & 0xFFFF)
